"""How long a comparison runs: decided once, before the first run, stored, and reused by every continuation.

With `--budget` the number of steps, the same for all methods, follows from timed steps of all methods in turn. The same timings
give the time axis of the curves: step x that method's median.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable

import msgspec
import torch

from sparseffn.bench.machine import clock_of
from sparseffn.bench.timing import interleaved, medians
from sparseffn.comparison.experiment import Comparison
from sparseffn.comparison.matched import MatchedMethod
from sparseffn.devices import device_name
from sparseffn.errors import UserError
from sparseffn.evaluation import evaluate
from sparseffn.models import LanguageModel, build_model
from sparseffn.storage import Positive, PositiveInt, read, write_json
from sparseffn.training import RunFolder, TrainConfig
from sparseffn.training.config import CURVE_POINTS
from sparseffn.training.stepper import Stepper

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


def find_plan(comparison: Comparison, started: float) -> Plan:
    """The stored plan of a comparison that began at `started` (`time.perf_counter`), or a new one, which claims the folder.

    Raises:
        UserError: the stored one is damaged, or the budget does not suffice for a few steps.
    """
    path = comparison.out / "plan.json"
    if not path.exists():
        plan = make_plan(comparison, started)
        # Only now is the folder claimed: a budget that was refused may be raised with the same --out.
        RunFolder(comparison.out).open(comparison.identity, device=str(comparison.device))
        write_json(path, plan, seal=True)
    fix = "restore the file or choose another --out"
    plan = read(path, Plan, fix=fix)
    comparison.check_labels(path, plan.step_s, "step_s.", fix=fix)
    comparison.check_labels(path, plan.eval_token_s, "eval_token_s.", fix=fix)
    return plan


def make_plan(comparison: Comparison, started: float) -> Plan:
    """Time all methods in turn and decide the number of steps; see `find_plan`."""
    settings, device = comparison.settings, comparison.device
    config = comparison.train_config(comparison.preset.steps, settings.seeds[0])
    step_s, eval_token_s = _time_steps(comparison, config), _time_evaluation(comparison, config)
    if settings.budget_s is None:
        steps = comparison.preset.steps if settings.steps is None else settings.steps
    else:
        corpus, n_seeds = comparison.corpus, len(settings.seeds)
        left = settings.budget_s * (1 - _RESERVE) - (time.perf_counter() - started)
        tokens = len(corpus.valid) + len(corpus.test) + (CURVE_POINTS + 1) * min(config.eval_tokens, len(corpus.valid))
        left -= n_seeds * tokens * sum(eval_token_s.values())
        # One layer is timed alone at the end: a few dozen calls, each a fraction of a step.
        left -= 10 * sum(step_s.values())
        steps = _steps_within(left, n_seeds * sum(step_s.values()), settings.budget_s)
    return Plan(steps=steps, step_s=step_s, eval_token_s=eval_token_s, budget_s=settings.budget_s, device=device_name(device))


def _steps_within(left_s: float, step_s: float, budget_s: float) -> int:
    """Steps of all methods and seeds, each round of them taking `step_s`, in what is left of a budget."""
    steps = int(left_s / step_s)
    if steps < MIN_STEPS:
        needed = budget_s - left_s + MIN_STEPS * step_s
        raise UserError(
            f"`budget` must allow at least {MIN_STEPS} steps of every method; got {budget_s:g}s, which allows "
            f"{max(0, steps)}; fix: --budget {_as_budget(needed)} or more, fewer methods or seeds, or a smaller preset"
        )
    return steps


def _as_budget(seconds: float) -> str:
    """No less than this, as `--budget` takes it."""
    return f"{math.ceil(seconds)}s" if seconds < 600 else f"{math.ceil(seconds / 60)}m"


def _model(candidate: MatchedMethod, device: torch.device) -> LanguageModel:
    model = build_model(candidate.model)
    model.init_parameters(0)
    return model.to(device)


def _time_steps(comparison: Comparison, config: TrainConfig) -> dict[str, float]:
    device = comparison.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        calls = {c.label: _training_step(_model(c, device), comparison, config) for c in comparison.candidates}
        return medians(interleaved(calls, rounds=_ROUNDS, warmup=_WARMUP, clock=clock_of(device)))


def _training_step(model: LanguageModel, comparison: Comparison, config: TrainConfig) -> Callable[[], object]:
    """A call that trains on the next window, memory carried."""
    model.train()
    streams = comparison.corpus.training_streams(batch=config.batch, context=config.context)
    stepper, windows = Stepper(model, config), itertools.cycle(range(streams.n_windows))
    return lambda: stepper.take(*streams.window(next(windows)), lr=_TIMING_LR)


def _time_evaluation(comparison: Comparison, config: TrainConfig) -> dict[str, float]:
    """Seconds a token with the evaluation's long memory filled, which the first windows have not."""
    tokens = comparison.corpus.valid[: config.eval_batch * config.context * 6 + 1]
    models = {c.label: _model(c, comparison.device) for c in comparison.candidates}
    calls = {label: functools.partial(evaluate, model, tokens, **config.evaluation) for label, model in models.items()}
    seconds = medians(interleaved(calls, rounds=2, warmup=1, clock=clock_of(comparison.device)))
    return {label: value / max(1, len(tokens) - 1) for label, value in seconds.items()}
