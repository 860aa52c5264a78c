"""Experts that lie on several processes: rows go to the ranks of their experts, and what these make of them comes back.

    sort a rank's selections by expert         rank r owns experts r E / W up to (r + 1) E / W
    tell each rank how many rows come          all-to-all of E counts
    send the rows, compute, send back          two all-to-alls with uneven splits, two more backward
    y[t] = sum_k gates[t, k] out[t, k]         at home, in the order of the tokens

A selection whose gate is exactly 0 (expert dropout, capacity, padding) is not sent. Shapes: see ops/README.md; W ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sparseffn.ops.batch_group import sum_over
from sparseffn.ops.experts import experts

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Sent(NamedTuple):
    """Selections of this rank's tokens, sorted by expert, and rows that pass between it and each rank."""

    rows_R: Tensor
    """int64: places in the flattened `[T, K]`."""
    to_ranks: list[int]
    from_ranks: list[int]
    experts_S: Tensor
    """int64: of each row that arrives the expert, counted from this rank's first."""


def dispatched_experts(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: Tensor,
    indices: Tensor,
    group: ProcessGroup | None,
    *,
    replicas: ProcessGroup | None = None,
    gate_keys: Tensor | None = None,
    activation: str = "relu",
    dropout: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`ops.experts` over the tokens of this rank and the experts of all ranks of a group.

    All ranks must call it together, forward and backward, those without tokens too. Gradients of this rank's experts are sums
    over the tokens of all ranks, those of `replicas` too, divided by their number: of the mean of the ranks' losses, as are the
    gradients that DDP averages.

    Args:
        x: `[T, D]`, T may differ between ranks and be 0.
        keys: `[E / W, D, G]`, those of this rank's experts.
        values: `[E / W, G, D]`.
        gates: `[T, K]`, as `experts` takes them.
        indices: int64 `[T, K]`, 0 to E - 1.
        group: the ranks; None: all.
        replicas: ranks that hold this rank's experts too, one of each group; None: there is one group.
        gate_keys: `[E / W, D, G]`.
        activation: as `experts` knows them.
        dropout: rate at which hidden units are removed.
        dtype: what the experts compute in, that of `x`; their gradients are averaged in their own. None: they are of one.

    Returns:
        `[T, D]`, as `experts` does.
    """
    size, k = dist.get_world_size(group), indices.shape[1]
    sent = _exchange_counts(gates, indices, len(keys), group)
    tokens_R = sent.rows_R // k
    rows_SD = _AllToAll.apply(x.index_select(0, tokens_R), sent.to_ranks, sent.from_ranks, group)
    own_keys, own_values = (_MeanGradient.apply(weight, size, replicas).to(dtype or weight.dtype) for weight in (keys, values))
    own_gate_keys = None if gate_keys is None else _MeanGradient.apply(gate_keys, size, replicas).to(own_keys.dtype)
    ones_S1, experts_S1 = gates.new_ones(len(rows_SD), 1), sent.experts_S[:, None]
    out_SD = experts(
        rows_SD, own_keys, own_values, ones_S1, experts_S1, gate_keys=own_gate_keys, activation=activation, dropout=dropout
    )
    out_RD = _AllToAll.apply(out_SD, sent.from_ranks, sent.to_ranks, group)
    weighted_RD = out_RD.to(gates.dtype) * gates.flatten()[sent.rows_R][:, None]
    return weighted_RD.new_zeros(x.shape).index_add(0, tokens_R, weighted_RD).to(out_RD.dtype)


@torch.no_grad()
def _exchange_counts(gates_TK: Tensor, indices_TK: Tensor, n_own: int, group: ProcessGroup | None) -> Sent:
    """What goes where; the one place where a GPU is waited for."""
    size = dist.get_world_size(group)
    rows = (gates_TK != 0).flatten().nonzero()[:, 0]
    experts_R, order = indices_TK.flatten()[rows].sort(stable=True)
    sent_E = torch.bincount(experts_R, minlength=size * n_own)
    received_E = torch.empty_like(sent_E)
    dist.all_to_all_single(received_E, sent_E, group=group)
    to_ranks, from_ranks = torch.stack((sent_E, received_E)).view(2, size, n_own).sum(dim=2).tolist()
    # Rows arrive rank after rank, and of each rank expert after expert.
    experts_S = torch.arange(n_own, device=rows.device).repeat(size).repeat_interleave(received_E)
    return Sent(rows[order], to_ranks, from_ranks, experts_S)


class _AllToAll(torch.autograd.Function):
    """Rows, sorted by the rank that they go to; comes back as rows sorted by the rank that they came from."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, to_ranks: list[int], from_ranks: list[int], group: ProcessGroup | None) -> Tensor:
        ctx.way_back = from_ranks, to_ranks, group
        received = x.new_empty(sum(from_ranks), *x.shape[1:])
        dist.all_to_all_single(received, x.contiguous(), from_ranks, to_ranks, group)
        return received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _AllToAll.apply(grad, *ctx.way_back), None, None, None


class _MeanGradient(torch.autograd.Function):
    """A weight; its gradient is the mean over the ranks of all replicas, of which those of one are added up already."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, size: int, replicas: ProcessGroup | None) -> Tensor:
        ctx.size, ctx.replicas = size, replicas
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.replicas is None:
            return grad / ctx.size, None, None
        return sum_over(grad, ctx.replicas) / (ctx.size * dist.get_world_size(ctx.replicas)), None, None
