"""From the files of a comparison's runs to the numbers of its report."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparseffn.accounting import count_block
from sparseffn.comparison.matched import Contender
from sparseffn.comparison.runs import run_path, train_config, valid_at
from sparseffn.comparison.schedule import CURVE_TOKENS, Plan
from sparseffn.data import Corpus, to_metric
from sparseffn.ffn.dense import DenseConfig
from sparseffn.models.presets import Preset
from sparseffn.storage import Kind, environment, read_fields
from sparseffn.training import RunFolder, TrainResult

FORMAT = 1
# Points of the training curve on the page.
MAX_TRAIN_POINTS = 200


def comparison(
    field: Sequence[Contender],
    preset: Preset,
    corpus: Corpus,
    plan: Plan,
    seeds: Sequence[int],
    layers: Mapping[str, Mapping[str, float]],
    out: Path,
    failures: Mapping[tuple[str, int], str],
) -> dict[str, Any]:
    """What `comparison.json` holds, from the runs' files; `failures` says why a run by label and seed has no result."""
    shared = train_config(preset, plan.steps, seed=0).to_json()
    shared.pop("seed")
    equal_time = min(plan.step_s.values()) * plan.steps
    folders = {(c.label, seed): RunFolder(run_path(out, c.label, seed)) for c in field for seed in seeds}
    missing = [
        {"label": label, "seed": seed, "reason": failures.get((label, seed), "not finished")}
        for (label, seed), folder in folders.items()
        if not folder.result_path.exists()
    ]
    rows = [_row(c, preset, plan, layers, [folders[c.label, seed] for seed in seeds], corpus, equal_time) for c in field]
    return {
        "format": FORMAT,
        "title": f"{corpus.name}, preset {preset.name}",
        "finished": not missing,
        "missing": missing,
        "corpus": {"name": corpus.name, **corpus.info},
        "metric": to_metric(0.0, corpus.unit)[0],
        "preset": preset.name,
        "seeds": list(seeds),
        "steps": plan.steps,
        "tokens_per_step": preset.batch * preset.context,
        "settings": {**shared, "dropout": preset.shape.dropout, "n_threads": environment()["threads"]},
        "model": {
            "d_model": preset.shape.d_model,
            "n_layers": preset.shape.n_layers,
            "n_heads": preset.n_heads,
            "d_head": preset.d_head,
        },
        "environment": environment(),
        "curve_tokens": CURVE_TOKENS,
        "equal_time_s": equal_time,
        "budget_s": plan.budget_s,
        "methods": rows,
    }


def _row(
    contender: Contender,
    preset: Preset,
    plan: Plan,
    layers: Mapping[str, Mapping[str, float]],
    folders: Sequence[RunFolder],
    corpus: Corpus,
    equal_time: float,
) -> dict[str, Any]:
    """Everything about one method."""
    config, label = contender.config, contender.label
    n_tokens = preset.batch * preset.context
    own, dense = (
        count_block(config, n_tokens=n_tokens),
        count_block(DenseConfig.from_shape(preset.shape), n_tokens=n_tokens),
    )
    results = [TrainResult.read(f.result_path) for f in folders if f.result_path.exists()]
    step_s = plan.step_s[label]
    curves = [_curve(folder, step_s, corpus) for folder in folders]
    usage = _usage(folders[0].path / "usage.json")
    sparse = config.active_channels < config.n_channels
    return {
        "label": label,
        "method": config.name,
        "config": config.to_json(),
        "total_params": contender.model.num_params(),
        "active_params": contender.model.active_params(),
        "ffn_params": own.total_params,
        "residual_params": contender.match.residual,
        "residual_percent": contender.match.residual_percent,
        "active_channels": config.active_channels,
        "marks": list(contender.marks),
        "ffn_flops_vs_dense": own.forward_flops / dense.forward_flops,
        "ffn_flops_convention": config.active_channels / config.n_channels,
        "saved_bytes_vs_dense": own.saved_bytes / dense.saved_bytes,
        "layer_time_forward_vs_dense": layers[label]["forward_s"] / layers["(dense)"]["forward_s"],
        "layer_time_training_vs_dense": layers[label]["training_s"] / layers["(dense)"]["training_s"],
        "step_time_s": step_s,
        "tokens_per_s": n_tokens / step_s,
        "valid": _spread([to_metric(r.valid, corpus.unit)[1] for r in results]),
        "test": _spread([to_metric(r.test, corpus.unit)[1] for r in results]),
        "valid_at_equal_time": _at_time(curves, equal_time),
        "dead_share": usage.get("dead_share") if config.unit == "experts" else None,
        "unit": config.unit,
        "curves": [{"seed": int(f.path.name.removeprefix("seed-")), **c} for f, c in zip(folders, curves, strict=True)],
        "usage": usage.get("usage") if sparse else None,
        "active": usage.get("active") if not sparse else None,
        "cooccurrence": usage.get("cooccurrence"),
    }


def _usage(path: Path) -> Mapping[str, Any]:
    """Counted usage; empty where the run was not finished."""
    if not path.exists():
        return {}
    fields = {"usage": Kind.LIST, "active": Kind.LIST, "cooccurrence": Kind.ANY, "dead_share": Kind.NUMBER}
    return read_fields(path, fields, fix="remove the file and run the same command again, which counts anew")


def _spread(values: Sequence[float]) -> dict[str, Any] | None:
    """Mean and standard deviation over seeds; None where no run is finished."""
    if not values:
        return None
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "n": len(values),
    }


def _curve(folder: RunFolder, step_s: float, corpus: Corpus) -> dict[str, Any]:
    """Validation points and thinned-out training losses, in the corpus's metric."""
    points, training = [], []
    for record in folder.read_metrics():
        at = {"step": record["step"], "time_s": record["step"] * step_s}
        if "valid" in record:
            points.append({**at, "valid": to_metric(record["valid"], corpus.unit)[1]})
        else:
            loss = to_metric(record["loss"], corpus.unit)[1]
            training.append({**at, "loss": loss, "balance_loss": record["balance_loss"]})
    every = max(1, -(-len(training) // MAX_TRAIN_POINTS))
    return {"points": points, "train": training[::every]}


def _at_time(curves: Sequence[Mapping[str, Any]], seconds: float) -> float | None:
    """Mean over seeds of the validation curve at a time, linear between its points; None where a run is not so far."""
    values = []
    for curve in curves:
        points = [(point["time_s"], point["valid"]) for point in curve["points"]]
        if not points or points[-1][0] < seconds * (1 - 1e-9):
            return None
        values.append(valid_at(points, seconds))
    return statistics.fmean(values) if values else None
