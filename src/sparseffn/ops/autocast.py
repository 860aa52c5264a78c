"""What autocast does to the inputs of our operations: the same as it does to those of `nn.Linear`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def has_autocast(device_type: str) -> bool:
    """Whether PyTorch knows autocast on a kind of device; it does not on `meta`."""
    # Before torch 2.13 its compiler cannot trace the question; what it compiles for has autocast.
    return device_type != "meta" if torch.compiler.is_compiling() else torch.amp.is_autocast_available(device_type)


def no_autocast(device_type: str) -> AbstractContextManager[object]:
    """Where products are computed in the dtypes of their inputs."""
    return torch.autocast(device_type, enabled=False) if has_autocast(device_type) else nullcontext()


def to_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where it is on; float64 and integers are left alone, as PyTorch leaves them."""
    device_type = tensors[0].device.type
    if not has_autocast(device_type) or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)
