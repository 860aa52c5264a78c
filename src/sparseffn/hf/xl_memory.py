"""Transformer-XL's memory as a cache of transformers: what `past_key_values` is for `TransformerXLForCausalLM`.

The memory of a layer is its input at the last `memory_length` positions, detached (Dai 2019, arXiv 1901.02860). It passes
through the present projections, which get gradient from it. Where no gradient is computed, as in `generate`, their keys and
values are kept beside it, so that a token costs the projections of one position.

Suffixes as in `models.attention`: B batch, L queries, M memory, S = M + L, N distances, H heads, C head size, D d_model.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from sparseffn.errors import UserError
from sparseffn.models import RelativeAttention


@final
class _Window:
    """The last `length` positions of what is appended, along dimension 1.

    Tensors that were handed out are never written again: backward may still need them.
    """

    def __init__(self, length: int, first: Tensor) -> None:
        self.length, self.start, self.end = length, 0, 0
        self.buffer = first.new_empty(first.shape[0], 0, *first.shape[2:])

    def append(self, new_BL: Tensor) -> Tensor:
        """What was kept, and then the new; the oldest positions over `length` are forgotten afterwards."""
        n_new = new_BL.shape[1]
        if self.end + n_new > self.buffer.shape[1]:
            kept = self.kept()
            n_kept = kept.shape[1]
            # Room for as much again, so that moving what is kept is rare.
            room = n_new + max(64, min(2 * (n_kept + n_new), self.length))
            self.buffer = new_BL.new_empty(new_BL.shape[0], n_kept + room, *new_BL.shape[2:])
            self.buffer[:, :n_kept] = kept
            self.start, self.end = 0, n_kept
        self.buffer[:, self.end : self.end + n_new] = new_BL
        self.end += n_new
        whole = self.buffer[:, self.start : self.end]
        self.start = max(self.start, self.end - self.length)
        return whole

    def kept(self) -> Tensor:
        return self.buffer[:, self.start : self.end]

    def change_batch(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        self.buffer = self.buffer.index_select(0, rows.to(self.buffer.device))


@final
class XLMemoryLayer(CacheLayerMixin):
    """Memory of one layer."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self.reset()

    def reset(self) -> None:
        self.hidden: _Window | None = None
        self.projected: tuple[_Window, _Window] | None = None
        self.positions_NHC: Tensor | None = None
        self.n_seen = 0
        self.is_initialized = False

    def memory(self) -> Tensor | None:
        """`[B, M, D]`; None while it is empty."""
        return None if self.hidden is None or self.hidden.kept().shape[1] == 0 else self.hidden.kept()

    def remember(self, x_BLD: Tensor) -> None:
        """Take over a window's input of the layer."""
        if self.hidden is None:
            self.hidden, self.is_initialized = _Window(self.length, x_BLD), True
        self.hidden.append(x_BLD.detach())
        self.n_seen += x_BLD.shape[1]

    def extend(self, k_BLHC: Tensor, v_BLHC: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of memory and window, `[B, S, H, C]`."""
        if self.projected is None:
            self.projected = _Window(self.length, k_BLHC), _Window(self.length, v_BLHC)
        keys, values = self.projected
        return keys.append(k_BLHC), values.append(v_BLHC)

    def position_keys(self, attention: RelativeAttention, n_keys: int) -> Tensor:
        """Position keys of the distances n_keys - 1, ..., -1, computed again only where the table has become too short."""
        if self.positions_NHC is None or len(self.positions_NHC) < n_keys + 1:
            device = attention.position.weight.device
            self.positions_NHC = attention.position_keys(torch.arange(2 * n_keys, -2, -1, device=device))
        return self.positions_NHC[len(self.positions_NHC) - n_keys - 1 :]

    def change_batch(self, rows: Tensor) -> None:
        for window in (self.hidden, *(self.projected or ())):
            if window is not None:
                window.change_batch(rows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.change_batch(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.change_batch(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.hidden is not None:
            n_rows = self.hidden.buffer.shape[0]
            self.change_batch(torch.arange(n_rows, device=self.hidden.buffer.device).repeat_interleave(repeats))

    def get_seq_length(self) -> int:
        """Tokens seen, those that are forgotten included: what is left of a prompt is counted from it."""
        return self.n_seen

    def get_max_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        n_kept = min(self.n_seen, self.length)
        return n_kept + query_length, self.n_seen - n_kept

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the memory takes its shape from the first window."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """As `extend`, which the model calls."""
        return self.extend(key_states, value_states)

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: what the memory has forgotten cannot come back."""
        if tokens_to_remove != 0:
            raise UserError(
                f"`tokens_to_remove` must be 0 for a Transformer-XL memory; got {tokens_to_remove}; "
                "fix: start with an empty memory, or keep a copy of the one before"
            )


@final
class XLMemory(Cache):
    """Memory of all layers, to be passed as `past_key_values`; a window attends to at most `length` positions before it."""

    def __init__(self, n_layers: int, length: int) -> None:
        super().__init__(layers=[XLMemoryLayer(length) for _ in range(n_layers)])

    def of(self, layer: int) -> XLMemoryLayer:
        found = self.layers[layer]
        assert isinstance(found, XLMemoryLayer), "there are no others"
        return found
