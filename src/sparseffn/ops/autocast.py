"""What autocast does to the inputs of our operations: the same as it does to those of `nn.Linear`."""

from __future__ import annotations

import torch
from torch import Tensor


def to_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where it is on; float64 and integers are left alone, as PyTorch leaves them."""
    device_type = tensors[0].device.type
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)
