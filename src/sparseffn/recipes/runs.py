"""One run of a comparison: its hyperparameters and its folder."""

from __future__ import annotations

import re
from pathlib import Path

from sparseffn.models.presets import Preset
from sparseffn.recipes.plan import CURVE_POINTS, CURVE_TOKENS
from sparseffn.train import TrainConfig


def train_config(preset: Preset, steps: int, seed: int) -> TrainConfig:
    """Hyperparameters of every run of a comparison.

    Raises:
        UserError: one of them is out of range.
    """
    every = max(1, steps // CURVE_POINTS)
    return TrainConfig(
        steps=steps,
        batch=preset.batch,
        context=preset.context,
        memory=preset.memory,
        eval_memory=preset.eval_memory,
        eval_batch=preset.eval_batch,
        lr=preset.lr,
        warmup=min(preset.warmup, steps // 10),
        clip=preset.clip,
        seed=seed,
        eval_every=every,
        eval_tokens=CURVE_TOKENS,
        # Two points of the curve, a minute or so in the demonstration, are what an interruption can cost.
        checkpoint_every=2 * every,
    )


def run_path(out: Path, label: str, seed: int) -> Path:
    """Folder of one run."""
    return out / "runs" / re.sub(r"[^A-Za-z0-9=.,_-]+", "_", label) / f"seed-{seed}"
