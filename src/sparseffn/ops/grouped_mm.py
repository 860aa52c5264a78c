"""Expert products on `torch.nn.functional.grouped_mm`, PyTorch's own product of sorted rows with one matrix a group.

A backend for comparison, taken only by name: gathering, scaling and the sum over a token's rows are separate steps, and
PyTorch supports few dtypes and widths. Shapes: see ops/README.md.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseffn.errors import UserError
from sparseffn.ops.backends import Backend, Kernel
from sparseffn.ops.experts import experts_sorted

# What PyTorch 2.13 documents for CUDA, and what it was found to compute on the CPU.
_DTYPES = {"cuda": (torch.bfloat16,), "cpu": (torch.float32, torch.bfloat16, torch.float16)}

# PyTorch wants rows to start at multiples of so many bytes.
_ROW_BYTES = 16


def grouped_mm_backend() -> Backend:
    """The backend `grouped_mm`, for CPUs and for GPUs from compute capability 8.0."""
    functions: dict[str, Kernel] = {"experts": functools.partial(experts_sorted, grouped_product)}
    return Backend(name="grouped_mm", functions=functions, unavailable=_unavailable, automatic=False)


def _unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    if not hasattr(F, "grouped_mm"):
        return f"torch.nn.functional.grouped_mm came with PyTorch 2.10, this is {torch.__version__}"
    if device.type not in _DTYPES:
        return f"torch.nn.functional.grouped_mm has no kernel for {device.type}"
    if dtype not in _DTYPES[device.type]:
        return f"it computes in {', '.join(map(str, _DTYPES[device.type]))} there, not in {dtype}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "torch.nn.functional.grouped_mm needs compute capability 8.0"
    return None


def _check(x: Tensor, weight: Tensor) -> None:
    multiple = _ROW_BYTES // x.element_size()
    if any(width % multiple for width in weight.shape[1:]):
        raise UserError(
            f"`weight` must have widths that are multiples of {multiple} for backend 'grouped_mm' in {x.dtype}; "
            f"got {tuple(weight.shape)}; fix: use backend 'auto'"
        )


def grouped_product(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Products of rows sorted by expert.

    Raises:
        UserError: a width is no multiple of 16 bytes.
    """
    _check(rows, weight)
    return F.grouped_mm(rows, weight.contiguous(), offs=offsets[1:].int())
