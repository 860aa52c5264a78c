"""Places in the queues of experts that take a limited number of tokens (Switch, arXiv 2101.03961).

Shapes: see ops/README.md.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparseffn.errors import UserError
from sparseffn.ops._checks import check_indices, require_one_device, require_tensors
from sparseffn.ops.backends import call
from sparseffn.ops.batch_group import BatchGroup
from sparseffn.ops.library import define


def check_capacity(indices: Tensor, weights: Tensor, n_experts: int, factor: float, mask: Tensor | None = None) -> None:
    """That they fit together; raises as `over_capacity` documents."""
    if indices.dim() != 2 or weights.shape != indices.shape or indices.dtype != torch.int64 or n_experts < 1:
        raise UserError(
            f"`indices` must be int64 [T, K], `weights` alike and `n_experts` at least 1; got {indices.dtype} "
            f"{tuple(indices.shape)}, {tuple(weights.shape)} and {n_experts}; fix: flatten leading dimensions first"
        )
    if not weights.is_floating_point():
        raise UserError(f"`weights` must be floating; got {weights.dtype}; fix: cast them")
    if not (math.isfinite(factor) and factor >= 0):
        raise UserError(f"`factor` must be a number of at least 0; got {factor}; fix: pass the capacity factor times k")
    if mask is not None and (mask.shape != indices.shape[:1] or mask.dtype != torch.bool):
        raise UserError(
            f"`mask` must be bool, one a token, shape {tuple(indices.shape[:1])}; "
            f"got {mask.dtype} in shape {tuple(mask.shape)}; fix: flatten it, compare with 0"
        )
    require_one_device(indices, weights, mask)
    check_indices(indices, "an expert", n_experts)


def over_capacity_plain(
    indices: Tensor, weights: Tensor, n_experts: int, factor: float, mask: Tensor | None = None, group: BatchGroup | None = None
) -> Tensor:
    """By PyTorch's operations; also where other processes hold a part of the batch."""
    n_tokens: float | Tensor = indices.shape[0] if mask is None else mask.sum().double()
    if group is not None:
        n_tokens = group.sum(torch.as_tensor(n_tokens, dtype=torch.float64, device=indices.device))
    capacity = factor * n_tokens / n_experts
    # Q: a queue for each expert, and one for missing selections, which wait for none.
    missing_TK = weights.detach() <= 0
    queue_R1 = indices.masked_fill(missing_TK, n_experts).view(-1, 1)
    waits_RQ = queue_R1 == torch.arange(n_experts + 1, device=queue_R1.device)
    places_RQ = waits_RQ.cumsum(dim=0)
    if group is not None:
        # Tokens of the processes before this one come first.
        places_RQ = places_RQ + group.before(waits_RQ.sum(dim=0))
    return (places_RQ.gather(1, queue_R1).view_as(indices) > capacity).masked_fill(missing_TK, value=False)


def _fake(indices, weights, n_experts, factor, mask=None):
    return indices.new_empty(indices.shape, dtype=torch.bool)


_over_capacity = define(
    "over_capacity",
    "Tensor indices, Tensor weights, int n_experts, float factor, Tensor? mask=None",
    "Tensor over",
    check=check_capacity,
    plain=over_capacity_plain,
    fake=_fake,
)


def over_capacity(
    indices: Tensor,
    weights: Tensor,
    *,
    n_experts: int,
    factor: float,
    mask: Tensor | None = None,
    group: BatchGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    """Which selections find no place where each expert takes at most `factor T / n_experts` of them, first come first served.

    Args:
        indices: int64 `[T, K]`, 0 to `n_experts` - 1; in the order of the batch, a token's selections one after the other.
        weights: `[T, K]`; a selection whose weight is not above 0 is missing: it takes no place and loses none.
        n_experts: experts, each with its own queue.
        factor: capacity factor times K.
        mask: bool `[T]`, False for tokens that are not among the T that the capacity is a share of; None: all are.
        group: the processes that the batch is spread over, whose tokens come first in the order of their ranks; None: this one.
        backend: see `ops.backends`.

    Returns:
        bool `[T, K]`; not differentiable.

    Raises:
        UserError: shapes, dtypes or devices do not fit together, `factor` is negative, or an index is that of no expert (on a
            GPU such a selection keeps its place).
    """
    require_tensors(weights=weights)
    if group is not None:
        return over_capacity_plain(indices, weights, n_experts, factor, mask, group)
    return call(_over_capacity, (indices, weights.detach(), n_experts, factor, mask), backend)
