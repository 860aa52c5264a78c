"""Errors that end a run from below, said as a user needs them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from sparseffn.devices import memory_there
from sparseffn.errors import UserError
from sparseffn.models import ModelConfig
from sparseffn.training.config import TrainConfig
from sparseffn.training.layout import Layout
from sparseffn.training.planned_memory import memory_plan
from sparseffn.training.planner import in_bytes, largest_batch, plan

# What no plan has: fragments of the allocator, and PyTorch's own code and state (a process that has imported it holds 0.4 GB,
# one with a CUDA context about half a GB of the GPU).
_USABLE_SHARE, _LIBRARIES = 0.9, 0.5e9


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


def out_of_memory(
    config: TrainConfig, model: ModelConfig, device: str, step: int, last_good: Path | str, layout: Layout | None = None
) -> UserError:
    """Nothing is left for a step or an evaluation; what the batch was planned to take, and how the same batch needs less.

    `layout` says how the run is spread over devices, of this one's type; None: it is not.
    """
    where = torch.device(device)
    layout = dataclasses.replace(layout or Layout(), device_type=where.type)
    # Processes of one machine share its memory, but not a GPU's.
    there = memory_there(where) // (1 if where.type == "cuda" else layout.gpus)
    batch = layout.micro_batch(config)
    peak = memory_plan(model, batch, layout, accumulation=config.accumulation).peak
    smaller = _smaller(config, model, layout, usable=_USABLE_SHARE * there - _LIBRARIES)
    asked = f"{batch.n_streams} streams of {config.context} tokens and {model.num_params():,} parameters"
    return UserError(
        f"steps and evaluation must fit the memory of {device}; got no more of it after step {step}, with {asked}: a step is "
        f"planned to take {in_bytes(peak)}, and {in_bytes(there)} are there; fix: {smaller} in a new --out, or more memory. "
        f"Last good checkpoint: {last_good}"
    )


def _smaller(config: TrainConfig, model: ModelConfig, layout: Layout, *, usable: float) -> str:
    """The fewest micro-batches that are planned to fit, or where one stream at a time does not, a smaller batch."""
    streams = config.batch // layout.gpus
    for parts in range(config.accumulation + 1, streams + 1):
        if streams % parts == 0:
            peak = plan(model, dataclasses.replace(config, accumulation=parts), layout).memory.peak
            if peak <= usable:
                return f"--accumulation {parts} (the batch in parts of {config.batch // parts}, planned {in_bytes(peak)})"
    fits = largest_batch(model, config, layout, usable)
    return f"--batch {fits} (the largest that is planned to fit)" if 0 < fits < config.batch else "a smaller --context"
