"""Small blocks and a clock that tells what it is told to."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from sparseffn.bench.candidates import Setting
from sparseffn.bench.layer import Shape
from sparseffn.bench.roofline import Roof
from sparseffn.ffn.dense import DenseConfig
from sparseffn.ffn.sigma_moe import SigmaMoEConfig

DENSE = DenseConfig(d_model=16, d_ff=66)
SIGMA = SigmaMoEConfig(d_model=16, n_experts=8, expert_size=8, k=2)


def setting(n_tokens: int, dtype: torch.dtype = torch.float32) -> Setting:
    """On the CPU."""
    return Setting(n_tokens=n_tokens, dtype=dtype, device=torch.device("cpu"))


class FakeClock:
    """A clock that stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def call(self, seconds: float) -> None:
        """What takes so long."""
        self.now += seconds


@pytest.fixture
def clock() -> FakeClock:
    """Starts at 0."""
    return FakeClock()


@pytest.fixture
def shape() -> Shape:
    """Equal parameters within a few per cent."""
    return Shape(name="small", dense=DENSE, methods={"sigma-moe": SIGMA})


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine with a small cache, measured in no time."""
    monkeypatch.setattr("sparseffn.bench.race.last_level_cache_bytes", lambda device: (2**14, "made up"))
    monkeypatch.setattr("sparseffn.bench.race._AT_LEAST_S", 0.0)
    monkeypatch.setattr(
        Roof, "measure", staticmethod(lambda dtype, device: Roof(flops_per_s=1e11, bytes_per_s=1e10, scattered_bytes_per_s=5e9))
    )
    yield
