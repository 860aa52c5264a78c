"""Pictures of the evidence: every seed is a dot, courses are means over seeds, and a picture of other results is found."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from sparseffn.report.forest import ForestRow, claim_rows, experiment_rows, forest_plot
from sparseffn.report.pictures import pictures, stale_pictures, write_pictures
from sparseffn.report.plotting import standalone_svg
from sparseffn.report.scaling_plots import over_flops, over_params, params_plot
from sparseffn.report.study_report import read_study
from sparseffn.report.training_plots import collapse_courses, load_courses, loss_courses
from sparseffn.results.evidence_result import ClaimsResult
from sparseffn.results.experiment_result import DecidedContrast, ExperimentResult, ExperimentRun, PlannedCandidate
from sparseffn.storage import read, read_json, write_json

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results"


def test_pictures_in_the_documentation_are_those_of_the_results(tmp_path: Path) -> None:
    """Another value in a file makes one stale; written anew it is not."""
    assert stale_pictures(RESULTS, ROOT / "docs") == []
    assert all((ROOT / "docs" / f"{picture.name}.svg").exists() for picture in pictures(RESULTS))
    results = tmp_path / "results"
    shutil.copytree(RESULTS, results)
    path = results / "evidence" / "claims.json"
    claims = read_json(path, fix="")
    claims["claims"][0]["values"][0] += 0.001
    write_json(path, claims)
    shutil.copy(ROOT / "docs" / "forest-studies.svg", tmp_path)
    assert stale_pictures(results, tmp_path)[0] == "forest-claims"
    write_pictures(results, tmp_path)
    assert stale_pictures(results, tmp_path) == []


def test_rows_are_the_claims_with_all_their_seeds() -> None:
    """Values in percent have the mean of the difference; words become a difference of two rows."""
    claims = read(RESULTS / "evidence" / "claims.json", ClaimsResult, fix="")
    rows = claim_rows(claims)
    sigma = next(row for row in rows if row.label == "sigma-moe less dense")
    assert len(sigma.values) == 3 and sum(sigma.values) / 3 == pytest.approx(sigma.mean, abs=1e-3)
    assert sigma.published == pytest.approx(-0.34, abs=0.01)
    assert len(rows) < len(claims.claims)


def test_seeds_beyond_a_look_are_drawn() -> None:
    """In the percent of the look."""
    contrast = DecidedContrast(
        name="width", words="", claimed="better", published_percent=None, n_finished=3, values=[-0.01, -0.03, -0.05],
        n_seeds=2, nats=-0.02, low=-0.03, high=-0.01, percent=-2.0, low_percent=-3.0, high_percent=-1.0,
    )  # fmt: skip
    control = read(RESULTS / "evidence" / "control.json", ExperimentResult, fix="")
    (row,) = experiment_rows(msgspec.structs.replace(control, contrasts=[contrast]))
    assert row.values == pytest.approx([-1.0, -3.0, -5.0]) and (row.mean, row.low, row.high) == (-2.0, -3.0, -1.0)


def test_courses_are_means_over_common_seeds() -> None:
    """Of candidates that have a run; loads are paired differences."""
    control = read(RESULTS / "evidence" / "control.json", ExperimentResult, fix="")
    run = ExperimentRun(
        candidate="dense", seed=1, test=1.0, valid=1.0, train_s=1.0, wall_s=1.0, digest="a", version="1", sources="b",
        curve=[(0, 4.0), (10, 2.0)],
    )  # fmt: skip
    other = msgspec.structs.replace(run, candidate="sigma-MoE", curve=[(0, 4.0), (10, 1.0)])
    lone = msgspec.structs.replace(run, seed=2, curve=[(0, 9.0), (10, 9.0)])
    courses = {one.label: one for one in loss_courses(msgspec.structs.replace(control, runs=[run, other, lone]))}
    assert set(courses) == {"dense", "sigma-MoE"} and courses["dense"].n_seeds == 1
    assert courses["dense"].values == pytest.approx([4.0 / math.log(2), 2.0 / math.log(2)])
    assert loss_courses(msgspec.structs.replace(control, runs=[])) == []
    found = {one.label: one for one in load_courses([read_study(RESULTS / "study-balance.json")])}
    assert found["neither"].values[-1] == pytest.approx(-0.0737, abs=1e-4) and found["neither"].values[0] == 0


def test_long_labels_are_shortened_and_all_dots_are_drawn() -> None:
    pytest.importorskip("matplotlib")
    row = ForestRow(label="a" * 80, values=[0.1, 0.2, 0.3], mean=0.2, low=0.0, high=0.4, published=0.5)
    plot = forest_plot([row, row], name="forest-test", title="A test")
    assert "dots are seeds (6)" in plot.caption and "a" * 43 + "\u2026" in plot.svg and "a" * 60 not in plot.svg


def run_of(candidate: str, seed: int, test: float, **more: object) -> ExperimentRun:
    given = {"valid": test, "train_s": 1.0, "wall_s": 1.0, "digest": "", "version": "", "sources": "", **more}
    return msgspec.convert({"candidate": candidate, "seed": seed, "test": test, **given}, ExperimentRun)


def record(names: Sequence[str], runs: list[ExperimentRun]) -> ExperimentResult:
    """Candidates of 1, 2, ... million parameters, and a tenth of it in FLOPs."""
    control = read(RESULTS / "evidence" / "control.json", ExperimentResult, fix="")
    planned = [
        PlannedCandidate(name=name, params=(i + 1) * 10**6, flops=(i + 1) * 1e5, steps=1, ffn={})
        for i, name in enumerate(names)
    ]
    return msgspec.structs.replace(control, candidates=planned, runs=runs)


def test_loss_over_size_has_the_seeds_that_all_candidates_have() -> None:
    """A line for each method through the means of its widths, in bits, with the range of seeds."""
    names = ["dense, 8", "dense, 16", "sigma-MoE, 8"]
    runs = [run_of(name, seed, (2 + i + seed) * math.log(2)) for i, name in enumerate(names) for seed in (0, 1)]
    runs.append(run_of("dense, 8", 2, 99.0))
    dense, sigma = over_params(record(names, runs))
    assert (dense.label, dense.n_seeds, sigma.label) == ("dense", 2, "sigma-MoE")
    assert dense.points == [pytest.approx((1e6, 2.5, 2, 3)), pytest.approx((2e6, 3.5, 3, 4))]
    assert [point[0] for point in over_flops(record(names, runs))[0].points] == [1e5, 2e5]
    assert over_params(record(names, runs[:4])) == [], "a width lacks every run"
    assert "parameters" in standalone_svg(params_plot([dense, sigma], name="a", title="A"))


def test_evenness_is_that_of_the_worst_layer() -> None:
    loads = [{"steps": [0, 10], "entropy": [0.9, low], "dead": [0.0, 0.0]} for low in (0.8, 0.3)]
    (course,) = collapse_courses(record(["switch"], [run_of("switch", seed, 1.0, loads=loads) for seed in (0, 1)]))
    assert (course.steps, course.values, course.n_seeds) == ([0, 10], [0.9, 0.3], 2)
