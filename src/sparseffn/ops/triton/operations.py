"""The operations on Triton kernels, as `__init__.py` looks them up: weighted rows and a row's K largest here.

Shapes: see ops/README.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparseffn.ops.columns import check_topk, topk_eager
from sparseffn.ops.triton import DTYPES, choice, sums
from sparseffn.ops.triton.balancing_operations import over_capacity, sinkhorn
from sparseffn.ops.triton.cvmm_operations import cvmm, cvmm_backward, cvmm_kept
from sparseffn.ops.triton.expert_operations import experts, experts_backward, experts_kept
from sparseffn.ops.triton.launch import CHOICE_BLOCK, check_tensors, device_of, row_blocks, segments, start, sum_options
from sparseffn.ops.triton.router_operations import (
    choose,
    choose_backward,
    choose_kept,
    route,
    route_backward,
    route_kept,
    router_logits,
    router_logits_backward,
    router_logits_kept,
)
from sparseffn.ops.triton.statistics_operations import (
    batch_entropy,
    batch_entropy_backward,
    batch_entropy_kept,
    load_variation,
    load_variation_backward,
    load_variation_kept,
    routing_counts,
    switch_balance,
    switch_balance_backward,
    switch_balance_kept,
)
from sparseffn.ops.triton.tuning import cdiv

# The most that are taken from a row one by one, each in a pass over it, and the longest row that one program goes through, 34
# times. Neither was measured: a device decides.
_MOST_IN_ORDER, _LONGEST_ROW = 64, 16384

__all__ = [
    "batch_entropy",
    "batch_entropy_backward",
    "batch_entropy_kept",
    "choose",
    "choose_backward",
    "choose_kept",
    "cvmm",
    "cvmm_backward",
    "cvmm_kept",
    "experts",
    "experts_backward",
    "experts_kept",
    "load_variation",
    "load_variation_backward",
    "load_variation_kept",
    "over_capacity",
    "route",
    "route_backward",
    "route_kept",
    "router_logits",
    "router_logits_backward",
    "router_logits_kept",
    "routing_counts",
    "sinkhorn",
    "switch_balance",
    "switch_balance_backward",
    "switch_balance_kept",
    "topk",
    "weighted_rows",
    "weighted_rows_backward",
]


def weighted_rows(values: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """See `ops.weighted_rows`; the weights are used as they come, not rounded to the dtype of the values."""
    check_tensors(values=values, indices=indices, weights=weights)
    indices, weights = indices.contiguous(), weights.contiguous()
    (n_tokens, n_k), (n_values, n_width) = indices.shape, values.shape
    out, options = values.new_empty(n_tokens, n_width), sum_options(n_width)
    with device_of(values):
        pointers, n_programs = (values, indices, weights, out), n_tokens * cdiv(n_width, options["BLOCK_D"])
        start(sums.weighted_rows_fwd_kernel, n_programs, *pointers, n_values, n_k, n_width, *values.stride(), **options)
    return out


def weighted_rows_kept(values: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Backward needs nothing but the arguments."""
    return weighted_rows(values, indices, weights)


def weighted_rows_backward(
    grad_y: Tensor, values: Tensor, indices: Tensor, weights: Tensor, needed: Sequence[bool] | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of the value table and of the weights, those that are needed."""
    of_values, of_weights = needed or (True, True)
    check_tensors(grad_y=grad_y, values=values, indices=indices, weights=weights)
    indices, weights = indices.contiguous(), weights.contiguous()
    (n_tokens, n_k), (n_values, n_width) = indices.shape, values.shape
    grad_values = values.new_empty((n_values, n_width) if of_values else 0)
    grad_weights = weights.new_empty(n_tokens, n_k) if of_weights else values.new_empty(0)
    options = sum_options(n_width)
    with device_of(values):
        if of_weights:
            pointers, n_programs = (grad_y, values, indices, grad_weights), n_tokens * cdiv(n_k, options["BLOCK_J"])
            strides = (*grad_y.stride(), *values.stride())
            start(sums.weighted_rows_bwd_weights_kernel, n_programs, *pointers, n_values, n_k, n_width, *strides, **options)
        if of_values:
            order, starts = segments(indices.flatten(), n_values)
            pointers, n_programs = (grad_y, weights, order, starts, grad_values), n_values * cdiv(n_width, options["BLOCK_D"])
            start(sums.weighted_rows_bwd_values_kernel, n_programs, *pointers, n_k, n_width, *grad_y.stride(), **options)
    return grad_values, grad_weights


def topk(scores: Tensor, k: int, ordered: bool) -> Tensor:
    """See `ops.topk`; of long rows, many in order and other dtypes, PyTorch's."""
    check_topk(scores, k, ordered)
    n = scores.shape[-1]
    is_long = n > CHOICE_BLOCK or k > _MOST_IN_ORDER if ordered else n > _LONGEST_ROW
    if is_long or scores.dtype not in DTYPES:
        return topk_eager(scores, k, ordered)
    rows = scores.contiguous()
    indices = rows.new_empty(*rows.shape[:-1], k, dtype=torch.int64)
    sizes, n_rows = {"N": n, "K": k, **row_blocks(n)}, rows.numel() // n
    with device_of(rows):
        kernel = choice.ordered_topk_kernel if ordered else choice.topk_kernel
        start(kernel, cdiv(n_rows, sizes["BLOCK_R"]), rows, indices, n_rows, **sizes)
    return indices
