"""Effective pairs: all of them where the choice is even, those within groups where groups are fixed."""

from __future__ import annotations

import numpy as np
import pytest

from sparseffn.analysis.pairs import pair_numbers


def rows(counts: np.ndarray) -> list[list[float]]:
    """As co-occurrence is stored."""
    return (counts / counts.sum(axis=1, keepdims=True)).tolist()


def test_even_choice_has_every_pair() -> None:
    found = pair_numbers(rows(1 - np.eye(8)))
    assert (found.effective, found.independent, found.possible) == (pytest.approx(28), pytest.approx(28), 28)


def test_fixed_groups_have_the_pairs_within_them() -> None:
    """Four groups of four: 24 of 120, where an independent choice with the same even loads has all."""
    groups = np.kron(np.eye(4), np.ones((4, 4))) - np.eye(16)
    found = pair_numbers(rows(groups + 1e-9 * (1 - np.eye(16))))
    assert found.effective == pytest.approx(24, rel=1e-3) and found.independent == pytest.approx(120, rel=1e-3)


def test_independent_choice_with_uneven_loads_is_recognised() -> None:
    """Tokens that draw pairs in proportion to products of weights: both numbers agree, below all pairs."""
    weights = np.array([4.0, 2.0, 1.0, 1.0, 0.5, 0.5])
    counts = np.outer(weights, weights)
    np.fill_diagonal(counts, 0.0)
    found = pair_numbers(rows(counts))
    assert found.effective == pytest.approx(found.independent, rel=1e-6) and found.effective < 12 < found.possible


def test_loads_come_from_the_rows_alone() -> None:
    """Any symmetric counts: the pairs' entropy is that of the counts themselves."""
    counts = np.random.default_rng(0).random((6, 6))
    counts = counts + counts.T
    np.fill_diagonal(counts, 0.0)
    shares = counts[np.triu_indices(6, 1)] / counts[np.triu_indices(6, 1)].sum()
    found = pair_numbers(rows(counts))
    assert found.effective == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
    assert found.effective <= found.independent * (1 + 1e-9)
