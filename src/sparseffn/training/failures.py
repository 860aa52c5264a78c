"""Errors that end a run from below, said as a user needs them."""

from __future__ import annotations

from pathlib import Path

import torch

from sparseffn.errors import UserError
from sparseffn.models import ModelConfig
from sparseffn.training.config import TrainConfig


def stopped_by_device(first: int, last: int, last_good: Path | str) -> UserError:
    """An assertion failed on the device between two steps; nothing in this process can use it any more."""
    return UserError(
        f"the device must go on; got an assertion at step {first} to {last}, most likely of a router whose scores "
        "became NaN or infinite; fix: lower lr or raise warmup in a new --out, in a new process. "
        f"Last good checkpoint: {last_good}"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ended; the allocator of the CPU has no error of its own."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def out_of_memory(config: TrainConfig, model: ModelConfig, device: str, step: int, last_good: Path | str) -> UserError:
    """Nothing is left for a step or an evaluation; how the same batch needs less."""
    parts = next((n for n in range(config.accumulation + 1, config.batch + 1) if config.batch % n == 0), None)
    smaller = f"--accumulation {parts} (the batch in parts of {config.batch // parts})" if parts else "a smaller --context"
    streams = config.batch // config.accumulation
    return UserError(
        f"steps and evaluation must fit the memory of {device}; got no more of it after step {step}, with {streams} streams of "
        f"{config.context} tokens and {model.num_params():,} parameters; fix: {smaller} in a new --out, or more memory. "
        f"Last good checkpoint: {last_good}"
    )
