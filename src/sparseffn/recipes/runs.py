"""One run of a comparison: its hyperparameters and its folder."""

from __future__ import annotations

import re
from pathlib import Path

from sparseffn.models.presets import Preset
from sparseffn.recipes.plan import CURVE_POINTS, CURVE_TOKENS, Plan
from sparseffn.train import TrainConfig


def train_config(preset: Preset, plan: Plan, seed: int) -> TrainConfig:
    """Hyperparameters of every run of a comparison."""
    every = max(1, plan.steps // CURVE_POINTS)
    return TrainConfig(
        steps=plan.steps,
        batch=preset.batch,
        context=preset.context,
        memory=preset.memory,
        eval_memory=preset.eval_memory,
        eval_batch=preset.eval_batch,
        lr=preset.lr,
        warmup=min(preset.warmup, plan.steps // 10),
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
