"""Limits by numbers worked out by hand, and the machine's facts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparseffn.bench.machine import FALLBACK_CACHE_BYTES, last_level_cache_bytes
from sparseffn.bench.roofline import bandwidth, expected_bytes, highest, limit, product_speed, touched_bytes, weight_bytes
from sparseffn.ffn.pkm import PKMConfig
from sparseffn.ffn.topk import TopKConfig
from sparseffn.results.bench_result import Roof

from .conftest import DENSE, SIGMA

ROOF = Roof(flops_per_s=1000.0, bytes_per_s=100.0, scattered_bytes_per_s=50.0)


def test_limit_of_a_mixture() -> None:
    """2 d E + 4 d K G = 1280 FLOPs a token, three times for training; bytes are read once; gradients stand beside."""
    forward = limit(SIGMA, ROOF, n_tokens=10, touched_bytes=500.0, itemsize=4, training=False)
    assert (forward.arithmetic_s, forward.bytes_s, forward.gradient_s) == (12.8, 5.0, 0.0) and forward.limit_s == 12.8
    training = limit(SIGMA, ROOF, n_tokens=10, touched_bytes=5000.0, itemsize=4, training=True)
    assert training.arithmetic_s == pytest.approx(38.4) and training.limit_s == 50.0
    # 2 x 64 x 16 parameters of experts and 8 x 16 of the selector, 4 bytes each.
    assert training.gradient_s == pytest.approx((2048 + 128) * 4 / 100)


@pytest.mark.parametrize(
    ("config", "unused", "units", "params"),
    [
        (SIGMA, 5, 8, 128 + 3 * 2 * 8 * 16),
        (DENSE, 30, 66, 2 * 66 * 16 + 66 + 16),
        (PKMConfig(d_model=16, n_subkeys=4, k=2, n_heads=1), 10, 16, 8 * 8 + 6 * 16),
        (TopKConfig(d_model=16, d_ff=10, k=2), 7, 10, (2 * 10 * 16 + 10 + 16) - 7 * 16),
    ],
    ids=["sigma-moe", "dense", "pkm", "topk"],
)
def test_only_touched_weights_are_read(config, unused: int, units: int, params: int) -> None:
    """Keys and values of idle experts, values that nobody reads; the dense block reads all, zero or not."""
    assert weight_bytes(config, n_unused=unused, n_units=units, itemsize=4) == 4 * params


def test_touched_experts_are_counted_from_the_batch() -> None:
    """One token of a mixture touches K experts."""
    layer = SIGMA.build()
    assert touched_bytes(layer, torch.randn(1, 16)) == 4 * (128 + 2 * 2 * 8 * 16)
    assert touched_bytes(layer, torch.randn(200, 16)) == 4 * SIGMA.num_params()


def test_expected_bytes() -> None:
    """One token touches K of E; many touch all."""
    assert expected_bytes(SIGMA, n_tokens=1, itemsize=4) == pytest.approx(4 * (128 + 2 * 2 * 8 * 16))
    assert expected_bytes(SIGMA, n_tokens=1000, itemsize=4) == pytest.approx(4 * SIGMA.num_params())


def test_cache_size_is_read_or_assumed(tmp_path: Path) -> None:
    """The largest of those the system lists."""
    for index, size in enumerate(("48K", "1024K", "32M")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert last_level_cache_bytes(folder=tmp_path) == (32 * 2**20, str(tmp_path))
    size, source = last_level_cache_bytes(folder=tmp_path / "nothing")
    assert size == FALLBACK_CACHE_BYTES and "assumed" in source


@pytest.mark.usefixtures("small_products")
def test_roof_is_measured() -> None:
    """Speeds are positive; the working set is four times the cache; the better of two measurements counts."""
    device = torch.device("cpu")
    assert product_speed(torch.float32, device).flops_per_s > 1e6
    reading = bandwidth(device)
    assert reading.bytes >= 4 * last_level_cache_bytes()[0] - 4 * 2048 and reading.bytes_per_s > 1e6
    assert reading.scattered.bytes_per_s > 1e6 and reading.scattered.block_bytes == 2**19
    best = highest(ROOF, Roof(flops_per_s=1.0, bytes_per_s=1e6, scattered_bytes_per_s=2.0))
    assert best == Roof(flops_per_s=1000.0, bytes_per_s=1e6, scattered_bytes_per_s=50.0)


@pytest.mark.usefixtures("small_products")
def test_roof_is_that_of_the_fastest_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of PyTorch's, the selector's and the experts': a layer may use any, and would be faster than its limit."""
    flops = {"torch.mm": 2 * 64**3, "router_logits": 2 * 64**3, "experts": 4 * 64 * 32 * 16}
    for fastest in flops:
        # The order in which they are timed.
        seconds = iter(1e-6 if how == fastest else 1.0 for how in ("experts", "torch.mm", "router_logits"))
        monkeypatch.setattr("sparseffn.bench.roofline._best", lambda call, clock, seconds=seconds: (call(), next(seconds))[1])
        found = product_speed(torch.float32, torch.device("cpu"))
        assert found.how == fastest and found.flops_per_s == pytest.approx(flops[fastest] / 1e-6)
