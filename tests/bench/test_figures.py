"""Points of the paper's figures: what they are, what fits, and that nothing is measured twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparseffn.bench.layer import bench_expert_counts
from sparseffn.errors import UserError
from sparseffn.paper import figure_points
from sparseffn.paper.figure_points import SWEEPS, Point, bench_figures, points_of
from sparseffn.results.bench_result import FigurePoint, FiguresResult, LayerSettings, Roof
from sparseffn.storage import read

from .conftest import FakeClock

SETTINGS = LayerSettings(tokens=(4,), rounds=1)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, quick: None) -> list[Point]:
    """Points that were measured, by a stand-in that takes no time."""
    points: list[Point] = []

    def measure(point: Point, settings: LayerSettings, roof: Roof) -> FigurePoint:
        points.append(point)
        return FigurePoint(**point.names, variable=point.sweep.variable, blocks=figure_points._blocks_json(point), layers={})

    monkeypatch.setattr(figure_points, "_measure", measure)
    return points


@pytest.mark.parametrize(
    ("number", "value", "sizes"),
    [
        (2, 4096, (4096, 16384, 128, 128)),
        (8, 256, (256, 1024, 32, 32)),
        (9, 256, (512, 32768, 256, 128)),
        (10, 64, (512, 2048, 32, 64)),
        (11, 2048, (2048, 4096, 32, 128)),
    ],
    ids=["2", "8", "9", "10", "11"],
)
def test_points_are_the_papers(number: int, value: int, sizes: tuple[int, ...]) -> None:
    """d_model, d_ff, N_E, G; K is 4 and the blocks have equal channels."""
    dense, mixture = SWEEPS[number].blocks(value)
    assert (dense.d_model, dense.d_ff, mixture.n_experts, mixture.expert_size) == sizes
    assert mixture.k == 4 and mixture.n_channels == dense.d_ff and value in SWEEPS[number].values


def test_nothing_is_measured_twice(measured: list[Point], tmp_path: Path) -> None:
    """Neither in a later run, nor under another figure: d_model 1024 is the same in figures 2, 8 and 11."""
    path = tmp_path / "figures.json"
    bench_figures([2], SETTINGS, path, time_limit_s=1e9)
    assert len(measured) == 5 and [p.value for p in measured] == [256, 512, 1024, 2048, 4096]
    found = bench_figures([2, 8, 11], SETTINGS, path, time_limit_s=1e9)
    assert len(measured) == 5 + 4 + 4
    assert len(found.points) == 15 and found.left_out == () and found.figures == (2, 8, 11)
    assert read(path, FiguresResult, fix="") == found


def test_file_is_whole_after_every_point(measured: list[Point], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt costs the point that was being measured."""
    path = tmp_path / "figures.json"
    measure = figure_points._measure

    def interrupted(point: Point, settings: LayerSettings, roof: Roof) -> FigurePoint:
        if len(measured) == 2:
            raise KeyboardInterrupt
        return measure(point, settings, roof)

    monkeypatch.setattr(figure_points, "_measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench_figures([9], SETTINGS, path, time_limit_s=1e9)
    assert [p["value"] for p in json.loads(path.read_text())["points"]] == [8, 16]


def test_what_does_not_fit_is_listed(
    measured: list[Point], tmp_path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By memory and by time; cheap points come first, and a longer limit takes up what was left."""
    monkeypatch.setattr(figure_points, "memory_bytes", lambda device: 2 * points_of([9])[4].bytes(4, 4))
    path = tmp_path / "figures.json"
    found = bench_figures([9], SETTINGS, path, time_limit_s=0.5, clock=clock)
    assert measured == [] and [entry.value for entry in found.left_out] == [8, 16, 32, 64, 128, 256]
    assert [entry.limit for entry in found.left_out] == ["time limit"] * 5 + ["half of the memory"]
    found = bench_figures([9], SETTINGS, path, time_limit_s=1e9, clock=clock)
    assert [entry.value for entry in found.left_out] == [256] and len(measured) == 5


def test_other_settings_are_refused(measured: list[Point], tmp_path: Path) -> None:
    """Points of two token counts, or of two machines, do not stand in one figure; what is there stays."""
    path = tmp_path / "figures.json"
    bench_figures([9], SETTINGS, path, time_limit_s=1e9)
    before = path.read_text()
    with pytest.raises(UserError, match=r"`tokens` is 4, not 8.*choose another --out"):
        bench_figures([9], LayerSettings(tokens=(8,), rounds=1), path, time_limit_s=1e9)
    path.write_text(before.replace('"threads": ', '"threads": 10'))
    with pytest.raises(UserError, match="`threads` is 10"):
        bench_figures([9], SETTINGS, path, time_limit_s=1e9)
    path.write_text('{"kind": "layer"}')
    with pytest.raises(UserError, match=r"must hold.*choose another --out"):
        bench_figures([9], SETTINGS, path, time_limit_s=1e9)


def test_unknown_figure_is_refused(tmp_path: Path) -> None:
    """Figures 1 and 3 to 7 are not of time and memory."""
    with pytest.raises(UserError, match="must be among 2, 8, 9, 10, 11; got 3"):
        bench_figures([3], SETTINGS, tmp_path / "figures.json", time_limit_s=1.0)


@pytest.mark.usefixtures("quick")
def test_a_point_is_really_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time of both passes, memory as the authors measured it: saved and output."""
    point = Point(sweep=SWEEPS[11], value=128)
    monkeypatch.setattr(figure_points, "points_of", lambda numbers: [point])
    found = bench_figures([11], SETTINGS, tmp_path / "figures.json", time_limit_s=1e9)
    (entry,) = found.points
    dense, moe = entry.layers["dense"], entry.layers["sigma-moe"]
    # 4 tokens: u of 4096 channels, y of 128, 4 bytes each.
    assert dense.memory_bytes == 4 * (4096 + 128) * 4
    assert moe.memory_bytes == 4 * (512 + 128) * 4 + moe.selection_bytes
    for timing in (dense.forward, dense.training, moe.forward, moe.training):
        assert timing.over_limit == pytest.approx(timing.median_s / timing.limit_s)
    assert dense.training.median_s > 0 and (moe.training.over_dense or 0) > 0


@pytest.mark.usefixtures("quick")
def test_expert_counts_are_compared_in_one_run() -> None:
    """Many over few, with the bytes of the gradients."""
    found = bench_expert_counts(SETTINGS, counts=(8, 16), n_tokens=4)
    assert set(found.layers) == {"N_E 8", "N_E 16"} and found.forward_over_few > 0 and found.training_over_few > 0
    assert found.layers["N_E 16"].gradient_bytes == 2 * found.layers["N_E 8"].gradient_bytes
    for layer in found.layers.values():
        assert layer.forward.over_limit == pytest.approx(layer.forward.median_s / layer.forward.limit_s)
