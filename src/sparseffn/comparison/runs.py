"""One run of a comparison: its folder, its curve, and the usage of its blocks."""

from __future__ import annotations

import re
from pathlib import Path

from sparseffn.analysis import UsageCounter
from sparseffn.data import Corpus, Unit, to_metric
from sparseffn.evaluation import evaluate
from sparseffn.models import TransformerXL
from sparseffn.results.comparison_result import Curve, TrainPoint, ValidPoint
from sparseffn.storage import write_json
from sparseffn.training import RunFolder, TrainConfig
from sparseffn.training.config import CURVE_TOKENS

# Tokens of validation that usage is counted on.
USAGE_TOKENS = 16 * CURVE_TOKENS
# Points of the training curve on the page.
MAX_TRAIN_POINTS = 200
# Below the largest float by what the sum over seeds needs.
_LARGEST_METRIC = 1e300


def run_path(out: Path, label: str, seed: int) -> Path:
    """Folder of one run."""
    return out / "runs" / re.sub(r"[^A-Za-z0-9=.,_-]+", "_", label) / f"seed-{seed}"


def count_usage(model: TransformerXL, config: TrainConfig, corpus: Corpus, folder: Path) -> UsageCounter:
    """Count the usage of the feedforward blocks on the first tokens of validation, and write it to `usage.json`."""
    counter = UsageCounter()
    evaluate(
        model,
        corpus.valid,
        batch=config.eval_batch,
        context=config.context,
        memory=config.eval_memory,
        precision=config.precision,
        max_tokens=USAGE_TOKENS,
        observe=counter.observe,
    )
    write_json(folder / "usage.json", counter.result())
    return counter


def finite_metric(nats: float, unit: Unit) -> float | None:
    """A loss in the corpus's metric; None for a perplexity that is too large for a number."""
    value = to_metric(nats, unit)[1]
    return value if value <= _LARGEST_METRIC else None


def read_curve(folder: RunFolder, seed: int, step_s: float, unit: Unit) -> Curve:
    """Validation points and thinned-out training losses, in the corpus's metric.

    Args:
        folder: the run.
        seed: of the run.
        step_s: what a step takes on the time axis.
        unit: of the corpus.
    """
    points, training = [], []
    for record in folder.read_metrics():
        step, time_s = record["step"], record["step"] * step_s
        if "valid" in record:
            points.append(ValidPoint(step=step, time_s=time_s, valid=finite_metric(record["valid"], unit)))
        else:
            loss = finite_metric(record["loss"], unit)
            training.append(TrainPoint(step=step, time_s=time_s, loss=loss, balance_loss=record["balance_loss"]))
    every = max(1, -(-len(training) // MAX_TRAIN_POINTS))
    return Curve(seed=seed, points=points, train=training[::every])
