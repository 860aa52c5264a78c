"""How long a comparison runs: decided once, before the first run, stored, and reused by every continuation.

With `--budget` the number of steps, the same for all methods, follows from timed steps of all methods taken in turn. The same
timings give the time axis of the curves: step x that method's median.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparseffn.bench.timing import interleaved, medians
from sparseffn.comparison.matched import Contender
from sparseffn.data import Corpus, TrainingStreams
from sparseffn.errors import UserError
from sparseffn.evaluation import evaluate
from sparseffn.models import TransformerXL
from sparseffn.models.presets import Preset
from sparseffn.storage import Kind, read_fields
from sparseffn.training import TrainConfig
from sparseffn.training.config import CURVE_POINTS as CURVE_POINTS
from sparseffn.training.config import CURVE_TOKENS as CURVE_TOKENS
from sparseffn.training.step import make_optimizer, training_loss

# Rounds of timed training steps; the first steps of a process are slower and not counted.
_ROUNDS, _WARMUP = 7, 2
# The time of a step does not depend on the rate; with this one no method diverges while it is timed.
_TIMING_LR = 1e-6
# Part of the budget left for what is not planned: start, checkpoints, report, a machine that slows down.
_RESERVE = 0.12
# Fewer steps than this say nothing about a method.
MIN_STEPS = 20


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What all runs share beside the preset."""

    steps: int
    step_s: dict[str, float]
    """Median seconds of a training step by label, methods timed in turn."""
    eval_token_s: dict[str, float]
    """Seconds to evaluate a token."""
    budget_s: float | None

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict."""
        return {
            "steps": self.steps,
            "step_s": self.step_s,
            "eval_token_s": self.eval_token_s,
            "budget_s": self.budget_s,
        }

    @classmethod
    def read(cls, path: Path, labels: Sequence[str]) -> Plan:
        """The stored plan of a comparison of these methods.

        Raises:
            UserError: the file is damaged.
        """
        seconds = dict.fromkeys(labels, Kind.POSITIVE)
        fields = {
            "steps": Kind.COUNT,
            "step_s": seconds,
            "eval_token_s": seconds,
            "budget_s": Kind.POSITIVE_OR_NULL,
        }
        found = read_fields(path, fields, fix="restore the file or choose another --out")
        return cls(**{key: found[key] for key in fields})


def make_plan(
    field: Sequence[Contender],
    preset: Preset,
    corpus: Corpus,
    *,
    n_seeds: int,
    curve_tokens: int,
    steps: int | None,
    budget_s: float | None,
    spent_s: float = 0.0,
) -> Plan:
    """Time all methods in turn and decide the number of steps.

    Args:
        field: the contenders.
        preset: sizes.
        corpus: what they train on.
        n_seeds: runs of each.
        curve_tokens: validation tokens of each point of the curve.
        steps: given number of steps; None to derive it from the budget.
        budget_s: seconds for the whole comparison.
        spent_s: seconds of it that are gone already.

    Raises:
        UserError: the budget does not suffice for a few steps.
    """
    started = time.perf_counter()
    step_s = _time_steps(field, preset, corpus)
    eval_token_s = _time_evaluation(field, preset, corpus)
    if steps is None:
        assert budget_s is not None, "either steps or a budget is given"
        left = budget_s * (1 - _RESERVE) - spent_s - (time.perf_counter() - started)
        tokens = len(corpus.valid) + len(corpus.test) + (CURVE_POINTS + 1) * curve_tokens
        left -= n_seeds * tokens * sum(eval_token_s.values())
        # One layer is timed alone at the end: a few dozen calls, each a fraction of a step.
        left -= 10 * sum(step_s.values())
        per_step = n_seeds * sum(step_s.values())
        steps = int(left / per_step)
        if steps < MIN_STEPS:
            needed = (budget_s - left + MIN_STEPS * per_step) / 60
            raise UserError(
                f"`budget` must allow at least {MIN_STEPS} steps of every method; got {budget_s / 60:.1f}m, which allows "
                f"{max(0, steps)}; fix: --budget {needed:.0f}m or more, fewer methods or seeds, or a smaller preset"
            )
    return Plan(steps=steps, step_s=step_s, eval_token_s=eval_token_s, budget_s=budget_s)


def _timing_config(preset: Preset) -> TrainConfig:
    return TrainConfig(
        steps=1000, batch=preset.batch, context=preset.context, memory=preset.memory, lr=_TIMING_LR, clip=preset.clip
    )


def _time_steps(field: Sequence[Contender], preset: Preset, corpus: Corpus) -> dict[str, float]:
    config = _timing_config(preset)
    with torch.random.fork_rng():
        calls = {
            c.label: _training_step(c, config, corpus.training_streams(batch=config.batch, context=config.context))
            for c in field
        }
        return medians(interleaved(calls, rounds=_ROUNDS, warmup=_WARMUP))


def _training_step(contender: Contender, config: TrainConfig, streams: TrainingStreams) -> Callable[[], None]:
    """A call that trains on the next window, memory carried."""
    model = TransformerXL(contender.model)
    model.init_parameters(0)
    model.train()
    optimizer = make_optimizer(model, config)
    state: dict[str, Any] = {"memory": None, "window": 0}

    def step() -> None:
        inputs, targets = streams.window(state["window"] % streams.n_windows)
        optimizer.zero_grad(set_to_none=True)
        loss, balance, state["memory"] = training_loss(model, inputs, targets, state["memory"], config)
        (loss + balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        state["window"] += 1

    return step


def _time_evaluation(field: Sequence[Contender], preset: Preset, corpus: Corpus) -> dict[str, float]:
    """Seconds a token with the evaluation's long memory filled, which the first windows have not."""
    n_tokens = preset.eval_batch * preset.context * 6
    tokens = corpus.valid[: n_tokens + 1]
    calls = {}
    for contender in field:
        model = TransformerXL(contender.model)
        model.init_parameters(0)
        calls[contender.label] = _evaluation(model, preset, tokens)
    seconds = medians(interleaved(calls, rounds=2, warmup=1))
    return {label: value / max(1, len(tokens) - 1) for label, value in seconds.items()}


def _evaluation(model: TransformerXL, preset: Preset, tokens: Any) -> Callable[[], object]:
    return lambda: evaluate(model, tokens, batch=preset.eval_batch, context=preset.context, memory=preset.eval_memory)
