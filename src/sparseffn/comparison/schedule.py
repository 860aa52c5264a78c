"""How long a comparison runs: decided once, before the first run, stored, and reused by every continuation.

With `--budget` the number of steps, the same for all methods, follows from timed steps of all methods in turn. The same timings
give the time axis of the curves: step x that method's median.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import msgspec
import numpy as np
import torch

from sparseffn.bench.machine import clock_of
from sparseffn.bench.timing import interleaved, medians
from sparseffn.comparison.matched import MatchedMethod
from sparseffn.data import Corpus, TrainingStreams
from sparseffn.devices import device_name
from sparseffn.errors import UserError
from sparseffn.evaluation import evaluate
from sparseffn.models import TransformerXL
from sparseffn.storage import Positive, PositiveInt
from sparseffn.training import TrainConfig
from sparseffn.training.config import CURVE_POINTS
from sparseffn.training.step import Stepper

# Rounds of timed training steps; the first steps of a process are slower and not counted.
_ROUNDS, _WARMUP = 7, 2
# The time of a step does not depend on the rate; with this one no method diverges while it is timed.
_TIMING_LR = 1e-6
# Part of the budget left for what is not planned: start, checkpoints, report, a machine that slows down.
_RESERVE = 0.12
# Fewer steps than this say nothing about a method.
MIN_STEPS = 20


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """`plan.json`: what all runs share beside the preset."""

    steps: PositiveInt
    step_s: dict[str, Positive]
    """Median seconds of a training step by label, methods timed in turn."""
    eval_token_s: dict[str, Positive]
    """Seconds to evaluate a token."""
    budget_s: Positive | None = None
    device: str = "cpu"
    """What they were timed on."""


def make_plan(
    candidates: Sequence[MatchedMethod],
    config: TrainConfig,
    corpus: Corpus,
    *,
    n_seeds: int,
    steps: int | None,
    budget_s: float | None,
    device: torch.device,
    spent_s: Callable[[], float] = lambda: 0.0,
) -> Plan:
    """Time all methods in turn and decide the number of steps.

    Args:
        candidates: the methods.
        config: settings of the runs, but for their length.
        corpus: what they train on.
        n_seeds: runs of each.
        steps: given number of steps; None to derive it from the budget.
        budget_s: seconds for the whole comparison.
        device: where the runs will be.
        spent_s: seconds of the budget that are gone, whenever it is asked.

    Raises:
        UserError: the budget does not suffice for a few steps.
    """
    step_s = _time_steps(candidates, config, corpus, device)
    eval_token_s = _time_evaluation(candidates, config, corpus, device)
    if steps is None:
        assert budget_s is not None, "either steps or a budget is given"
        left = budget_s * (1 - _RESERVE) - spent_s()
        tokens = len(corpus.valid) + len(corpus.test) + (CURVE_POINTS + 1) * min(config.eval_tokens, len(corpus.valid))
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
    return Plan(steps=steps, step_s=step_s, eval_token_s=eval_token_s, budget_s=budget_s, device=device_name(device))


def _model(candidate: MatchedMethod, device: torch.device) -> TransformerXL:
    model = TransformerXL(candidate.model)
    model.init_parameters(0)
    return model.to(device)


def _time_steps(
    candidates: Sequence[MatchedMethod], config: TrainConfig, corpus: Corpus, device: torch.device
) -> dict[str, float]:
    config = dataclasses.replace(config, lr=_TIMING_LR)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        calls = {
            c.label: _training_step(
                _model(c, device), config, corpus.training_streams(batch=config.batch, context=config.context)
            )
            for c in candidates
        }
        return medians(interleaved(calls, rounds=_ROUNDS, warmup=_WARMUP, clock=clock_of(device)))


def _training_step(model: TransformerXL, config: TrainConfig, streams: TrainingStreams) -> Callable[[], object]:
    """A call that trains on the next window, memory carried."""
    model.train()
    stepper = Stepper(model, config)
    windows = itertools.cycle(range(streams.n_windows))
    return lambda: stepper.take(*streams.window(next(windows)), lr=config.lr)


def _time_evaluation(
    candidates: Sequence[MatchedMethod], config: TrainConfig, corpus: Corpus, device: torch.device
) -> dict[str, float]:
    """Seconds a token with the evaluation's long memory filled, which the first windows have not."""
    tokens = corpus.valid[: config.eval_batch * config.context * 6 + 1]
    calls = {c.label: _evaluation(_model(c, device), config, tokens) for c in candidates}
    seconds = medians(interleaved(calls, rounds=2, warmup=1, clock=clock_of(device)))
    return {label: value / max(1, len(tokens) - 1) for label, value in seconds.items()}


def _evaluation(model: TransformerXL, config: TrainConfig, tokens: np.ndarray) -> Callable[[], object]:
    return lambda: evaluate(
        model,
        tokens,
        batch=config.eval_batch,
        context=config.context,
        memory=config.eval_memory,
        precision=config.precision,
    )
