"""Usage of units: numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from sparseffn.analysis import UsageCounter
from sparseffn.analysis.usage import MAX_COOCCURRENCE, MAX_POINTS, LayerUsage
from sparseffn.ffn import CollectedStats, RoutingStats
from sparseffn.ops import Selection
from sparseffn.results.comparison_result import ActiveChannels, Cooccurrence


def stats(counts: list[int], weights: list[float], active: list[int], selection: Selection | None = None) -> RoutingStats:
    """What a layer would report."""
    zero = torch.zeros((), dtype=torch.int64)
    return RoutingStats(
        n_tokens=torch.tensor(len(active)),
        counts=torch.tensor(counts),
        weights=torch.tensor(weights),
        active=torch.tensor(active),
        balance_loss=zero.float(),
        dropped=zero,
        selection=selection,
    )


def pairs(indices: list[list[int]], weights: list[list[float]], n_units: int = 4) -> Selection:
    """Two experts a token."""
    return Selection.fixed(torch.tensor(indices), torch.tensor(weights), n_units)


def mixture() -> LayerUsage:
    """Four experts over four tokens in two calls; the last token's second expert has weight 0, so it selects one."""
    usage = LayerUsage(4)
    first = pairs([[0, 1], [0, 2]], [[0.5, 0.25], [1.0, 0.25]])
    second = pairs([[1, 0], [0, 2]], [[0.25, 0.75], [0.5, 0.0]])
    usage.add(stats([2, 1, 1, 0], [1.5, 0.25, 0.25, 0.0], [2, 2], first))
    usage.add(stats([2, 1, 0, 0], [1.25, 0.25, 0.0, 0.0], [2, 1], second))
    return usage


def test_shares_are_of_the_weight_and_sorted() -> None:
    """2.75, 0.5, 0.25 and 0 of 3.5."""
    assert mixture().shares() == pytest.approx([2.75 / 3.5, 0.5 / 3.5, 0.25 / 3.5, 0.0], abs=1e-8)


def test_active_units_have_mean_and_deviation_over_tokens() -> None:
    """2, 2, 2 and 1: mean 7 / 4, variance 13 / 4 - 49 / 16 = 3 / 16."""
    assert mixture().active_units.mean_and_std() == pytest.approx((1.75, (3 / 16) ** 0.5))


def test_cooccurrence_is_normalised_by_rows_without_the_diagonal() -> None:
    """0 went twice with 1 and once with 2; 3 was never chosen; a weight of 0 is no choice."""
    expected = [[0, 2 / 3, 1 / 3, 0], [1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    found = mixture().cooccurrence()
    assert found is not None
    for row, wanted in zip(found, expected, strict=True):
        assert row == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize(
    ("counts", "n_dead"),
    [([1, 1, 1, 1], 0), ([4, 2, 1, 0], 1), ([199, 1], 0), ([398, 1], 1), ([9, 0, 0], 2)],
    ids=["even", "unused", "at-one-percent", "under-one-percent", "two"],
)
def test_dead_units_serve_under_a_percent_of_the_mean(counts: list[int], n_dead: int) -> None:
    """Of 199 and 1 the mean is 100, and 1 is not under 1."""
    usage = LayerUsage(len(counts))
    usage.add(stats(counts, [float(c) for c in counts], [1] * sum(counts)))
    assert usage.n_dead == n_dead


def test_long_curves_keep_their_ends_and_wide_matrices_are_left_out() -> None:
    """512 points of 2000 units; no pairs of more than 128 experts, of one expert a token, or of every unit."""
    n = 2000
    usage = LayerUsage(n)
    usage.add(stats([1] * n, [float(i) for i in range(n)], [n]))
    shares, total = usage.shares(), n * (n - 1) / 2
    assert len(shares) == MAX_POINTS and shares[0] == pytest.approx((n - 1) / total, abs=1e-8) and shares[-1] == 0.0
    assert usage.cooccurrence() is None
    wide = MAX_COOCCURRENCE + 1
    for selection in (pairs([[0, 1]], [[1.0, 1.0]], wide), Selection.fixed(torch.tensor([[0]]), torch.ones(1, 1), 4)):
        layer = LayerUsage(selection.n_units)
        layer.add(stats([1] * selection.n_units, [1.0] * selection.n_units, [1], selection))
        assert layer.cooccurrence() is None


def test_a_model_is_counted_over_layers_and_calls() -> None:
    """Three layers of 4, 4 and 2 units with 1, 1 and 1 dead ones; the middle layer's pairs."""
    counter = UsageCounter()
    for indices, weights in (([[0, 1], [0, 2]], [[0.5, 0.25], [1.0, 0.25]]), ([[1, 0], [0, 2]], [[0.25, 0.75], [0.5, 0.5]])):
        window = CollectedStats(
            a=[stats([2, 1, 1, 0], [1.0, 1.0, 1.0, 0.0], [2, 2])],
            b=[stats([2, 1, 1, 0], [1.0, 1.0, 1.0, 1.0], [2, 2], pairs(indices, weights))],
            c=[stats([2, 0], [1.0, 0.0], [1, 1])],
        )
        counter.observe(window)
    found = counter.result()
    assert found.dead_share == 0.3
    assert [layer.uniform for layer in found.usage] == [0.25, 0.25, 0.5]
    assert found.active[2] == ActiveChannels(layer=2, mean=1.0, std=0.0, total=2)
    matrix = [[0, 0.5, 0.5, 0], [1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert found.cooccurrence == Cooccurrence(layer=1, matrix=matrix)
