"""How long a comparison runs: decided once, before the first run, stored, and reused by every continuation.

With `--budget` the number of steps, the same for all methods, follows from timed steps of all methods in turn; where whole
splits would take too much of it, only their first tokens are evaluated. The same timings give the time axis of the curves:
step x that method's median.
"""

from __future__ import annotations

import itertools
import math
import statistics
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
from sparseffn.training.config import CURVE_POINTS, CURVE_TOKENS
from sparseffn.training.stepper import Stepper

# Tokens of validation that usage is counted on, at most, in the runs of the first seed.
USAGE_TOKENS = 16 * CURVE_TOKENS
# Rounds of timed training steps; the first steps of a process are slower and not counted.
_ROUNDS, _WARMUP = 7, 2
# Timed evaluations of each method, and windows of each that are timed.
_EVALUATIONS, _TIMED_WINDOWS = 2, 3
# The time of a step does not depend on the rate; with this one no method diverges while it is timed.
_TIMING_LR = 1e-6
# Part of the budget left for what is not planned: start, checkpoints, report, a machine that slows down.
_RESERVE = 0.12
# Part of a budget that final losses may take: a slow machine would spend more than half of `make demo` on whole splits, for
# digits in which seeds differ.
_EVALUATION = 1 / 3
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
    evaluated: PositiveInt | None = None
    """First tokens of validation and of test that final losses are of; None: whole splits."""
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
    steps, evaluated = comparison.preset.steps if settings.steps is None else settings.steps, None
    if settings.budget_s is not None:
        spent, times = time.perf_counter() - started, (sum(step_s.values()), sum(eval_token_s.values()))
        steps, evaluated = _within_budget(comparison, settings.budget_s, spent, *times)
    return Plan(
        steps=steps,
        step_s=step_s,
        eval_token_s=eval_token_s,
        budget_s=settings.budget_s,
        evaluated=evaluated,
        device=device_name(device),
    )


def _within_budget(
    comparison: Comparison, budget_s: float, spent_s: float, step_s: float, token_s: float
) -> tuple[int, int | None]:
    """Steps, and first tokens of validation and test that are evaluated (None: all), in what is left of a budget.

    Args:
        comparison: with methods, seeds and splits.
        budget_s: the whole budget, in seconds.
        spent_s: of which so much is gone.
        step_s: seconds of a step of all methods, one after the other.
        token_s: seconds to evaluate a token with all methods.
    """
    corpus, n_seeds = comparison.corpus, len(comparison.settings.seeds)
    n_valid, n_test = len(corpus.valid) - 1, len(corpus.test) - 1
    points = n_seeds * (CURVE_POINTS + 1) * min(CURVE_TOKENS, n_valid)
    # One layer is timed alone at the end: a few dozen calls, each a fraction of a step.
    left = budget_s * (1 - _RESERVE) - spent_s - 10 * step_s - points * token_s
    evaluated = _tokens_within(left * _EVALUATION / (n_seeds * token_s), n_valid, n_test)
    n_valid, n_test = (min(n, evaluated or n) for n in (n_valid, n_test))
    left -= (n_seeds * (n_valid + n_test) + min(USAGE_TOKENS, n_valid)) * token_s
    return _steps_within(left, n_seeds * step_s, budget_s), evaluated


def _tokens_within(most: float, n_valid: int, n_test: int) -> int | None:
    """First tokens of each of two splits that are `most` together, no fewer than of a curve's point; None: both whole."""
    if n_valid + n_test <= most:
        return None
    # What a short split does not need is the other's.
    n = max(CURVE_TOKENS, int(max(most / 2, most - min(n_valid, n_test))) // 1000 * 1000)
    return n if n < max(n_valid, n_test) else None


def _steps_within(left_s: float, step_s: float, budget_s: float) -> int:
    """Steps of all methods and seeds, each round of them taking `step_s`, in what is left of a budget."""
    steps = int(left_s / step_s)
    if steps < MIN_STEPS:
        # Of what a budget has more, so much is for steps.
        needed = budget_s + (MIN_STEPS * step_s - left_s) / ((1 - _RESERVE) * (1 - _EVALUATION))
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
    """Seconds a token, methods in turn; the first round is not counted."""
    models = {c.label: _model(c, comparison.device) for c in comparison.candidates}
    seconds: dict[str, list[float]] = {label: [] for label in models}
    for _ in range(1 + _EVALUATIONS):
        for label, model in models.items():
            seconds[label].append(_evaluation_of_a_token(model, comparison, config))
    return {label: statistics.fmean(values[1:]) for label, values in seconds.items()}


def _evaluation_of_a_token(model: LanguageModel, comparison: Comparison, config: TrainConfig) -> float:
    """Seconds with the evaluation's long memory filled, as it is for nearly all of a split: the first windows go before."""
    valid, clock = comparison.corpus.valid, clock_of(comparison.device)
    n_filling, a_window = math.ceil(config.eval_memory / config.context), config.eval_batch * config.context
    # Whole windows, as a step of few tokens costs what one of many does; of a short text what there is.
    n_windows = min(n_filling + _TIMED_WINDOWS, (len(valid) - 1) // a_window)
    tokens = valid[: n_windows * a_window + 1] if n_windows else valid
    marks = [(0, clock())]
    evaluate(model, tokens, **config.evaluation, on_progress=lambda done, _: marks.append((done, clock())))
    (before, start), (after, end) = marks[min(n_filling, len(marks) - 2)], marks[-1]
    return (end - start) / (after - before)
