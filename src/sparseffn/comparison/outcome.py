"""From the files of a comparison's runs to `comparison.json`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np

from sparseffn.accounting import count_block
from sparseffn.analysis import UsageCounter
from sparseffn.comparison.experiment import Comparison
from sparseffn.comparison.matched import MatchedMethod
from sparseffn.comparison.schedule import USAGE_TOKENS, Plan
from sparseffn.data import Corpus, Unit, to_metric
from sparseffn.devices import device_name
from sparseffn.evaluation import evaluate
from sparseffn.ffn.dense import DenseConfig
from sparseffn.models import LanguageModel
from sparseffn.results.comparison_result import (
    FORMAT,
    ComparisonResult,
    Curve,
    MethodResult,
    MissingRun,
    TrainPoint,
    UsageCounts,
    ValidPoint,
)
from sparseffn.stats import MeanStd, mean_std
from sparseffn.storage import Positive, environment, read, write_json
from sparseffn.training import RunFolder, TrainConfig, TrainResult

# Points of the training curve on the page.
MAX_TRAIN_POINTS = 200
# Below the largest float by what the sum over seeds needs.
_LARGEST_METRIC = 1e300
# Of the model's sizes, those that the page states; the vocabulary is the corpus's.
_MODEL_FACTS = ("d_model", "n_layers", "n_heads", "n_kv_heads", "d_head")
DENSE = "(dense)"
"""The dense block in `layers.json`, which may be no candidate."""


class LayerTime(msgspec.Struct, frozen=True, kw_only=True):
    """Median seconds of one layer, in `layers.json`."""

    forward_s: Positive
    training_s: Positive
    """Forward and backward."""


LayerTimes = dict[str, LayerTime]


def count_usage(model: LanguageModel, config: TrainConfig, corpus: Corpus, folder: Path) -> UsageCounter:
    """Count the usage of the feedforward blocks on the first tokens of validation, and write it to `usage.json`."""
    counter = UsageCounter()
    evaluate(model, corpus.valid, max_tokens=USAGE_TOKENS, observe=counter.observe, **config.evaluation)
    write_json(folder / "usage.json", counter.result(), seal=True)
    return counter


def summarize(
    comparison: Comparison, plan: Plan, layers: LayerTimes, failures: Mapping[tuple[str, int], str]
) -> ComparisonResult:
    """What is known of a comparison, from the files of its runs; `failures` say why a run, by label and seed, has no result."""
    preset, corpus, seeds = comparison.preset, comparison.corpus, comparison.settings.seeds
    config = comparison.train_config(plan.steps, seeds[0])
    missing = [
        MissingRun(label=candidate.label, seed=seed, reason=failures.get((candidate.label, seed), "not finished"))
        for candidate in comparison.candidates
        for seed in seeds
        if not comparison.run_folder(candidate.label, seed).result_path.exists()
    ]
    default = preset.backbone == "transformer-xl"
    here, model = environment(str(comparison.device)), comparison.candidates[0].model
    shared = {key: value for key, value in config.to_json().items() if key != "seed"}
    timed_elsewhere = {} if plan.device == device_name(comparison.device) else {"steps timed on": plan.device}
    return ComparisonResult(
        format=FORMAT,
        title=f"{corpus.name}, preset {preset.name}" + ("" if default else f", backbone {preset.backbone}"),
        finished=not missing,
        missing=missing,
        corpus={"name": corpus.name, **corpus.info},
        metric=to_metric(0.0, corpus.unit)[0],
        preset=preset.name,
        seeds=list(seeds),
        steps=plan.steps,
        tokens_per_step=config.tokens_per_step,
        settings={**shared, "dropout": preset.shape.dropout, "n_threads": here["threads"]},
        backbone=preset.backbone,
        model={name: value for name, value in model.to_json().items() if name in _MODEL_FACTS},
        environment={**here, **timed_elsewhere},
        curve_tokens=config.eval_tokens,
        evaluated_tokens=plan.evaluated,
        equal_time_s=_equal_time(plan),
        budget_s=plan.budget_s,
        methods=[_row(candidate, comparison, plan, layers) for candidate in comparison.candidates],
    )


def _equal_time(plan: Plan) -> float:
    """Training time of the fastest method."""
    return min(plan.step_s.values()) * plan.steps


def _row(candidate: MatchedMethod, comparison: Comparison, plan: Plan, layers: LayerTimes) -> MethodResult:
    config, preset, unit = candidate.config, comparison.preset, comparison.corpus.unit
    n_tokens, step_s = preset.batch * preset.context, plan.step_s[candidate.label]
    own, dense = (count_block(block, n_tokens=n_tokens) for block in (config, preset.block(DenseConfig)))
    time, dense_time = layers[candidate.label], layers[DENSE]
    runs = {seed: comparison.run_folder(candidate.label, seed) for seed in comparison.settings.seeds}
    results = {seed: TrainResult.read(folder.result_path) for seed, folder in runs.items() if folder.result_path.exists()}
    losses = {split: {seed: getattr(result, split) for seed, result in results.items()} for split in ("valid", "test")}
    curves = [_read_curve(folder, seed, step_s, unit) for seed, folder in runs.items()]
    usage = _usage(next(iter(runs.values())))
    sparse = config.active_channels < config.n_channels
    return MethodResult(
        label=candidate.label,
        method=config.name,
        config=config.to_json(),
        total_params=candidate.model.num_params(),
        active_params=candidate.model.active_params(),
        ffn_params=own.total_params,
        residual_params=candidate.match.residual,
        residual_percent=candidate.match.residual_percent,
        active_channels=config.active_channels,
        marks=[*candidate.marks, *_too_large(losses, unit)],
        ffn_flops_vs_dense=own.forward_flops / dense.forward_flops,
        ffn_flops_convention=config.active_channels / config.n_channels,
        saved_bytes_vs_dense=own.saved_bytes / dense.saved_bytes,
        layer_time_forward_vs_dense=time.forward_s / dense_time.forward_s,
        layer_time_training_vs_dense=time.training_s / dense_time.training_s,
        step_time_s=step_s,
        tokens_per_s=n_tokens / step_s,
        valid=_spread(losses["valid"], unit),
        test=_spread(losses["test"], unit),
        valid_at_equal_time=_at_time(curves, _equal_time(plan)),
        dead_share=usage.dead_share if usage and config.unit == "experts" else None,
        unit=config.unit,
        curves=curves,
        usage=usage.usage if usage and sparse else None,
        active=usage.active if usage and not sparse else None,
        cooccurrence=usage.cooccurrence if usage else None,
    )


def _finite_metric(nats: float, unit: Unit) -> float | None:
    """A loss in the corpus's metric; None for a perplexity that is too large for a number."""
    value = to_metric(nats, unit)[1]
    return value if value <= _LARGEST_METRIC else None


