"""Routing statistics of one forward pass."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace

import torch
import torch.utils.checkpoint
from torch import Tensor

from sparseffn import ops
from sparseffn.errors import UserError
from sparseffn.ops import BatchGroup, Selection


@dataclass(frozen=True, slots=True)
class Routed:
    """What a layer's computation leaves for its statistics; nothing is computed from it unless they are asked for."""

    units: Selection | Tensor
    """The selection, or dense coefficients `[T, n_units]` where every unit is computed."""
    balance: Callable[[], Tensor] | None = None
    """The balancing loss, weight included; None for a method without one."""
    dropped: Tensor | None = None
    """int64 scalar: selections lost to a capacity limit."""


@dataclass(frozen=True, slots=True)
class RoutingStats:
    """What one forward pass selected. All but `balance_loss` are outside the autograd graph."""

    n_tokens: Tensor
    """int64 scalar: tokens, without padding."""
    counts: Tensor
    """int64 `[n_units]`: tokens that selected each unit with a non-zero weight."""
    weights: Tensor
    """float `[n_units]`: sum over tokens of the absolute weights of each unit."""
    active: Tensor
    """int64 `[T]`: units that each token selected with a non-zero weight."""
    balance_loss: Tensor
    """Scalar to add to the loss and minimise, its weight included; 0 for a method without one."""
    dropped: Tensor
    """int64 scalar: selections lost to a capacity limit."""
    selection: Selection | None
    """Who selected what; None where every unit is computed."""

    @property
    def entropy(self) -> Tensor:
        """Entropy in nats of the units' shares of the selection weight; at most log n_units, when all are alike."""
        share = self.weights / self.weights.sum().clamp_min(torch.finfo(self.weights.dtype).tiny)
        return torch.special.entr(share).sum()


def routing_stats(routed: Routed, mask_T: Tensor | None, n_tokens: int, group: BatchGroup | None = None) -> RoutingStats:
    """Statistics of one forward pass; padded tokens do not count, those of all processes of a group do.

    What is computed here is kept out of activation checkpointing: its few tensors are saved, not recomputed, so that a
    recomputation that does not ask for statistics still saves the same tensors.
    """
    # Inside torch.compile the trace must not meet hooks; checkpointed regions are traced as a whole there.
    if torch.compiler.is_compiling():
        return _measure(routed, mask_T, n_tokens, group)
    _refuse_reentrant_checkpoint()
    with ExitStack() as stack:
        # Transforms of torch.func take no hooks; there is no checkpointing in them.
        with suppress(RuntimeError):
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x))
        return _measure(routed, mask_T, n_tokens, group)


def _measure(routed: Routed, mask_T: Tensor | None, n_tokens: int, group: BatchGroup | None) -> RoutingStats:
    units = routed.units
    if isinstance(units, Selection):
        counts, sums, active, tokens, zero = _counted(units, n_tokens)
        selection = units.detach()
    else:
        dense = units.detach() if mask_T is None else units.detach() * mask_T[:, None]
        used = dense != 0
        counts, active, sums, selection = used.sum(0), used.sum(1), dense.abs().float().sum(0), None
        tokens, zero = counts.new_full((), n_tokens), counts.new_zeros(())
    stats = RoutingStats(
        n_tokens=tokens if mask_T is None else mask_T.sum(),
        counts=counts,
        weights=sums,
        active=active,
        balance_loss=sums.new_zeros(()) if routed.balance is None else routed.balance(),
        dropped=zero if routed.dropped is None else routed.dropped,
        selection=selection,
    )
    return stats if group is None else _of_all(stats, group)


def _of_all(stats: RoutingStats, group: BatchGroup) -> RoutingStats:
    """Numbers of all processes, in one collective; float64 holds the counts exactly."""
    own = torch.cat((stats.counts, stats.n_tokens[None], stats.dropped[None])).double()
    total = group.sum(torch.cat((own, stats.weights.double())))
    counts, (n_tokens, dropped), weights = total.split((len(stats.counts), 2, len(stats.weights)))
    return replace(
        stats,
        n_tokens=n_tokens.long(),
        counts=counts.long(),
        weights=weights.to(stats.weights.dtype),
        dropped=dropped.long(),
    )


def _counted(units: Selection, n_tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Counts and summed weights of the units, units of each token, the number of tokens, and zero."""
    if units.k is not None:
        shape = (n_tokens, units.k)
        totals, sums, active = ops.routing_counts(units.indices.view(shape), units.weights.view(shape), units.n_units)
        # Views of one tensor, which one launch writes.
        return totals[: units.n_units], sums, active, totals[units.n_units], totals[units.n_units + 1]
    weights = units.weights.detach().abs()
    weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
    used, shape = (weights != 0).long(), (units.n_units,)
    counts = used.new_zeros(shape).scatter_add(0, units.indices, used)
    sums = weights.new_zeros(shape).scatter_add(0, units.indices, weights)
    active = used.new_zeros(n_tokens).scatter_add(0, units.tokens(), used)
    return counts, sums, active, counts.new_full((), n_tokens), counts.new_zeros(())


def _refuse_reentrant_checkpoint() -> None:
    """Raise inside a re-entrant checkpoint: it runs without gradient, so the balancing loss would have none."""
    if torch.is_grad_enabled():
        return
    code = torch.utils.checkpoint.CheckpointFunction.forward.__code__
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is code:
            raise UserError(
                "routing statistics need activation checkpointing with `use_reentrant=False`; got re-entrant "
                "checkpointing, under which the balancing loss has no gradient; fix: checkpoint(..., use_reentrant=False)"
            )
        frame = frame.f_back
