"""`routing_counts` and the balancing losses on Triton kernels; arguments as in the schemas of ops/counts.py and
ops/balance_losses.py. Two launches each forward, one backward.

Shapes: see ops/README.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparseffn.ops import balance_losses
from sparseffn.ops import counts as plain
from sparseffn.ops.triton import statistics_kernels
from sparseffn.ops.triton.launch import FUSION, device_of, start, whole
from sparseffn.ops.triton.tuning import cdiv, next_power_of_2

# Tokens of a block at 32 units, units and blocks that are looked at at once, numbers that a program holds of a block.
TOKENS, UNITS, BLOCKS, HELD = 64, 32, 32, 2048
# Selections of a program that only looks up, and the most blocks of a loss.
ROWS, BLOCKS_OF_LOSS = 1024, 256
# Value tables have too many units for sums of every block.
_MOST_UNITS = 4096


def routing_counts(indices: Tensor, weights: Tensor, n_units: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `ops.counts.routing_counts`; of float64 weights and of very many units by the composition."""
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
    """See `ops.counts.batch_entropy`; of other dtypes than float32 by the composition."""
    return batch_entropy_kept(logits, mask, scale)[0]


def batch_entropy_kept(logits: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """The loss and its slopes over the shares, which backward reads."""
    if logits.dtype != torch.float32 or logits.shape[0] == 0:
        return plain.batch_entropy_kept(logits, mask, scale)
    logits = logits.contiguous()
    n_experts, (block_t, block_e) = logits.shape[1], _held(logits.shape[1])
    n_blocks = _blocks(logits.shape[0], block_t)
    sums = logits.new_empty(n_blocks * (n_experts + 1))
    with device_of(logits):
        sizes = {"N_EXPERTS": n_experts, "BLOCK_E": block_e, **FUSION}
        arguments = (logits, whole(mask), sums, logits.shape[0], n_blocks)
        start(statistics_kernels.entropy_shares_kernel, n_blocks, *arguments, BLOCK_T=block_t, **sizes)
        return _finish(statistics_kernels.entropy_fwd_kernel, sums, n_blocks, scale, sizes)


def batch_entropy_backward(grad_loss: Tensor, logits: Tensor, mask: Tensor | None, scale: float, slopes: Tensor) -> Tensor:
    """Gradient of the logits."""
    if logits.dtype != torch.float32 or logits.shape[0] == 0:
        return plain.mean_softmax_backward(grad_loss, logits, mask, scale, slopes)
    logits, grad = logits.contiguous(), torch.empty_like(logits, memory_format=torch.contiguous_format)
    (n_tokens, n_experts), (block_t, block_e) = logits.shape, _held(logits.shape[1])
    with device_of(logits):
        arguments = (grad_loss.contiguous(), logits, whole(mask), slopes.contiguous(), grad, n_tokens, float(scale))
        sizes = {"N_EXPERTS": n_experts, "BLOCK_T": block_t, "BLOCK_E": block_e, "BLOCK_M": HELD, **FUSION}
        start(statistics_kernels.shares_bwd_kernel, cdiv(n_tokens, block_t), *arguments, **sizes)
    return grad


def switch_balance(logits: Tensor, indices: Tensor, weights: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """See `ops.switch_balance`; of other dtypes than float32 by the composition."""
    return switch_balance_kept(logits, indices, weights, mask, scale)[0]


def switch_balance_kept(
    logits: Tensor, indices: Tensor, weights: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The loss and its slopes over the shares."""
    if logits.dtype != torch.float32 or logits.shape[0] == 0:
        return balance_losses.switch_kept(logits, indices, weights, mask, scale)
    logits, (n_tokens, k) = logits.contiguous(), indices.shape
    n_experts, (block_t, block_e) = logits.shape[1], _held(logits.shape[1])
    n_blocks = _blocks(n_tokens, block_t)
    sums = logits.new_empty(n_blocks * (2 * n_experts + 1))
    with device_of(logits):
        sizes = {"N_EXPERTS": n_experts, "BLOCK_E": block_e, **FUSION}
        arguments = (logits, whole(mask), indices.contiguous(), weights.contiguous(), sums, n_tokens, n_blocks)
        start(statistics_kernels.switch_shares_kernel, n_blocks, *arguments, K=k, BLOCK_T=block_t, **sizes)
        return _finish(statistics_kernels.switch_fwd_kernel, sums, n_blocks, scale, sizes)


# Both losses depend on the logits through the mean of their softmax.
switch_balance_backward = batch_entropy_backward


def load_variation(weights: Tensor, indices: Tensor, n_experts: int, scale: float) -> Tensor:
    """See `ops.load_variation`; of other dtypes than float32 by the composition."""
    return load_variation_kept(weights, indices, n_experts, scale)[0]


def load_variation_kept(weights: Tensor, indices: Tensor, n_experts: int, scale: float) -> tuple[Tensor, Tensor]:
    """The loss and its slopes over the loads."""
    if weights.dtype != torch.float32 or weights.numel() == 0:
        return balance_losses.variation_kept(weights, indices, n_experts, scale)
    n_tokens, k = indices.shape
    block_t, block_e = _held(n_experts)
    n_blocks = _blocks(n_tokens, block_t)
    sums = weights.new_empty(n_blocks * n_experts)
    with device_of(weights):
        sizes = {"N_EXPERTS": n_experts, "BLOCK_E": block_e, **FUSION}
        arguments = (weights.contiguous(), indices.contiguous(), sums, n_tokens, n_blocks)
        start(statistics_kernels.load_sums_kernel, n_blocks, *arguments, K=k, BLOCK_T=block_t, **sizes)
        least = {"LEAST": balance_losses.LEAST_SQUARE}
        return _finish(statistics_kernels.load_fwd_kernel, sums, n_blocks, scale, {**sizes, **least})


def load_variation_backward(grad_loss: Tensor, weights: Tensor, indices: Tensor, slopes: Tensor) -> Tensor:
    """Gradient of the weights."""
    if weights.dtype != torch.float32 or weights.numel() == 0:
        return balance_losses.variation_backward(grad_loss, weights, indices, slopes)
    grad = torch.empty_like(weights, memory_format=torch.contiguous_format)
    with device_of(weights):
        arguments = (grad_loss.contiguous(), indices.contiguous(), slopes.contiguous(), grad, indices.numel())
        sizes = {"N_EXPERTS": slopes.shape[0], "BLOCK_R": ROWS, **FUSION}
        start(statistics_kernels.load_bwd_kernel, cdiv(indices.numel(), ROWS), *arguments, **sizes)
    return grad


def _finish(kernel: Any, sums: Tensor, n_blocks: int, scale: float, sizes: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """A loss and its slopes from the blocks' sums, by one program."""
    loss, slopes = sums.new_empty(()), sums.new_empty(sizes["N_EXPERTS"])
    start(kernel, 1, sums, loss, slopes, n_blocks, float(scale), BLOCK_B=max(1, HELD // sizes["BLOCK_E"]), **sizes)
    return loss, slopes


def _held(n_experts: int) -> tuple[int, int]:
    """Tokens and experts of a tile."""
    block_e = next_power_of_2(n_experts)
    return max(1, min(TOKENS, HELD // block_e)), block_e


def _blocks(n_tokens: int, block_t: int) -> int:
    """Blocks that tiles of tokens are dealt out to: of many experts a tile has few, and one program adds up all blocks."""
    return min(BLOCKS_OF_LOSS, cdiv(n_tokens, block_t))
