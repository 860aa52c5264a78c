"""Small blocks and a clock that tells what it is told to."""

from __future__ import annotations

import pytest
import torch

from sparseffn.bench.candidates import Setting, Shape
from sparseffn.ffn.dense import DenseConfig
from sparseffn.ffn.sigma_moe import SigmaMoEConfig
from sparseffn.results.bench_result import Roof

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
def small_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products and readings that take no time to measure."""
    monkeypatch.setattr("sparseffn.bench.roofline._SIZES", {"cpu": (64,)})
    monkeypatch.setattr("sparseffn.bench.roofline._EXPERTS", {"cpu": ((64, 32, 16),)})
    monkeypatch.setattr("sparseffn.bench.roofline._BLOCKS", 512)
    monkeypatch.setattr("sparseffn.bench.roofline._SAMPLE_S", 0.0)


@pytest.fixture
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose cache a few small experts leave: thousands of layers of them would fill a real one."""
    monkeypatch.setattr("sparseffn.bench.gated_experts.last_level_cache_bytes", lambda device: (2**14, "made up"))


@pytest.fixture
def quick_roof(monkeypatch: pytest.MonkeyPatch, small_products: None, small_cache: None) -> None:
    """Speeds of the machine that take no time to measure."""
    made_up = Roof(flops_per_s=1e11, bytes_per_s=1e10, scattered_bytes_per_s=5e9)
    for place in ("bench.layer", "bench.expert_speed", "bench.whole_speed", "paper.figure_points"):
        monkeypatch.setattr(f"sparseffn.{place}.measure_roof", lambda dtype, device: made_up)
    monkeypatch.setattr("sparseffn.bench.benchmark._AT_LEAST_S", 0.0)
    monkeypatch.setattr("sparseffn.bench.expert_speed._AT_LEAST_S", 0.0)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, quick_roof: None) -> None:
    """A machine with a small cache, measured in no time."""
    monkeypatch.setattr("sparseffn.bench.benchmark.last_level_cache_bytes", lambda device: (2**14, "made up"))
