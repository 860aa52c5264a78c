"""Forest plots: every seed is a dot, published effects are drawn, and a picture of other results is found."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest

from sparseffn.report.forest import ForestRow, claim_rows, experiment_rows, forest_plot, forests, stale_forests, write_forests
from sparseffn.results.evidence_result import ClaimsResult
from sparseffn.results.experiment_result import DecidedContrast, ExperimentResult
from sparseffn.storage import read, read_json, write_json

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results"


def test_pictures_in_the_documentation_are_those_of_the_results(tmp_path: Path) -> None:
    """Another value in a file makes one stale; written anew it is not."""
    assert stale_forests(RESULTS, ROOT / "docs") == []
    results = tmp_path / "results"
    shutil.copytree(RESULTS, results)
    path = results / "evidence" / "claims.json"
    claims = read_json(path, fix="")
    claims["claims"][0]["values"][0] += 0.001
    write_json(path, claims)
    shutil.copy(ROOT / "docs" / "forest-studies.svg", tmp_path)
    assert stale_forests(results, tmp_path)[0] == "forest-claims"
    write_forests(results, tmp_path)
    assert stale_forests(results, tmp_path) == []


def test_rows_are_the_claims_with_all_their_seeds() -> None:
    """Values in percent have the mean of the difference; words become a difference of two rows."""
    _, rows = forests(RESULTS)["forest-claims"]
    sigma = next(row for row in rows if row.label == "sigma-moe less dense")
    assert len(sigma.values) == 3 and sum(sigma.values) / 3 == pytest.approx(sigma.mean, abs=1e-3)
    assert sigma.published == pytest.approx(-0.34, abs=0.01)
    claims = read(RESULTS / "evidence" / "claims.json", ClaimsResult, fix="")
    assert len(claim_rows(claims)) == len(rows) < len(claims.claims)


def test_seeds_beyond_a_look_are_drawn() -> None:
    """In the percent of the look."""
    contrast = DecidedContrast(
        name="width", words="", claimed="better", published_percent=None, n_finished=3, values=[-0.01, -0.03, -0.05],
        n_seeds=2, nats=-0.02, low=-0.03, high=-0.01, percent=-2.0, low_percent=-3.0, high_percent=-1.0,
    )  # fmt: skip
    control = read(RESULTS / "evidence" / "control.json", ExperimentResult, fix="")
    (row,) = experiment_rows(msgspec.structs.replace(control, contrasts=[contrast]))
    assert row.values == pytest.approx([-1.0, -3.0, -5.0]) and (row.mean, row.low, row.high) == (-2.0, -3.0, -1.0)


def test_long_labels_are_shortened_and_all_dots_are_drawn() -> None:
    pytest.importorskip("matplotlib")
    row = ForestRow(label="a" * 80, values=[0.1, 0.2, 0.3], mean=0.2, low=0.0, high=0.4, published=0.5)
    plot = forest_plot([row, row], name="forest-test", title="A test")
    assert "dots are seeds (6)" in plot.caption and "a" * 43 + "\u2026" in plot.svg and "a" * 60 not in plot.svg
