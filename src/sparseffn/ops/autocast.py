"""What autocast does to the inputs of our operations: the same as it does to those of `nn.Linear`."""

from __future__ import annotations

import torch
from torch import Tensor


def has_autocast(device_type: str) -> bool:
    """Whether PyTorch knows autocast on a kind of device; it does not on `meta`."""
    # Before torch 2.13 its compiler cannot trace the question; what it compiles for has autocast.
    return device_type != "meta" if torch.compiler.is_compiling() else torch.amp.is_autocast_available(device_type)


def is_autocast_on(device_type: str) -> bool:
    return has_autocast(device_type) and torch.is_autocast_enabled(device_type)


def to_autocast(tensor: Tensor) -> Tensor:
    """In autocast's dtype, which is on; float64 and integers are left alone, as PyTorch leaves them."""
    if not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))
