"""Expert products on `torch.nn.functional.grouped_mm`, PyTorch's own product of sorted rows with one matrix a group.

A backend for comparison, taken only by name: gathering, scaling and the sum over a token's rows are separate steps, and
PyTorch supports few dtypes and widths. Signatures: see `_torch_kernels.py`. Shapes: see ops/README.md.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseffn.errors import UserError
from sparseffn.ops._compose import compose_expert_mlp
from sparseffn.ops.backends import Backend, Kernel

# What PyTorch 2.13 documents for CUDA, and what it was found to compute on the CPU.
_DTYPES = {"cuda": (torch.bfloat16,), "cpu": (torch.float32, torch.bfloat16, torch.float16)}

# PyTorch wants rows to start at multiples of so many bytes.
_ROW_BYTES = 16


def grouped_mm_backend() -> Backend:
    """The backend `grouped_mm`, for CPUs and for GPUs from compute capability 8.0."""
    kernels: dict[str, Kernel] = {
        "expert_up": expert_up,
        "expert_up_backward": expert_up_backward,
        "expert_down": expert_down,
        "expert_down_backward": expert_down_backward,
    }
    kernels |= compose_expert_mlp(kernels)
    return Backend(name="grouped_mm", kernels=kernels, unavailable=_unavailable, automatic=False)


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


def _ends(offsets: Tensor) -> Tensor:
    return offsets[1:].int()


def _sum_rows(rows_RD: Tensor, tokens_R: Tensor, n_tokens: int) -> Tensor:
    """Sum of each token's rows in float32; the order is fixed under `torch.use_deterministic_algorithms`."""
    total_TD = rows_RD.new_zeros(n_tokens, rows_RD.shape[1], dtype=torch.float32)
    return total_TD.index_add_(0, tokens_R, rows_RD.float()).to(rows_RD.dtype)


def expert_up(x: Tensor, weight: Tensor, tokens: Tensor, offsets: Tensor) -> Tensor:
    """See `ops.expert_up`."""
    _check(x, weight)
    return F.grouped_mm(x.index_select(0, tokens), weight.contiguous(), offs=_ends(offsets))


def expert_up_backward(grad: Tensor, x: Tensor, weight: Tensor, tokens: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the expert matrices."""
    _check(x, weight)
    grad_RG, ends, back = grad.contiguous(), _ends(offsets), weight.contiguous().transpose(1, 2)
    grad_x = _sum_rows(F.grouped_mm(grad_RG, back, offs=ends), tokens, x.shape[0])
    return grad_x, F.grouped_mm(x.index_select(0, tokens).t(), grad_RG, offs=ends)


def expert_down(a: Tensor, weight: Tensor, gates: Tensor, tokens: Tensor, offsets: Tensor, n_tokens: int) -> Tensor:
    """See `ops.expert_down`."""
    _check(a, weight)
    scaled_RG = (a * gates[:, None]).to(a.dtype).contiguous()
    return _sum_rows(F.grouped_mm(scaled_RG, weight.contiguous(), offs=_ends(offsets)), tokens, n_tokens)


def expert_down_backward(
    grad: Tensor, a: Tensor, weight: Tensor, gates: Tensor, tokens: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the activations, of the expert matrices and of the gates."""
    _check(a, weight)
    grad_RD, ends, back = grad.index_select(0, tokens), _ends(offsets), weight.contiguous().transpose(1, 2)
    grad_scaled = F.grouped_mm(grad_RD, back, offs=ends)
    scaled_RG = (a * gates[:, None]).to(a.dtype).contiguous()
    grad_weight = F.grouped_mm(scaled_RG.t(), grad_RD, offs=ends)
    grad_gates = (grad_scaled.to(gates.dtype) * a.to(gates.dtype)).sum(dim=1)
    return (grad_scaled * gates[:, None]).to(a.dtype), grad_weight, grad_gates
