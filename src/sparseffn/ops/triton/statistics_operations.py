"""`routing_counts` and `batch_entropy` on Triton kernels; arguments as in the schemas of ops/counts.py. Two launches each.

Shapes: see ops/README.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparseffn.ops import counts as plain
from sparseffn.ops.triton import statistics_kernels
from sparseffn.ops.triton.launch import FUSION, device_of, start
from sparseffn.ops.triton.tuning import cdiv, next_power_of_2

# Tokens of a block at 32 units, units and blocks that are looked at at once, numbers that a program holds of a block.
TOKENS, UNITS, BLOCKS, HELD = 64, 32, 32, 2048
# Value tables have too many units for sums of every block.
_MOST_UNITS = 4096


def routing_counts(indices: Tensor, weights: Tensor, n_units: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `ops.counts.routing_counts`."""
    if n_units > _MOST_UNITS or weights.dtype == torch.float64:
        return plain.routing_counts_plain(indices, weights, n_units)
    indices, weights = indices.contiguous(), weights.contiguous()
    n_tokens, k = indices.shape
    n_blocks, floats = cdiv(n_tokens, TOKENS), weights.new_empty(0, dtype=torch.float32)
    counts, sums = indices.new_empty(n_blocks * n_units, dtype=torch.int32), floats.new_empty(n_blocks * n_units)
    totals, out, active = indices.new_empty(n_units + 2), floats.new_empty(n_units), indices.new_empty(n_tokens)
    block_e = min(UNITS, next_power_of_2(n_units + 2))
    with device_of(indices):
        sizes = {"N_UNITS": n_units, "BLOCK_E": block_e, **FUSION}
        arguments = (indices, weights, counts, sums, active, n_tokens)
        blocks = {"BLOCK_T": TOKENS, "BLOCK_K": next_power_of_2(k)}
        start(statistics_kernels.selection_counts_kernel, n_blocks, *arguments, K=k, **blocks, **sizes)
        arguments = (counts, sums, totals, out, n_tokens, n_blocks)
        start(statistics_kernels.selection_totals_kernel, cdiv(n_units + 2, block_e), *arguments, BLOCK_B=BLOCKS, **sizes)
    return totals, out, active


def batch_entropy(logits: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """See `ops.counts.batch_entropy`."""
    return batch_entropy_kept(logits, mask, scale)[0]


def batch_entropy_kept(logits: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """The loss and the logarithms of the shares, which backward reads."""
    if logits.dtype != torch.float32 or logits.shape[0] == 0:
        return plain.batch_entropy_kept(logits, mask, scale)
    logits = logits.contiguous()
    (n_tokens, n_experts), (block_t, block_e) = logits.shape, _held(logits)
    n_blocks = cdiv(n_tokens, block_t)
    sums, loss, log_shares = logits.new_empty(n_blocks * (n_experts + 1)), logits.new_empty(()), logits.new_empty(n_experts)
    with device_of(logits):
        sizes = {"N_EXPERTS": n_experts, "BLOCK_E": block_e, **FUSION}
        arguments = (logits, None if mask is None else mask.contiguous(), sums, n_tokens)
        start(statistics_kernels.entropy_shares_kernel, n_blocks, *arguments, BLOCK_T=block_t, **sizes)
        arguments = (sums, loss, log_shares, n_blocks, float(scale))
        start(statistics_kernels.entropy_fwd_kernel, 1, *arguments, BLOCK_B=max(1, HELD // block_e), **sizes)
    return loss, log_shares


def batch_entropy_backward(grad_loss: Tensor, logits: Tensor, mask: Tensor | None, scale: float, log_shares: Tensor) -> Tensor:
    """Gradient of the logits."""
    if logits.dtype != torch.float32 or logits.shape[0] == 0:
        return plain.batch_entropy_backward(grad_loss, logits, mask, scale, log_shares)
    logits, grad = logits.contiguous(), torch.empty_like(logits, memory_format=torch.contiguous_format)
    (n_tokens, n_experts), (block_t, block_e) = logits.shape, _held(logits)
    with device_of(logits):
        masked = None if mask is None else mask.contiguous()
        arguments = (grad_loss.contiguous(), logits, masked, log_shares.contiguous(), grad, n_tokens, float(scale))
        sizes = {"N_EXPERTS": n_experts, "BLOCK_T": block_t, "BLOCK_E": block_e, "BLOCK_M": HELD, **FUSION}
        start(statistics_kernels.entropy_bwd_kernel, cdiv(n_tokens, block_t), *arguments, **sizes)
    return grad


def _held(logits: Tensor) -> tuple[int, int]:
    """Tokens and experts of a block."""
    block_e = next_power_of_2(logits.shape[1])
    return max(1, min(TOKENS, HELD // block_e)), block_e
