"""One run of a comparison: its hyperparameters, its folder, its curve at a time, the usage of its blocks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sparseffn.analysis import UsageCounter
from sparseffn.data import Corpus
from sparseffn.evaluation import evaluate
from sparseffn.models import TransformerXL
from sparseffn.models.presets import Preset
from sparseffn.storage import write_json
from sparseffn.training import TrainConfig, from_preset
from sparseffn.training.config import CURVE_TOKENS

# Tokens of validation that usage is counted on.
USAGE_TOKENS = 16 * CURVE_TOKENS


def train_config(preset: Preset, steps: int, seed: int) -> TrainConfig:
    """Hyperparameters of every run of a comparison.

    Raises:
        UserError: one of them is out of range.
    """
    return from_preset(preset, steps=steps, seed=seed)


def run_path(out: Path, label: str, seed: int) -> Path:
    """Folder of one run."""
    return out / "runs" / re.sub(r"[^A-Za-z0-9=.,_-]+", "_", label) / f"seed-{seed}"


def valid_at(points: Sequence[tuple[float, float]], seconds: float) -> float:
    """A curve of (seconds, value) at a time: linear between its points, the nearest one before the first and after the last."""
    times, values = zip(*points, strict=True)
    return float(np.interp(seconds, times, values))


def count_usage(model: TransformerXL, config: TrainConfig, corpus: Corpus, folder: Path) -> UsageCounter:
    """Count the usage of the feedforward blocks on the first tokens of validation, and write it to `usage.json`."""
    counter = UsageCounter()
    evaluate(
        model,
        corpus.valid,
        batch=config.eval_batch,
        context=config.context,
        memory=config.eval_memory,
        max_tokens=USAGE_TOKENS,
        observe=counter.observe,
    )
    write_json(folder / "usage.json", counter.result())
    return counter
