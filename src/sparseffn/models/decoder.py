"""A decoder as Llama's (Touvron 2023, arXiv 2302.13971), its feedforward blocks built from any method's config.

    x <- x + dropout(Attention(RMSNorm(x)));  x <- x + dropout(FFN(RMSNorm(x)))

RMS norms (Zhang 2019, arXiv 1910.07467), rotary positions and grouped-query attention (see `rotary_attention`), no biases
outside the feedforward blocks. Nothing is handed on from window to window; a cache of keys and values makes generation
incremental.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, final

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from sparseffn.errors import UserError
from sparseffn.ffn import FeedForward, RoutingStats
from sparseffn.ffn.feedforward import scaled_std, truncated_normal_
from sparseffn.models.decoder_config import DecoderConfig
from sparseffn.models.language_model import LanguageModel, Memory, ModelOutput
from sparseffn.models.rotary_attention import GroupedQueryAttention, KeyValueCache, Window

# Re-entrant checkpointing would leave the balancing loss without a gradient.
_checkpoint = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)


@final
class DecoderBlock(nn.Module):
    """One layer: attention and feedforward block, each behind an RMS norm and beside a residual."""

    def __init__(self, config: DecoderConfig, place: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.attention = GroupedQueryAttention(config, place)
        self.ffn_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.ffn: FeedForward = config.ffn.build()
        self.dropout = config.dropout
        # Both go by transformers' names, which sets them.
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Callable[..., Any] = _checkpoint

    def forward(
        self, x: Tensor, window: Window, cache: KeyValueCache | None, *, return_stats: bool
    ) -> tuple[Tensor, RoutingStats | None]:
        """Apply the layer; in training its activations are computed again for backward where that is asked for.

        A cache would be written twice then, so that with one nothing is computed again.
        """
        if self.gradient_checkpointing and self.training and cache is None:
            return self._gradient_checkpointing_func(self._apply_once, x, window, None, return_stats)
        return self._apply_once(x, window, cache, return_stats)

    def _apply_once(
        self, x: Tensor, window: Window, cache: KeyValueCache | None, return_stats: bool
    ) -> tuple[Tensor, RoutingStats | None]:
        x = x + self.drop(self.attention(self.attention_norm(x), window, cache))
        normed, mask = self.ffn_norm(x), None if window.mask_BL is None else window.mask_BL.to(x.device)
        if return_stats:
            y, stats = self.ffn(normed, mask=mask, return_stats=True)
        else:
            y, stats = self.ffn(normed, mask=mask), None
        return x + self.drop(y), stats

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


@final
class Decoder(LanguageModel):
    """The language model; see `LanguageModel.forward` for what training calls.

    Parameters start as in `TransformerXL`, norms at 1; a tied embedding starts as the output projection, whose scale the
    logits have.
    """

    config: DecoderConfig

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(DecoderBlock(config, place) for place in range(config.n_layers))
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.output = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tied_embeddings:
            self.output.weight = self.embedding.weight

    def forward(
        self,
        tokens: Tensor,
        memory: Memory | None = None,
        *,
        memory_length: int = 0,
        return_stats: bool = False,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> ModelOutput:
        """Logits of a window.

        Args:
            tokens: int64 `[B, L]`, L >= 1.
            memory: none, or empty; a decoder hands nothing on.
            memory_length: 0.
            return_stats: also return each layer's routing statistics.
            mask: bool `[B, n_cached + L]`, False for padding: nobody sees it, and it takes no part in routing.
            positions: int64 `[B, L]` or `[1, L]`; None: those after what is cached.
            cache: keys and values of what came before; those of the window are added.

        Raises:
            UserError: tokens, mask or memory are not as above.
        """
        if tokens.dim() != 2 or tokens.shape[1] == 0:
            raise UserError(f"`tokens` must be [batch, length >= 1]; got {tuple(tokens.shape)}; fix: add a batch dimension")
        if memory or memory_length:
            raise UserError(f"`memory_length` must be 0: a decoder has no memory; got {memory_length}; fix: leave it out")
        embedded = self.embedding(tokens)
        states, stats = self.states(embedded, mask=mask, positions=positions, cache=cache, return_stats=return_stats)
        return ModelOutput(self.project(states[-1]), (), stats if return_stats else None)

    def states(
        self,
        x_BLD: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KeyValueCache | None = None,
        return_stats: bool = False,
    ) -> tuple[list[Tensor], tuple[RoutingStats, ...]]:
        """Every layer's input and the last one's output behind the norm, and each layer's statistics if asked for.

        `x_BLD` are embedded tokens; the others are as in `forward`.
        """
        window = Window.of(x_BLD, self.config, mask=mask, positions=positions, cache=cache)
        x = F.dropout(x_BLD, self.config.dropout, self.training)
        states, stats = [x], []
        for layer in self.layers:
            x, layer_stats = layer(x, window, cache, return_stats=return_stats)
            states.append(x)
            if layer_stats is not None:
                stats.append(layer_stats)
        states[-1] = self.norm(x)
        return states, tuple(stats)

    def project(self, x_BLD: Tensor) -> Tensor:
        """Logits of what `states` returned last."""
        return self.output(F.dropout(x_BLD, self.config.dropout, self.training))

    def draw(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        if name == "embedding.weight" and not self.config.tied_embeddings:
            nn.init.xavier_uniform_(parameter, generator=generator)
        elif name in ("embedding.weight", "output.weight"):
            bound = self.config.d_model**-0.5
            parameter.uniform_(-bound, bound, generator=generator)
        elif "norm" in name:
            parameter.fill_(1.0)
        else:
            truncated_normal_(parameter, scaled_std(parameter.shape[1], self.config.n_layers), generator)
