"""Settings of a training run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from sparseffn.devices import Precision
from sparseffn.errors import UserError
from sparseffn.ffn import option
from sparseffn.ffn.options import check_fields, from_fields
from sparseffn.models.presets import Preset

CURVE_POINTS, CURVE_TOKENS = 12, 8192
"""Points of a run's validation curve after its start, and the first tokens of validation that each uses."""


# More fields than a layer has, since these are the hyperparameters that a paper's table prints in one column.
@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Hyperparameters, shared by all methods of a comparison."""

    steps: Annotated[int, option("Optimiser steps.", low=1)]
    batch: Annotated[int, option("Streams read in parallel.", low=1)] = 32
    context: Annotated[int, option("Tokens of a window.", low=1)] = 256
    memory: Annotated[int, option("Hidden states of earlier windows that are attended to.", low=0)] = 256
    eval_memory: Annotated[int, option("The same in evaluation; the paper uses 4 x context.", low=0)] = 1024
    eval_batch: Annotated[int, option("Streams that a split is cut into in evaluation.", low=1)] = 8
    lr: Annotated[float, option("Peak learning rate.", low=0.0)] = 2.5e-4
    warmup: Annotated[int, option("Steps of linear warm-up.", low=0)] = 0
    clip: Annotated[float, option("Largest gradient norm.", low=1e-12)] = 0.25
    optimizer: Annotated[Literal["adam", "adamw"], option("Adam, or AdamW with decoupled weight decay.")] = "adam"
    weight_decay: Annotated[float, option("Weight decay.", low=0.0)] = 0.0
    accumulation: Annotated[int, option("Micro-batches of a step; batch-wide quantities are per micro-batch.", low=1)] = 1
    precision: Annotated[Precision, option("float32, or autocast to bfloat16 or float16 (with a scaled loss).")] = "float32"
    seed: Annotated[int, option("Seed of parameters and of dropout.", low=0)] = 0
    eval_every: Annotated[int, option("Steps between points of the validation curve.", low=1)] = 1000
    eval_tokens: Annotated[int, option("First tokens of validation that a point of the curve uses.", low=2)] = 65536
    checkpoint_every: Annotated[int, option("Steps between checkpoints.", low=1)] = 1000

    def __post_init__(self) -> None:
        check_fields(self)
        if self.batch % self.accumulation:
            raise UserError(
                f"`batch` must be a multiple of accumulation = {self.accumulation}; got {self.batch}; fix: change one"
            )

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one step learns from."""
        return self.batch * self.context

    @property
    def evaluation(self) -> dict[str, Any]:
        """How a run's model is evaluated, as arguments of `evaluate`."""
        return {"batch": self.eval_batch, "context": self.context, "memory": self.eval_memory, "precision": self.precision}

    @property
    def notes(self) -> tuple[str, ...]:
        """What one must know of these settings to read a run's numbers."""
        if self.accumulation == 1:
            return ()
        n_streams = self.batch // self.accumulation
        size = f"{n_streams} stream{'s' if n_streams > 1 else ''}"
        return (f"balancing losses and batch-wide routing are per micro-batch of {size}",)

    def lr_at(self, step: int) -> float:
        """Learning rate of a step counted from 0: linear warm-up, then cosine decay to 0 at the last step's end."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TrainConfig:
        """The config that `to_json` wrote.

        Raises:
            UserError: a field is unknown, missing or out of range.
        """
        return from_fields(cls, data, owner="a training config", what="training option")


def from_preset(preset: Preset, *, steps: int | None = None, seed: int = 0, **overrides: Any) -> TrainConfig:
    """The training settings of a preset: what `train`, `compare` and the paper's runs all use.

    A tenth of the steps (None: the preset's own) bounds the warm-up; `overrides` are other fields of `TrainConfig`.

    Raises:
        UserError: a field is unknown or out of range.
    """
    steps = preset.steps if steps is None else steps
    every = max(1, steps // CURVE_POINTS)
    shared = ("batch", "context", "memory", "eval_memory", "eval_batch", "lr", "clip")
    settings = {
        **{name: getattr(preset, name) for name in shared},
        "steps": steps,
        "warmup": min(preset.warmup, steps // 10),
        "seed": seed,
        "eval_every": every,
        "eval_tokens": CURVE_TOKENS,
        # Two points of the curve are what an interruption can cost.
        "checkpoint_every": 2 * every,
    }
    return TrainConfig.from_json({**settings, **overrides})
