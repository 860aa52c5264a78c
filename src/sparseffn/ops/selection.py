"""What a router returns: which units each token uses, and with which weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
