"""Transformer-XL with pre-layernorm (Dai 2019), its feedforward blocks built from any method's config.

x <- x + dropout(Attention(LN(x), memory));  x <- x + dropout(FFN(LN(x)))
"""

from __future__ import annotations

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseffn.errors import UserError
from sparseffn.ffn import FeedForward, RoutingStats
from sparseffn.ffn.feedforward import scaled_std, truncated_normal_
from sparseffn.models.attention import Attention, RelativeAttention
from sparseffn.models.language_model import LanguageModel, Memory, ModelOutput
from sparseffn.models.model_config import TransformerXLConfig


@final
class Block(nn.Module):
    """One layer: attention and feedforward block, each behind a layer norm and beside a residual."""

    def __init__(self, config: TransformerXLConfig, attention: type[Attention]) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.d_model)
        self.attention = attention(config)
        self.ffn_norm = nn.LayerNorm(config.d_model)
        self.ffn: FeedForward = config.ffn.build()
        self.dropout = config.dropout

    def forward(
        self, x: Tensor, memory: Tensor | None, *, return_stats: bool, padding: Tensor | None = None
    ) -> tuple[Tensor, RoutingStats | None]:
        """Apply the layer to a window; the memory passes through the same layer norm and projections.

        `padding` is bool `[B, M + L]`, True for positions of memory and window that hold no token: nobody sees them, and
        they take no part in routing.
        """
        context = x if memory is None else torch.cat((memory.to(x.dtype), x), dim=1)
        normed = self.attention_norm(context)
        x = x + self.drop(self.attention(normed[:, normed.shape[1] - x.shape[1] :], normed, padding))
        return self.feed_forward(x, return_stats=return_stats, padding=padding)

    def feed_forward(
        self, x: Tensor, *, return_stats: bool, padding: Tensor | None = None
    ) -> tuple[Tensor, RoutingStats | None]:
        """The second half of the layer; of `padding` the last L positions are the window's."""
        mask = None if padding is None else ~padding[:, padding.shape[1] - x.shape[1] :]
        if return_stats:
            y, stats = self.ffn(self.ffn_norm(x), mask=mask, return_stats=True)
        else:
            y, stats = self.ffn(self.ffn_norm(x), mask=mask), None
        return x + self.drop(y), stats

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


@final
class TransformerXL(LanguageModel):
    """The language model. Embedding and output projection are not tied.

    Linear layers inside blocks start truncated normal with standard deviation `sqrt(2 / (fan_in n_layers))`, the embedding
    Xavier uniform, the output projection at PyTorch's default, biases of attention zero.

    Args:
        config: sizes.
        attention: `RelativeAttention`; the benchmark passes `PlainAttention`.
    """

    config: TransformerXLConfig

    def __init__(self, config: TransformerXLConfig, attention: type[Attention] = RelativeAttention) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        blocks = [Block(config, attention) for _ in range(config.n_blocks)]
        # One shared block stands at every place; its parameters go by the name of the first.
        self.layers = nn.ModuleList(blocks * config.n_layers if config.shared_layers else blocks)
        self.norm = nn.LayerNorm(config.d_model)
        self.output = nn.Linear(config.d_model, config.vocab_size)

    def forward(
        self, tokens: Tensor, memory: Memory | None = None, *, memory_length: int = 0, return_stats: bool = False
    ) -> ModelOutput:
        """Logits of a window.

        Args:
            tokens: int64 `[B, L]`, L >= 1.
            memory: of the window before; None or zero length at the start, which nobody attends to.
            memory_length: how many positions to hand on.
            return_stats: also return each layer's routing statistics.

        Raises:
            UserError: tokens are not `[B, L]`, the memory is of another model or batch, or, on the CPU, a token is outside the
                vocabulary.
        """
        if tokens.dim() != 2 or tokens.shape[1] == 0:
            raise UserError(f"`tokens` must be [batch, length >= 1]; got {tuple(tokens.shape)}; fix: add a batch dimension")
        if memory is not None:
            self._check_memory(memory, len(tokens))
        x = F.dropout(self._embed(tokens), self.config.dropout, self.training)
        kept, stats = [], []
        for i, layer in enumerate(self.layers):
            past = None if memory is None or memory[i].shape[1] == 0 else memory[i]
            kept.append(remember(x, past, memory_length))
            x, layer_stats = layer(x, past, return_stats=return_stats)
            stats.append(layer_stats)
        return ModelOutput(self.project(x), tuple(kept), tuple(stats) if return_stats else None)

    def _check_memory(self, memory: Memory, batch: int) -> None:
        if len(memory) != len(self.layers):
            raise UserError(
                f"`memory` must have one tensor a layer, {len(self.layers)}; got {len(memory)}; "
                "fix: pass what this model returned"
            )
        for states in memory:
            # A memory of no position is of any batch.
            if states.shape[1] and (states.shape[0], states.shape[2]) != (batch, self.config.d_model):
                raise UserError(
                    f"`memory` must be [batch = {batch}, positions, d_model = {self.config.d_model}]; "
                    f"got {tuple(states.shape)}; fix: begin without memory when the batch changes"
                )

    def _embed(self, tokens: Tensor) -> Tensor:
        try:
            return self.embedding(tokens)
        except IndexError:
            raise UserError(
                f"`tokens` must be 0 to {self.config.vocab_size - 1}; got {int(tokens.min())} to {int(tokens.max())}; "
                "fix: use the tokenizer that the model was trained with"
            ) from None

    def project(self, x: Tensor) -> Tensor:
        return self.output(F.dropout(self.norm(x), self.config.dropout, self.training))

    def draw(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        if name == "embedding.weight":
            nn.init.xavier_uniform_(parameter, generator=generator)
        elif name.startswith("output."):
            # PyTorch's default of nn.Linear: both weight and bias uniform in +-1 / sqrt(fan_in).
            bound = self.config.d_model**-0.5
            parameter.uniform_(-bound, bound, generator=generator)
        elif name.endswith("attention.scale"):
            parameter.fill_(self.config.d_head**-0.5)
        elif "norm" in name:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
        elif parameter.dim() == 2 and name.endswith(".weight"):
            truncated_normal_(parameter, scaled_std(parameter.shape[1], self.config.n_layers), generator)
        else:
            parameter.zero_()


def remember(x: Tensor, past: Tensor | None, length: int) -> Tensor:
    """The last `length` positions of memory and window, detached."""
    whole = x.detach() if past is None else torch.cat((past.to(x.dtype), x.detach()), dim=1)
    return whole[:, max(0, whole.shape[1] - length) :]
