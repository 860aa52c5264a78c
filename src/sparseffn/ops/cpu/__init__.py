"""The compiled backend of the CPU: the C++ of `csrc`, which PyTorch's dispatcher finds. Compiled at first use."""

from __future__ import annotations

import torch

from sparseffn.ops.backends import Backend


def cpu_backend() -> Backend:
    """The backend; nothing is compiled until one of its kernels is asked for."""
    return Backend(name="cpu", unavailable=_unavailable)


def _unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    from sparseffn.ops.cpu import build

    if device.type != "cpu":
        return "it is the CPU's"
    if dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        return f"it computes in float32, float64, bfloat16 and float16, not in {dtype}"
    return build.unavailable()
