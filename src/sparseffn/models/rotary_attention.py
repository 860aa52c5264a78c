"""Grouped-query attention (Ainslie 2023, arXiv 2305.13245) with rotary positions (Su 2021, arXiv 2104.09864).

    q'[p] = R(p) q[p],  k'[p] = R(p) k[p];  o[i] = sum over j <= i of softmax_j(q'[i] . k'[j] / sqrt(C)) v[j]

R(p) rotates the pair (c, c + C/2) of a head by the angle `p base^(-2c/C)`, so that a score depends on the distance alone. Each
head of keys and values serves H / n_kv_heads heads of queries.

Suffixes: B batch, L queries, S keys, H heads, C head size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseffn.errors import UserError
from sparseffn.models.decoder_config import DecoderConfig


class KeyValueCache(Protocol):
    """Keys and values of earlier positions, layer by layer; transformers' caches are such ones."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, /) -> tuple[Tensor, Tensor]:
        """Add those of a window, `[B, n_kv_heads, L, C]`; returns what there now is, `[B, n_kv_heads, S, C]`."""
        ...

    def get_seq_length(self) -> int | Tensor:
        """Positions seen so far."""
        ...


@final
class RecentKeysValues:
    """A cache with which a token sees `length` positions, itself included; older ones are forgotten."""

    def __init__(self, length: int) -> None:
        self.length, self.seen = length, 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, /) -> tuple[Tensor, Tensor]:
        """See `KeyValueCache`."""
        keys, values = key_states, value_states
        if layer_idx in self._layers:
            past_keys, past_values = self._layers[layer_idx]
            keys, values = torch.cat((past_keys, keys), dim=2), torch.cat((past_values, values), dim=2)
        # What the first token of the next window sees beside itself.
        kept = slice(max(0, keys.shape[2] - self.length + 1), None)
        self._layers[layer_idx] = keys[:, :, kept], values[:, :, kept]
        if layer_idx == 0:
            self.seen += key_states.shape[2]
        return keys, values

    def get_seq_length(self) -> int:
        """See `KeyValueCache`."""
        return self.seen


@dataclass(slots=True)
class Window:
    """What all layers share of one call."""

    cos: Tensor
    """`[B or 1, 1, L, C / 2]`."""
    sin: Tensor
    start: int
    """Positions before the window."""
    mask_BL: Tensor | None
    """The window's part of the mask."""
    mask_BS: Tensor | None
    """False for padding, among all positions seen."""
    _visible: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        x_BLD: Tensor,
        config: DecoderConfig,
        *,
        mask: Tensor | None,
        positions: Tensor | None,
        cache: KeyValueCache | None,
    ) -> Window:
        """Of embedded tokens; see `Decoder.forward`."""
        # Some of transformers' caches return the counter itself, which `update` advances.
        n_tokens, start = x_BLD.shape[1], 0 if cache is None else int(cache.get_seq_length())
        if mask is not None and (mask.shape != (x_BLD.shape[0], start + n_tokens) or mask.dtype != torch.bool):
            raise UserError(
                f"`mask` must be bool [batch, length] of all positions so far, {(x_BLD.shape[0], start + n_tokens)}; got "
                f"{mask.dtype} {tuple(mask.shape)}; fix: True for tokens, False for padding, those in the cache included"
            )
        if positions is None:
            positions = torch.arange(start, start + n_tokens, device=x_BLD.device)[None]
        cos, sin = rotations(positions, config.d_head, config.rope_base, x_BLD.dtype)
        return cls(cos, sin, start, None if mask is None else mask[:, start:], mask)

    def causal(self, n_queries: int, n_keys: int) -> bool:
        """Whether query i sees the keys up to the i-th, and all there is to know is that."""
        return self.mask_BS is None and n_queries == n_keys

    def visible(self, n_queries: int, n_keys: int) -> Tensor | None:
        """bool `[B or 1, 1, L, S]`; None: every query sees every key. The last position of the keys is the window's last, or
        comes after it in a cache that has its final size from the start.
        """
        if self.mask_BS is None and n_queries == 1 and n_keys <= self.start + 1:
            return None
        if n_keys not in self._visible:
            self._visible[n_keys] = self._which_are_visible(n_queries, n_keys)
        return self._visible[n_keys]

    def _which_are_visible(self, n_queries: int, n_keys: int) -> Tensor:
        seen, device = self.start + n_queries, self.cos.device
        # Of a cache that forgets, the last keys are left.
        first = max(0, seen - n_keys)
        queries, keys = torch.arange(self.start, seen, device=device), torch.arange(first, first + n_keys, device=device)
        visible = (keys <= queries[:, None])[None, None]
        if self.mask_BS is None:
            return visible
        tokens_BS = F.pad(self.mask_BS[:, first:], (0, max(0, n_keys - seen)))
        # Padding sees itself: a query that sees nothing has no softmax.
        return (visible & tokens_BS[:, None, None]) | (keys == queries[:, None])


def rotations(positions: Tensor, d_head: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of each position's angles, `[B, L] -> [B, 1, L, C / 2]` each."""
    wide = torch.promote_types(dtype, torch.float32)
    half = torch.arange(0, d_head, 2, device=positions.device, dtype=wide) / d_head
    angles = positions[:, None, :, None].to(wide) * base**-half
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x_BHLC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """R(p) x for each position."""
    a, b = x_BHLC.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


@final
class GroupedQueryAttention(nn.Module):
    """Attention of a window to itself and to what is cached; `place` is the layer's in the cache."""

    def __init__(self, config: DecoderConfig, place: int) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.d_head, self.place = config.n_heads, config.n_kv_heads, config.d_head, place
        self.query = nn.Linear(config.d_model, config.n_heads * config.d_head, bias=False)
        self.key = nn.Linear(config.d_model, config.n_kv_heads * config.d_head, bias=False)
        self.value = nn.Linear(config.d_model, config.n_kv_heads * config.d_head, bias=False)
        self.output = nn.Linear(config.n_heads * config.d_head, config.d_model, bias=False)

    def forward(self, x_BLD: Tensor, window: Window, cache: KeyValueCache | None) -> Tensor:
        """The attended values; the cache takes up the window's keys and values."""
        q, k, v = (self.heads(project(x_BLD)) for project in (self.query, self.key, self.value))
        # Layers may be spread over devices.
        cos, sin = window.cos.to(q), window.sin.to(q)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.update(k, v, self.place)
        n_queries, n_keys = q.shape[2], k.shape[2]
        causal = window.causal(n_queries, n_keys)
        visible = None if causal else window.visible(n_queries, n_keys)
        visible = None if visible is None else visible.to(q.device)
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, is_causal=causal, enable_gqa=self.n_heads != self.n_kv_heads
        )
        return self.output(mixed.transpose(1, 2).flatten(2))

    def heads(self, x: Tensor) -> Tensor:
        """`[B, L, n C] -> [B, n, L, C]`."""
        return x.unflatten(-1, (-1, self.d_head)).transpose(1, 2)
