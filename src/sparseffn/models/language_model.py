"""What every language model here has: windows in, logits out; feedforward blocks of any method; keyed initial parameters."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparseffn.errors import UserError
from sparseffn.ffn import FeedForward, RoutingStats
from sparseffn.models.decoder_config import DecoderConfig
from sparseffn.models.model_config import TransformerXLConfig

# Of a Transformer-XL: each layer's input of earlier windows, before the layer norm, detached: `[B, M, d_model]` a layer. Of a
# decoder: nothing.
Memory = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class ModelOutput:
    """What one window gives."""

    logits: Tensor
    """`[B, L, vocab_size]`."""
    memory: Memory
    """For the next window."""
    stats: tuple[RoutingStats, ...] | None
    """Routing statistics of each layer, when asked for."""


class LanguageModel(nn.Module, ABC):
    """A language model whose feedforward blocks are any method's; training and evaluation know no more of it than this."""

    embedding: nn.Embedding
    layers: nn.ModuleList
    output: nn.Linear

    def __init__(self, config: TransformerXLConfig | DecoderConfig) -> None:
        super().__init__()
        self.config = config

    @abstractmethod
    def forward(
        self, tokens: Tensor, memory: Memory | None = None, *, memory_length: int = 0, return_stats: bool = False
    ) -> ModelOutput:
        """Logits of a window.

        Args:
            tokens: int64 `[B, L]`, L >= 1.
            memory: what the window before handed on; None at the start.
            memory_length: how many positions to hand on.
            return_stats: also return each layer's routing statistics.

        Raises:
            UserError: tokens are not `[B, L]`, or the memory is of another model.
        """

    @abstractmethod
    def draw(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        """Fill a parameter outside the feedforward blocks with its initial values."""

    @torch.no_grad()
    def init_parameters(self, seed: int, *, only: Collection[str] | None = None) -> None:
        """Draw every parameter from a generator keyed by seed and name, on the CPU: the same bits on every device.

        Two models that differ in their feedforward blocks alone are bit-identical elsewhere.

        `only` names the parameters to draw, which get what they would get among all; None: all.

        Raises:
            UserError: a parameter to draw is on the meta device, which has no place for its values.
        """
        if absent := [name for name, p in self.named_parameters() if p.is_meta and (only is None or name in only)]:
            raise UserError(
                f"parameters must be on a device to be drawn; got `{absent[0]}` on meta; "
                "fix: model.to_empty(device='cpu') first"
            )
        inside_ffn = {f"{name}.{p}" for name, m in self.ffn_layers() for p, _ in m.named_parameters()}
        for name, parameter in self.named_parameters():
            if name not in inside_ffn and (only is None or name in only):
                drawn = torch.empty_like(parameter, device="cpu")
                self.draw(name, drawn, keyed_generator(seed, name))
                parameter.copy_(drawn)
        for name, layer in self.ffn_layers():
            wanted = {p for p, _ in layer.named_parameters() if only is None or f"{name}.{p}" in only}
            if wanted:
                _init_ffn(layer, keyed_generator(seed, name), wanted)

    def ffn_layers(self) -> list[tuple[str, FeedForward]]:
        return [(name, module) for name, module in self.named_modules() if isinstance(module, FeedForward)]


def _init_ffn(layer: FeedForward, generator: torch.Generator, wanted: Collection[str]) -> None:
    """Draw a layer's parameters on the CPU; those that are wanted are taken over."""
    own = dict(layer.named_parameters())
    first = next(iter(own.values()))
    if first.device.type == "cpu" and len(wanted) == len(own):
        layer.reset_parameters(generator)
        return
    with torch.device("cpu"):
        drawn = layer.config.build().to(first.dtype)
    drawn.reset_parameters(generator)
    for name, parameter in drawn.named_parameters():
        if name in wanted:
            own[name].copy_(parameter)


def keyed_generator(seed: int, name: str) -> torch.Generator:
    """A generator of the CPU whose numbers depend on the seed and the name alone."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    # The generators of some devices take 63 bits.
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
