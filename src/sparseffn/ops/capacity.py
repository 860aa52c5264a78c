"""Places in the queues of experts that take a limited number of tokens (Switch, arXiv 2101.03961).

Shapes: see ops/README.md.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparseffn.errors import UserError
from sparseffn.ops._checks import check_mask, check_selections, require_tensors
from sparseffn.ops.backends import call
from sparseffn.ops.batch_group import BatchGroup
from sparseffn.ops.library import define


def check_capacity(indices: Tensor, weights: Tensor, n_experts: int, factor: float, mask: Tensor | None = None) -> None:
    """That they fit together; raises as `over_capacity` documents."""
    check_selections(indices, weights, n_experts)
    if not (math.isfinite(factor) and factor >= 0):
        raise UserError(
            f"`factor` must be a number of at least 0; got {factor}; fix: 1 gives each expert its share of the places"
        )
    check_mask(mask, indices)


def over_capacity_plain(
    indices: Tensor, weights: Tensor, n_experts: int, factor: float, mask: Tensor | None = None, group: BatchGroup | None = None
) -> Tensor:
    """By PyTorch's operations; also where other processes hold a part of the batch."""
    # A tensor in any case: beside a number places would be compared in float32, which loses some.
    n_tokens = weights.new_full((), indices.shape[0], dtype=torch.float64) if mask is None else mask.sum().double()
    if group is not None:
        n_tokens = group.sum(n_tokens)
    capacity = factor * indices.shape[1] * n_tokens / n_experts
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
    """Which selections find no place where each expert takes at most `factor K T / n_experts` of them, first come first served.

    Args:
        indices: int64 `[T, K]`, 0 to `n_experts` - 1; in the order of the batch, a token's selections one after the other.
        weights: `[T, K]`; a selection whose weight is not above 0 is missing: it takes no place and loses none.
        n_experts: experts, each with its own queue.
        factor: the capacity factor, mu in `sparseffn.ffn.switch`; 1 is what a balanced choice needs.
        mask: bool `[T]`, False for tokens that are not among the T that the capacity is a share of; None: all are.
        group: the processes that the batch is spread over, whose tokens come first in the order of their ranks; None: this one.
        backend: see `ops.backends`; over a group it is PyTorch's operations that compute.

    Returns:
        bool `[T, K]`; not differentiable.

    Raises:
        UserError: shapes, dtypes or devices do not fit together, `factor` is negative, or an index is that of no expert (on a
            GPU such a selection keeps its place).
    """
    require_tensors(weights=weights)
    if group is not None:
        check_capacity(indices, weights, n_experts, factor, mask)
        return over_capacity_plain(indices, weights, n_experts, factor, mask, group)
    return call(_over_capacity, (indices, weights.detach(), n_experts, factor, mask), backend)
