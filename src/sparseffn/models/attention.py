"""Attention with relative positions (Dai 2019, arXiv 1901.02860), and plain attention to compare its speed with.

Query i of a window sees the M positions of the memory and its own past: key j <= M + i, at distance M + i - j.

    score[i, j] = scale ((q_i + u) . k_j + (q_i + v) . r_{M + i - j}),  r_d = W_r sinusoid(d)

Suffixes: B batch, L queries, S = M + L keys, N = S + 1 distances, H heads, C head size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseffn.models.model_config import TransformerXLConfig
from sparseffn.models.relative_mix import future_mask, relative_mix

# Wavelengths of the sinusoids reach 2 pi times this (Vaswani 2017, section 3.5).
_BASE = 10000.0


def sinusoids(distances: Tensor, d_model: int) -> Tensor:
    """Sines, then cosines, of each distance at d_model / 2 frequencies: `[n] -> [n, d_model]`."""
    half = torch.arange(0, d_model, 2, device=distances.device, dtype=torch.float32)
    angles = distances.float()[:, None] / _BASE ** (half / d_model)
    return torch.cat((angles.sin(), angles.cos()), dim=1)[:, :d_model]


class Attention(nn.Module, ABC):
    """Attention of a window over the memory and itself; subclasses say how positions enter."""

    def __init__(self, config: TransformerXLConfig) -> None:
        super().__init__()
        self.n_heads, self.d_head, self.d_model = config.n_heads, config.d_head, config.d_model
        width = config.n_heads * config.d_head
        self.query = nn.Linear(config.d_model, width, bias=False)
        self.key = nn.Linear(config.d_model, width, bias=False)
        self.value = nn.Linear(config.d_model, width, bias=False)
        self.output = nn.Linear(width, config.d_model, bias=False)

    @abstractmethod
    def mix(
        self, q_BLHC: Tensor, k_BSHC: Tensor, v_BSHC: Tensor, *, r_NHC: Tensor | None = None, padding_BS: Tensor | None = None
    ) -> Tensor:
        """The attended values, `[B, L, H, C]`.

        `r_NHC` are the position keys of the distances S - 1, ..., -1 where they are known already; `padding_BS` is True for
        keys that nobody but themselves may see.
        """

    def heads(self, x: Tensor) -> Tensor:
        """`[B, n, H C] -> [B, n, H, C]`."""
        return x.unflatten(-1, (self.n_heads, self.d_head))

    def project(self, context_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a context, `[B, S, H, C]` each."""
        return self.heads(self.key(context_BSD)), self.heads(self.value(context_BSD))

    def attend(
        self, x_BLD: Tensor, k_BSHC: Tensor, v_BSHC: Tensor, *, r_NHC: Tensor | None = None, padding_BS: Tensor | None = None
    ) -> Tensor:
        """Attend from `x` to keys and values, the last L of which are its own; see `mix`."""
        mixed = self.mix(self.heads(self.query(x_BLD)), k_BSHC, v_BSHC, r_NHC=r_NHC, padding_BS=padding_BS)
        return self.output(mixed.flatten(-2))

    def forward(self, x_BLD: Tensor, context_BSD: Tensor, padding_BS: Tensor | None = None) -> Tensor:
        """Attend from `x` to `context`, whose last L positions are x itself."""
        return self.attend(x_BLD, *self.project(context_BSD), padding_BS=padding_BS)


@final
class RelativeAttention(Attention):
    """Transformer-XL's attention; `content_bias` is u, `position_bias` v, `scale` a learned scalar."""

    def __init__(self, config: TransformerXLConfig) -> None:
        super().__init__(config)
        self.position = nn.Linear(config.d_model, config.n_heads * config.d_head, bias=False)
        self.content_bias = nn.Parameter(torch.zeros(config.n_heads, config.d_head))
        self.position_bias = nn.Parameter(torch.zeros(config.n_heads, config.d_head))
        self.scale = nn.Parameter(torch.tensor(config.d_head**-0.5))

    def position_keys(self, distances: Tensor) -> Tensor:
        """r of each distance, `[n, H, C]`."""
        return self.heads(self.position(sinusoids(distances, self.d_model).to(self.position.weight.dtype)))

    def mix(
        self, q_BLHC: Tensor, k_BSHC: Tensor, v_BSHC: Tensor, *, r_NHC: Tensor | None = None, padding_BS: Tensor | None = None
    ) -> Tensor:
        if r_NHC is None:
            # Descending, and one more than there are: the extra column makes the shift a view.
            r_NHC = self.position_keys(torch.arange(k_BSHC.shape[1] - 1, -2, -1, device=q_BLHC.device))
        dtype = q_BLHC.dtype
        scale = self.scale.to(dtype)
        content = (q_BLHC + self.content_bias.to(dtype)) * scale
        position = (q_BLHC + self.position_bias.to(dtype)) * scale
        keys, positions, values = k_BSHC.to(dtype), r_NHC.to(dtype), v_BSHC.to(dtype)
        return relative_mix(content, position, keys, positions, values, padding_BS=padding_BS)


@final
class PlainAttention(Attention):
    """`scaled_dot_product_attention` over the same keys with an explicit mask, blind to positions: a baseline for speed."""

    def mix(
        self, q_BLHC: Tensor, k_BSHC: Tensor, v_BSHC: Tensor, *, r_NHC: Tensor | None = None, padding_BS: Tensor | None = None
    ) -> Tensor:
        past = ~future_mask(q_BLHC.shape[1], k_BSHC.shape[1], q_BLHC.device)
        if padding_BS is not None:
            itself = past & ~past.tril(k_BSHC.shape[1] - q_BLHC.shape[1] - 1)
            past = (past & ~padding_BS[:, None, None]) | itself
        q, k, v = q_BLHC.transpose(1, 2), k_BSHC.transpose(1, 2), v_BSHC.transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=past).transpose(1, 2)
