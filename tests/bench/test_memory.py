"""Bytes kept for backward, by what they are for; the limits without timing."""

from __future__ import annotations

import pytest
import torch

from sparseffn.bench.candidates import Shape
from sparseffn.bench.memory import bench_memory, is_selection
from sparseffn.bench.roofline import bench_roofline
from sparseffn.results.bench_result import LayerSettings

from .conftest import DENSE, SIGMA


def test_hidden_units_are_told_from_the_selection(shape: Shape) -> None:
    """10 tokens: u of 66 against 2 x 8 channels, 4 bytes each; indices and scores apart; totals add up."""
    result = bench_memory([shape], LayerSettings(tokens=(10,), peers=False))
    dense, sigma = result.rows
    assert (dense.saved_bytes, dense.selection_bytes) == (10 * 66 * 4, 0)
    assert sigma.saved_bytes == 10 * 16 * 4 and sigma.selection_bytes > 0
    assert sigma.over_dense == pytest.approx(16 / 66) and sigma.over_dense_over_share == pytest.approx(64 / 66)
    for row in result.rows:
        assert row.input_bytes == row.output_bytes == 10 * 16 * 4
        assert row.total_bytes == sum(getattr(row, f"{key}_bytes") for key in ("saved", "selection", "input", "output"))
    assert sigma.total_over_dense == pytest.approx(sigma.total_bytes / dense.total_bytes)


def test_tiny_experts_hide_nothing_in_the_selection() -> None:
    """Hidden units no larger than the scores count as hidden units; indices never do."""
    tiny = SIGMA.replace(expert_size=1, k=4)
    assert not is_selection(torch.zeros(10, 4), tiny, 10)
    assert is_selection(torch.zeros(10, 4, dtype=torch.int64), tiny, 10) and is_selection(torch.zeros(10, 4), SIGMA, 10)
    assert not is_selection(torch.zeros(10, 1), DENSE, 10)


@pytest.mark.usefixtures("small_products")
def test_roofline_lists_speeds_and_limits(shape: Shape) -> None:
    """One thread and all, both dtypes; each limit is the larger of its two."""
    before = torch.get_num_threads()
    result = bench_roofline([shape], LayerSettings(tokens=(1, 1000)))
    assert torch.get_num_threads() == before
    assert {(s.threads, s.dtype) for s in result.speeds} == {
        (n, dtype) for n in {1, before} for dtype in ("float32", "bfloat16")
    }
    assert [(row.label, row.tokens) for row in result.rows] == [
        ("dense", 1), ("dense", 1000), ("sigma-moe", 1), ("sigma-moe", 1000)
    ]  # fmt: skip
    for row in result.rows:
        assert row.forward.limit_s == max(row.forward.arithmetic_s, row.forward.bytes_s)
        assert row.training.arithmetic_s == pytest.approx(3 * row.forward.arithmetic_s)
