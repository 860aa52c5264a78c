"""Attention with relative positions (Dai 2019, arXiv 1901.02860), and plain attention to compare its speed with.

Query i of a window sees the M positions of the memory and its own past: key j <= M + i, at distance M + i - j.

    score[i, j] = scale ((q_i + u) . k_j + (q_i + v) . r_{M + i - j}),  r_d = W_r sinusoid(d)

Suffixes: B batch, L queries, S = M + L keys, H heads, C head size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseffn.models.config import TransformerXLConfig

# Wavelengths of the sinusoids reach 2 pi times this (Vaswani 2017, section 3.5).
_BASE = 10000.0


def sinusoids(distances: Tensor, d_model: int) -> Tensor:
    """Sines, then cosines, of each distance at d_model / 2 frequencies: `[n] -> [n, d_model]`."""
    half = torch.arange(0, d_model, 2, device=distances.device, dtype=torch.float32)
    angles = distances.float()[:, None] / _BASE ** (half / d_model)
    return torch.cat((angles.sin(), angles.cos()), dim=1)[:, :d_model]


def relative_shift(p: Tensor, n_keys: int) -> Tensor:
    """Scores by column of descending distance to scores by key, without moving data.

    Args:
        p: `[..., L, S + 1]`; column c belongs to distance S - 1 - c, the last column to none.
        n_keys: S.

    Returns:
        A view `[..., L, S]` whose entry (i, j) has distance S - L + i - j where that is not negative; the rest, the
        future, holds values of other rows and must be masked.
    """
    n_queries = p.shape[-2]
    start = n_queries - 1
    return p.flatten(-2)[..., start : start + n_queries * n_keys].unflatten(-1, (n_queries, n_keys))


def future_mask(n_queries: int, n_keys: int, device: torch.device) -> Tensor:
    """bool `[L, S]`, True where a key lies in the query's future."""
    return torch.ones(n_queries, n_keys, dtype=torch.bool, device=device).triu(n_keys - n_queries + 1)


class RelativeMix(torch.autograd.Function):
    """Softmax of content and shifted position scores over the past, times values; Z is B H.

    One function so that the `[Z, L, S]` scores are passed over as seldom as can be, which is what attention on a CPU costs:
    the position scores' gradient is written in place of being cut out, copied and padded. Measured on the 47M model's
    training step (4 x 256 tokens, memory 256, 2 cores): 1.18 times the step with plain attention, 1.43 times without it.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, content_ZLC: Tensor, position_ZLC: Tensor, k_ZSC: Tensor, r_ZNC: Tensor, v_ZSC: Tensor
    ) -> Tensor:
        """`[Z, L, C]`; `r` holds S + 1 distances, descending from S - 1 to -1."""
        n_queries, n_keys = content_ZLC.shape[1], k_ZSC.shape[1]
        shifted = relative_shift(torch.bmm(position_ZLC, r_ZNC.transpose(1, 2)), n_keys)
        scores = torch.baddbmm(shifted, content_ZLC, k_ZSC.transpose(1, 2))
        # The memory is past to every query; only the window itself has a future.
        window = scores[..., n_keys - n_queries :]
        window.masked_fill_(future_mask(n_queries, n_queries, scores.device), -torch.inf)
        weights = scores.softmax(dim=-1)
        mixed = torch.bmm(weights, v_ZSC)
        ctx.save_for_backward(content_ZLC, position_ZLC, k_ZSC, r_ZNC, v_ZSC, weights, mixed)
        return mixed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        """Gradients of all five inputs."""
        content, position, k, r, v, weights, mixed = ctx.saved_tensors
        (grad,) = grads
        n_queries, n_keys = content.shape[1], k.shape[1]
        grad_v = torch.bmm(weights.transpose(1, 2), grad)
        grad_weights = torch.bmm(grad, v.transpose(1, 2))
        # The shift's transpose: what lies outside the view belongs to no key. Future entries get 0 from their weight.
        grad_p = content.new_empty(content.shape[0], n_queries, n_keys + 1)
        flat = grad_p.flatten(1)
        flat[:, : n_queries - 1] = 0
        flat[:, n_queries - 1 + n_queries * n_keys :] = 0
        grad_scores = relative_shift(grad_p, n_keys)
        # Softmax's backward, with sum_j weights dweights = grad . mixed.
        grad_weights.sub_((grad * mixed).sum(dim=-1, keepdim=True))
        torch.mul(grad_weights, weights, out=grad_scores)
        return (
            torch.bmm(grad_scores, k),
            torch.bmm(grad_p, r),
            torch.bmm(grad_scores.transpose(1, 2), content),
            torch.bmm(grad_p.transpose(1, 2), position),
            grad_v,
        )


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
    def mix(self, q_BLHC: Tensor, k_BSHC: Tensor, v_BSHC: Tensor) -> Tensor:
        """The attended values, `[B, L, H, C]`."""

    def heads(self, x: Tensor) -> Tensor:
        """`[B, n, H C] -> [B, n, H, C]`."""
        return x.unflatten(-1, (self.n_heads, self.d_head))

    def forward(self, x_BLD: Tensor, context_BSD: Tensor) -> Tensor:
        """Attend from `x` to `context`, whose last L positions are x itself."""
        q, k, v = self.heads(self.query(x_BLD)), self.heads(self.key(context_BSD)), self.heads(self.value(context_BSD))
        return self.output(self.mix(q, k, v).flatten(-2))


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

    def mix(self, q_BLHC: Tensor, k_BSHC: Tensor, v_BSHC: Tensor) -> Tensor:
        """Content and position scores, softmax over the past, values."""
        batch, n_keys = q_BLHC.shape[0], k_BSHC.shape[1]
        # Descending, and one more than there are: the extra column makes the shift a view.
        r_NHC = self.position_keys(torch.arange(n_keys - 1, -2, -1, device=q_BLHC.device))
        scale = self.scale.to(q_BLHC.dtype)
        content = self.stack_heads((q_BLHC + self.content_bias.to(q_BLHC.dtype)) * scale)
        position = self.stack_heads((q_BLHC + self.position_bias.to(q_BLHC.dtype)) * scale)
        r = r_NHC.transpose(0, 1).to(q_BLHC.dtype).repeat(batch, 1, 1)
        mixed = RelativeMix.apply(content, position, self.stack_heads(k_BSHC), r, self.stack_heads(v_BSHC))
        assert isinstance(mixed, Tensor), "autograd functions return the tensor of their forward"
        return mixed.unflatten(0, (batch, self.n_heads)).transpose(1, 2)

    @staticmethod
    def stack_heads(x: Tensor) -> Tensor:
        """`[B, n, H, C] -> [B H, n, C]`."""
        return x.transpose(1, 2).flatten(0, 1)


@final
class PlainAttention(Attention):
    """`scaled_dot_product_attention` over the same keys with an explicit mask, blind to positions: a baseline for speed."""

    def mix(self, q_BLHC: Tensor, k_BSHC: Tensor, v_BSHC: Tensor) -> Tensor:
        """Softmax over the past, values."""
        past = ~future_mask(q_BLHC.shape[1], k_BSHC.shape[1], q_BLHC.device)
        q, k, v = q_BLHC.transpose(1, 2), k_BSHC.transpose(1, 2), v_BSHC.transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=past).transpose(1, 2)
