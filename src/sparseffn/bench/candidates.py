"""Who is timed: a method's layer on a backend, or a peer's module over the same parameters."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from sparseffn.bench.backends import resolved, use_backend
from sparseffn.bench.limits import touched_bytes
from sparseffn.bench.timing import Turn
from sparseffn.ffn import FeedForward, FFNConfig

# Calls before the timed one of a warm timing, which bring weights and tokens into the caches.
_WARMING_CALLS = 2
# Rounds over which the weights that a call touches are averaged.
_TOUCHED_ROUNDS = 8


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One row of a table: how to build the module, and on which backend it runs."""

    label: str
    config: FFNConfig
    """What is computed; a peer computes the same."""
    backend: str = "auto"
    wrap: Callable[[FeedForward], nn.Module] | None = None
    """For a peer: its module over the layer's own parameters."""

    @property
    def is_peer(self) -> bool:
        """Whether another library computes it."""
        return self.wrap is not None

    def backend_on(self, setting: Setting) -> str | None:
        """The backend that computes it; the dense block is PyTorch's own products, None stands for a peer's."""
        if self.is_peer:
            return None
        return resolved(self.backend, setting.device, setting.dtype) if self.config.has_backends else "torch"

    def module(self, layer: FeedForward) -> nn.Module:
        """What is called."""
        return layer if self.wrap is None else self.wrap(layer)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all candidates share."""

    n_tokens: int
    dtype: torch.dtype
    device: torch.device


def build_layer(config: FFNConfig, setting: Setting, seed: int) -> FeedForward:
    """A layer with parameters drawn from the seed."""
    layer = config.build()
    layer.reset_parameters(torch.Generator().manual_seed(seed))
    return layer.to(setting.device, setting.dtype)


def draw_tokens(config: FFNConfig, setting: Setting, seed: int) -> Tensor:
    """Random tokens on the unit scale, `[T, d_model]`."""
    x = torch.randn(setting.n_tokens, config.d_model, generator=torch.Generator().manual_seed(seed))
    return x.to(setting.device, setting.dtype)


@final
class Rotation:
    """A candidate's layers, each with parameters of its own, visited one after the other."""

    def __init__(self, candidate: Candidate, setting: Setting, n_layers: int) -> None:
        self.candidate = candidate
        self.setting = setting
        self.layers = [build_layer(candidate.config, setting, seed) for seed in range(n_layers)]
        self.modules = [candidate.module(layer) for layer in self.layers]
        self.fixed = draw_tokens(candidate.config, setting, seed=1)

    def tokens(self, index: int) -> Tensor:
        """The tokens of a round: fresh ones where the layers rotate, else always the same."""
        rotates = len(self.layers) > 1
        return draw_tokens(self.candidate.config, self.setting, seed=1 + index) if rotates else self.fixed

    def place(self, index: int) -> int:
        """Which layer a round visits."""
        return index % len(self.layers)

    def touched_bytes(self) -> float:
        """Bytes of the weights that a call needs, mean over some rounds."""
        rounds = range(min(_TOUCHED_ROUNDS, len(self.layers)))
        use_backend(self.candidate.backend)
        return statistics.fmean(touched_bytes(self.layers[self.place(i)], self.tokens(i)) for i in rounds)


def layers_to_leave_cache(config: FFNConfig, itemsize: int, cache_bytes: int) -> int:
    """How many layers fill four times the last-level cache, so that none is there when its turn comes again."""
    return max(2, math.ceil(4 * cache_bytes / (config.num_params() * itemsize)))


@final
class ForwardTurn(Turn):
    """An evaluation forward under `inference_mode`."""

    def __init__(self, rotation: Rotation, *, warm: bool = False) -> None:
        self.rotation = rotation
        self.warm = warm

    def prepare(self, index: int) -> Callable[[], object]:
        """Tokens, backend, and for a warm timing some calls that are not timed."""
        index = 0 if self.warm else index
        use_backend(self.rotation.candidate.backend)
        module = self.rotation.modules[self.rotation.place(index)].eval()
        x = self.rotation.tokens(index)

        def call() -> object:
            with torch.inference_mode():
                return module(x)

        for _ in range(_WARMING_CALLS if self.warm else 0):
            call()
        return call


@final
class TrainingTurn(Turn):
    """A forward and a backward; gradients are freed before the next candidate's turn."""

    def __init__(self, rotation: Rotation, *, warm: bool = False) -> None:
        self.rotation = rotation
        self.warm = warm
        self.parameters: Sequence[nn.Parameter] = ()

    def prepare(self, index: int) -> Callable[[], object]:
        """Tokens, the gradient that a model would send back, backend."""
        index = 0 if self.warm else index
        use_backend(self.rotation.candidate.backend)
        place = self.rotation.place(index)
        module = self.rotation.modules[place].train()
        self.parameters = list(self.rotation.layers[place].parameters())
        x = self.rotation.tokens(index)
        # That of a sum would be one number repeated.
        grad = draw_tokens(self.rotation.candidate.config, self.rotation.setting, seed=0)

        def call() -> object:
            return module(x.detach().requires_grad_()).backward(grad)

        for _ in range(_WARMING_CALLS if self.warm else 0):
            call()
            self.finish()
        return call

    def finish(self) -> None:
        """Free the gradients."""
        for parameter in self.parameters:
            parameter.grad = None


def forward_turns(rotations: Mapping[str, Rotation], *, warm: bool = False) -> dict[str, Turn]:
    """Each candidate's forward."""
    return {label: ForwardTurn(rotation, warm=warm) for label, rotation in rotations.items()}


def training_turns(rotations: Mapping[str, Rotation], *, warm: bool = False) -> dict[str, Turn]:
    """Each candidate's forward and backward."""
    return {label: TrainingTurn(rotation, warm=warm) for label, rotation in rotations.items()}
