"""Active channels of blocks whose unit is the expert: coefficients that are not zero, which the selection does not tell.

A mixture computes K G channels for a token, and ReLU leaves some of them. Counted from `layer.coefficients(x)`, the framework's
alpha, so that a mixture and the dense block are counted alike; that computes the first layer a second time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn

from sparseffn.analysis.usage import Moments
from sparseffn.ffn import FeedForward
from sparseffn.training.snapshots import layer_name


@final
class ActiveChannels:
    """Running sums of every layer of a model."""

    def __init__(self) -> None:
        self.layers: dict[str, tuple[int, Moments]] = {}
        # Runs of each block in this window: a shared one runs once for every layer.
        self._runs: Counter[str] = Counter()

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Count what runs through the model's blocks while the context is open."""
        blocks = {name: module for name, module in model.named_modules() if isinstance(module, FeedForward)}
        handles = [block.register_forward_pre_hook(self._hook(name)) for name, block in blocks.items()]
        handles.append(model.register_forward_pre_hook(lambda module, args: self._runs.clear()))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Any:
        def before(block: FeedForward, args: tuple[Tensor, ...]) -> None:
            with torch.no_grad():
                active = (block.coefficients(args[0]) != 0).sum(dim=-1)
            layer = layer_name(name, self._runs[name])
            self._runs[name] += 1
            _, moments = self.layers.setdefault(layer, (block.config.n_channels, Moments()))
            moments.add(active, n=active.numel())

        return before

    def to_json(self) -> list[dict[str, Any]]:
        """Mean and standard deviation over tokens, by layer."""
        return [
            dict(zip(("layer", "mean", "std", "total"), (i, *moments.mean_and_std(), total), strict=True))
            for i, (total, moments) in enumerate(self.layers.values())
        ]
