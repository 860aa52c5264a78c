"""What a router returns: which units each token uses, and with which weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparseffn.errors import UserError
from sparseffn.ops._checks import check_indices
from sparseffn.ops.backends import is_traced


@dataclass(frozen=True, slots=True)
class Selection:
    """Selected units in rows sorted by token; ragged selections hold a different number of rows for each token.

    A row whose weight is exactly 0 selects nothing: it adds nothing to the output and is not counted.
    """

    indices: Tensor
    """int64 `[R]`: the unit (expert, value row, channel) of each row."""
    weights: Tensor
    """`[R]`, float32 or wider: the coefficient of each row."""
    offsets: Tensor | None
    """int64 `[T + 1]`: token t owns rows offsets[t] up to offsets[t + 1]; None where every token has `k` rows."""
    n_units: int
    """How many units there are to select from."""
    k: int | None
    """Rows of each token where all have the same number, else None."""

    @classmethod
    def fixed(cls, indices_TK: Tensor, weights_TK: Tensor, n_units: int) -> Selection:
        """A selection with the same number of rows for every token, from `[T, K]` tensors."""
        return cls(indices_TK.reshape(-1), weights_TK.reshape(-1), None, n_units, indices_TK.shape[1])

    @property
    def n_tokens(self) -> int:
        """T, the number of tokens."""
        if self.offsets is None:
            assert self.k, "a selection without offsets has k >= 1 rows a token"
            return self.indices.shape[0] // self.k
        return self.offsets.shape[0] - 1

    def tokens(self) -> Tensor:
        """int64 `[R]`: the token of each row."""
        rows = torch.arange(self.indices.shape[0], device=self.indices.device)
        if self.offsets is None:
            assert self.k, "a selection without offsets has k >= 1 rows a token"
            return rows // self.k
        return torch.searchsorted(self.offsets, rows, right=True) - 1

    def detach(self) -> Selection:
        """The same selection outside the autograd graph."""
        return Selection(self.indices, self.weights.detach(), self.offsets, self.n_units, self.k)


@dataclass(frozen=True, slots=True)
class ExpertRows:
    """Rows of a selection sorted by expert: the layout that both expert products share, from one sort."""

    order: Tensor
    """int64 `[R]`: position in the selection of each sorted row."""
    tokens: Tensor
    """int64 `[R]`: token of each sorted row."""
    offsets: Tensor
    """int64 `[E + 1]`: expert e owns sorted rows offsets[e] up to offsets[e + 1]."""
    n_tokens: int
    """T, the number of tokens."""


def sort_by_expert(selection: Selection) -> ExpertRows:
    """Sort the rows by expert, stably: rows of one expert stay in the order of their tokens.

    Raises:
        UserError: the indices are no int64 vector, or one is that of no unit.
    """
    indices = selection.indices
    if indices.dim() != 1 or indices.dtype != torch.int64:
        raise UserError(f"`indices` must be an int64 vector; got {indices.dtype} in shape {tuple(indices.shape)}; fix: cast it")
    # In a compiled graph the products look at the sorted rows.
    if not is_traced(indices):
        check_indices(indices, "a unit", selection.n_units)
    sorted_units, order = selection.indices.sort(stable=True)
    edges = torch.arange(selection.n_units + 1, device=order.device)
    offsets = torch.searchsorted(sorted_units, edges)
    return ExpertRows(order, selection.tokens()[order], offsets, selection.n_tokens)
