"""What is measured: a method's layer on a backend, or a peer's module over the same parameters, at a number of tokens.

The backend is chosen as a user would choose it, by `SPARSEFFN_BACKEND`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparseffn.devices import find_device
from sparseffn.errors import UserError, unknown_name
from sparseffn.ffn import FeedForward, FFNConfig
from sparseffn.ops import explain_backend, list_backends
from sparseffn.ops.backends import ENVIRONMENT_VARIABLE
from sparseffn.results.bench_result import DTYPE_NAMES, LayerSettings

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_NAMES}
DENSE = "dense"
"""Label of the block that ratios are against."""

Progress = Callable[[str], None]
"""Receives a line for each thing that begins."""


def no_progress(text: str) -> None: ...


def print_progress(text: str) -> None:
    """A line on standard error, which is not buffered."""
    sys.stderr.write(f"{text}\n")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Blocks of equal parameters, by label."""

    name: str
    dense: FFNConfig
    methods: Mapping[str, FFNConfig]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all candidates share."""

    n_tokens: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, settings: LayerSettings, n_tokens: int) -> Setting:
        """The setting of one size; a device that is not there is refused."""
        return cls(n_tokens=n_tokens, dtype=DTYPES[settings.dtype], device=find_device(settings.device))


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One row of a table: how to build the module, and on which backend it runs."""

    label: str
    config: FFNConfig
    """What is computed; a peer computes the same."""
    backend: str = "auto"
    wrap: Callable[[FeedForward], nn.Module] | None = None
    """For a peer: its module over the layer's own parameters."""
    optional: bool = False
    """Whether it is there for comparison alone: where it cannot compute the layer, it is left out with the reason."""

    @property
    def is_peer(self) -> bool:
        return self.wrap is not None

    def backend_on(self, setting: Setting) -> str | None:
        """The backend that computes it; the dense block is PyTorch's own products, None stands for a peer's."""
        if self.is_peer:
            return None
        return resolved(self.backend, setting.device, setting.dtype) if self.config.has_backends else "torch"

    def module(self, layer: FeedForward) -> nn.Module:
        return layer if self.wrap is None else self.wrap(layer)


def build_layer(config: FFNConfig, setting: Setting, seed: int) -> FeedForward:
    """A layer with parameters drawn from the seed, the same on every device."""
    layer = config.build()
    layer.reset_parameters(torch.Generator().manual_seed(seed))
    return layer.to(setting.device, setting.dtype)


def draw_tokens(config: FFNConfig, setting: Setting, seed: int) -> Tensor:
    """Random tokens on the unit scale, `[T, d_model]`, drawn on the device that they are for."""
    generator = torch.Generator(setting.device).manual_seed(seed)
    return torch.randn(setting.n_tokens, config.d_model, generator=generator, device=setting.device).to(setting.dtype)


@contextmanager
def backend_restored() -> Iterator[None]:
    """Put the variable back at the end, whatever `use_backend` set meanwhile."""
    before = os.environ.get(ENVIRONMENT_VARIABLE)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(ENVIRONMENT_VARIABLE, None)
        else:
            os.environ[ENVIRONMENT_VARIABLE] = before


def use_backend(name: str) -> None:
    """Set the variable for what runs next; only inside `backend_restored`."""
    os.environ[ENVIRONMENT_VARIABLE] = name


def check_backends(names: Sequence[str], device: torch.device, dtype: torch.dtype) -> None:
    """Refuse, with the reason, a backend that does not exist or cannot run."""
    known = [backend.name for backend in list_backends()]
    for name in names:
        if name != "auto" and name not in known:
            raise unknown_name("backend", name, ["auto", *known])
        reason = None if name == "auto" else why_not(name, device, dtype)
        if reason is not None:
            raise UserError(
                f"`--backends` must be able to run on {device.type}; got {name!r}: {reason}; fix: leave it out, or use auto"
            )


def why_not(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a backend cannot run there, or None."""
    return next(backend for backend in list_backends() if backend.name == name).unavailable(device, dtype)


def resolved(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The first backend that `auto` stands for; any other name is itself."""
    if name != "auto":
        return name
    with backend_restored():
        use_backend("auto")
        return explain_backend(device, dtype=dtype)[0]