def _read_curve(folder: RunFolder, seed: int, step_s: float, unit: Unit) -> Curve:
    """Validation points and thinned-out training losses, in the corpus's metric; a step takes `step_s` on the time axis."""
    points, training = [], []
    for record in folder.read_metrics():
        step, time_s = record["step"], record["step"] * step_s
        if "valid" in record:
            points.append(ValidPoint(step=step, time_s=time_s, valid=_finite_metric(record["valid"], unit)))
        else:
            loss = _finite_metric(record["loss"], unit)
            training.append(TrainPoint(step=step, time_s=time_s, loss=loss, balance_loss=record["balance_loss"]))
    every = max(1, -(-len(training) // MAX_TRAIN_POINTS))
    return Curve(seed=seed, points=points, train=training[::every])


def _usage(folder: RunFolder) -> UsageCounts | None:
    """Counted usage; None where the run was not finished."""
    path = folder.path / "usage.json"
    if not path.exists():
        return None
    return read(path, UsageCounts, fix="remove the file and run the same command again, which counts anew")


def _spread(losses: Mapping[int, float], unit: Unit) -> MeanStd | None:
    """In the corpus's metric; None where no run is finished, or where a number would be too large."""
    values = [value for nats in losses.values() if (value := _finite_metric(nats, unit)) is not None]
    return mean_std(values) if len(values) == len(losses) else None


def _too_large(losses: Mapping[str, Mapping[int, float]], unit: Unit) -> list[str]:
    """A mark for what `_spread` leaves out."""
    large = [
        f"{split} of seed {seed}, {nats:.0f} nats"
        for split, by_seed in losses.items()
        for seed, nats in by_seed.items()
        if _finite_metric(nats, unit) is None
    ]
    return [f"a perplexity is too large for a number: {', '.join(large)}"] if large else []


def _at_time(curves: Sequence[Curve], seconds: float) -> float | None:
    """Mean over seeds of the validation curve at a time, linear between its points; None where a run is not so far."""
    values = []
    for curve in curves:
        points = [(point.time_s, point.valid) for point in curve.points if point.valid is not None]
        if not points or points[-1][0] < seconds * (1 - 1e-9):
            return None
        times, losses = zip(*points, strict=True)
        values.append(float(np.interp(seconds, times, losses)))
    return statistics.fmean(values) if values else None
