"""`sinkhorn` and `over_capacity` on Triton kernels; arguments as in the schemas of ops/balance.py and ops/capacity.py.

A launch a round of Sinkhorn and one more; one for a capacity. Shapes: see ops/README.md.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparseffn.ops.balance import check_sinkhorn, sinkhorn_plain
from sparseffn.ops.capacity import check_capacity, over_capacity_plain
from sparseffn.ops.triton import balancing
from sparseffn.ops.triton.launch import FUSION, device_of, start, whole
from sparseffn.ops.triton.tuning import cdiv, next_power_of_2

# Tokens that a program of Sinkhorn sees at once at 32 experts, numbers that it holds, stretches that the tokens are cut into at
# most, and those that are added up at once. None was measured: a device decides.
TOKENS, HELD, PARTS, TERMS = 64, 2048, 128, 32
# Selections that an expert's queue is searched by, and the most experts whose terms fit into registers.
QUEUE = 1024
_MOST_EXPERTS = 2048


def sinkhorn(scores: Tensor, mask: Tensor | None, n_rounds: int, sign: float) -> Tensor:
    """See `ops.sinkhorn`; of other dtypes and of very many experts by the composition."""
    check_sinkhorn(scores, mask, n_rounds, sign)
    *sequences, n_tokens, n_experts = scores.shape
    if scores.dtype != torch.float32 or n_experts > _MOST_EXPERTS or 0 in (*scores.shape, n_rounds):
        return sinkhorn_plain(scores, mask, n_rounds, sign)
    rows, balanced = scores.contiguous(), torch.empty_like(scores, memory_format=torch.contiguous_format)
    block_e = next_power_of_2(n_experts)
    block_t = max(1, min(TOKENS, HELD // block_e))
    n_sequences, n_blocks = math.prod(sequences), cdiv(n_tokens, block_t)
    n_parts = min(PARTS, n_blocks)
    blocks = {"BLOCK_T": block_t, "BLOCK_E": block_e, "BLOCK_B": max(1, min(TERMS, HELD // block_e))}
    sizes = {"N_EXPERTS": n_experts, **blocks, **FUSION}
    terms: Tensor | None = None
    with device_of(rows):
        for _ in range(n_rounds):
            before, terms = terms, rows.new_empty(n_sequences, n_parts, 2 * n_experts + 1)
            arguments = (rows, whole(mask), before, terms, n_tokens, n_parts)
            start(balancing.sinkhorn_round_kernel, n_sequences * n_parts, *arguments, SIGN=sign, **sizes)
        arguments = (rows, terms, balanced, n_tokens, n_parts, n_blocks)
        start(balancing.sinkhorn_fwd_kernel, n_sequences * n_blocks, *arguments, **sizes)
    return balanced


def over_capacity(indices: Tensor, weights: Tensor, n_experts: int, factor: float, mask: Tensor | None = None) -> Tensor:
    """See `ops.over_capacity`; a program follows an expert's queue. Of float64 weights by the composition."""
    check_capacity(indices, weights, n_experts, factor, mask)
    if weights.dtype == torch.float64 or indices.numel() == 0:
        return over_capacity_plain(indices, weights, n_experts, factor, mask)
    over = torch.empty_like(indices, dtype=torch.bool, memory_format=torch.contiguous_format)
    with device_of(indices):
        arguments = (indices.contiguous(), weights.contiguous(), whole(mask), over, indices.shape[0], indices.numel())
        sizes = {"FACTOR": float(factor * indices.shape[1]), "N_EXPERTS": n_experts, "BLOCK_R": QUEUE, **FUSION}
        start(balancing.over_capacity_kernel, n_experts, *arguments, **sizes)
    return over
