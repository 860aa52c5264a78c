"""Routing over training: agreement worked out by hand, and snapshots that training leaves."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from sparseffn.analysis.over_training import chance_jaccard, over_training, overlap_of
from sparseffn.data import Corpus, evaluation_windows, unpadded
from sparseffn.errors import UserError
from sparseffn.training import RunSettings, load_run_model
from sparseffn.training.snapshots import list_snapshots, load_snapshot, snapshot


def rows(*sets: tuple[int, int]) -> torch.Tensor:
    """Two experts a token; -1 for none."""
    return torch.tensor(sets, dtype=torch.int16)


def test_stability_is_the_jaccard_index_of_the_sets() -> None:
    """Same set in another order 1; one of three 1/3; none 0; a lost second choice 1/2; a token without any does not count."""
    before = rows((0, 1), (0, 1), (0, 1), (0, 1), (-1, -1))
    after = rows((1, 0), (0, 2), (2, 3), (0, -1), (-1, -1))
    found = overlap_of(before, after, 4)
    assert found.jaccard == pytest.approx((1 + 1 / 3 + 0 + 1 / 2) / 4)


@pytest.mark.parametrize(("n", "k"), [(4, 2), (5, 3), (16, 1), (3, 3)], ids=["half", "forced-overlap", "top-1", "all"])
def test_chance_is_the_mean_over_all_pairs_of_sets(n: int, k: int) -> None:
    """By enumeration."""
    sets = [set(s) for s in itertools.combinations(range(n), k)]
    mean = sum(len(a & b) / len(a | b) for a in sets for b in sets) / len(sets) ** 2
    assert chance_jaccard(n, k) == pytest.approx(mean)


def test_load_over_steps_is_that_of_the_selections() -> None:
    """All on two of four experts: entropy 1/2, largest load twice the mean; then even."""
    found = over_training({0: [rows((0, 1), (1, 0))], 8: [rows((0, 1), (2, 3))]}, 4, "snapshots")
    assert [point.step for point in found.points] == [0, 8]
    loads = [(point.layers[0].entropy, point.layers[0].largest_over_mean) for point in found.points]
    assert loads == [pytest.approx((0.5, 2.0)), pytest.approx((1.0, 1.0))]
    assert found.stability[0].layers[0].jaccard == 0.5


def test_training_leaves_the_routing_of_every_validation_point(runs: dict[str, Path], corpus: Corpus) -> None:
    """At steps 0, 4, 8 and 12, small; the last is what the last checkpoint does; a dense run has none."""
    found = list_snapshots(runs["sigma-moe"])
    assert list(found) == [0, 4, 8, 12] and list_snapshots(runs["dense"]) == {}
    model, folder = load_run_model(runs["sigma-moe"])
    again = snapshot(model, corpus, RunSettings.read(folder).train)
    stored = load_snapshot(found[12])
    assert len(stored) == 2 and all(torch.equal(a, b) for a, b in zip(again, stored, strict=True))
    assert stored[0].dtype == torch.int16 and stored[0].shape[1] == 2
    assert not torch.equal(stored[0], load_snapshot(found[0])[0])


def test_damaged_snapshot_is_refused(tmp_path: Path) -> None:
    """By name."""
    path = tmp_path / "step-00000004.safetensors"
    path.write_bytes(b"no tensors")
    with pytest.raises(UserError, match=r"step-00000004.*must hold a routing snapshot.*fix: remove it"):
        load_snapshot(path)


@pytest.mark.parametrize(("n", "batch"), [(100, 8), (97, 8), (5, 8), (2, 3)], ids=["cut", "whole", "few", "one"])
def test_unpadded_text_fills_every_row_of_every_window(n: int, batch: int) -> None:
    """At most batch - 1 tokens are left out."""
    text = unpadded(np.arange(n), batch=batch)
    assert n - batch < len(text) <= n
    assert all(bool(window.mask.all()) for window in evaluation_windows(text, batch=batch, context=7))
