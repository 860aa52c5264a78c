"""Studies: resumable, complete, sharing their runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from sparseffn.cli import main
from sparseffn.comparison import NoProgress
from sparseffn.errors import UserError
from sparseffn.models.presets import Preset
from sparseffn.paper.study import StudySettings, differences, study
from sparseffn.paper.study_runs import CPU, StudyScale
from sparseffn.paper.study_start import Grid, Point, schemes
from sparseffn.report.study_report import read_study, study_markdown, study_tables, write_study
from sparseffn.results.study_result import SelectorProbe, StudyResult, StudyRun
from sparseffn.storage import read

SHAPE = dataclasses.replace(CPU.preset.shape, d_model=16, d_ff=32, n_experts=4, expert_size=8, k=2)
PRESET: Preset = dataclasses.replace(CPU.preset, shape=SHAPE, n_heads=2, d_head=8, context=16, batch=2, eval_batch=2, steps=13)
GRID = Grid(
    d_model=32, n_layers=(1,), n_experts=(4, 8), expert_size=(4,), k=(2,), base=(1, 4, 4, 2), n_tokens=256, n_gradients=64
)
SCALE = StudyScale(grid=GRID, preset=PRESET, eval_tokens=200, start_seeds=2)


@pytest.fixture(scope="module")
def song(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small text."""
    path = tmp_path_factory.mktemp("song") / "song.txt"
    path.write_text("".join(f"{i} bottles of beer on the wall\n" for i in range(3000)))
    return str(path)


def settings(song: str, name: str, **changes: Any) -> StudySettings:
    """A study of seconds."""
    return StudySettings(**{"study": name, "scale": SCALE, "corpus": "text", "data_dir": song, "n_seeds": 1, **changes})


@pytest.fixture(scope="module")
def whole(song: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StudyResult]:
    """The init study in one go."""
    out = tmp_path_factory.mktemp("study") / "out"
    return out, study(settings(song, "init"), out)


def test_result_is_complete_and_comes_back_from_its_file(whole: tuple[Path, StudyResult]) -> None:
    """Two sizes with six schemes on two inputs, four variants with a probe at the start and at the end."""
    out, result = whole
    assert result == read(out / "study-init.json", StudyResult, fix="") and result.missing == [] == result.missing_sizes
    assert len(result.start) == 2 * 6 * 2 and len(GRID.points) == 2
    for variant in result.variants:
        (run,) = variant.runs
        steps = [probe.step for probe in run.probes]
        assert steps[0] == 0 and steps[-1] == 13 and len(steps) >= 6
        assert 0 < run.valid < 10 and 0 < run.probes[0].load_entropy <= 1


class _Interrupts(NoProgress):
    """Stops in the middle of the second run."""

    def run(self, label: str, seed: int, position: int, n_runs: int) -> Any:
        """As the watcher of every run."""

        def on_step(report: Any) -> None:
            if position == 1 and report.step == 7:
                raise KeyboardInterrupt

        return on_step


def test_interrupted_study_goes_on_to_the_same_figures(song: str, whole: tuple[Path, StudyResult], tmp_path: Path) -> None:
    """Sizes and runs that are there are not measured again; losses and probes are bit-identical."""
    with pytest.raises(KeyboardInterrupt):
        study(settings(song, "init"), tmp_path, progress=_Interrupts())
    marker = tmp_path / "start" / f"{GRID.points[0].name}.json"
    before = marker.stat().st_mtime_ns
    result = study(settings(song, "init"), tmp_path)
    assert marker.stat().st_mtime_ns == before
    assert result.variants == whole[1].variants and result.start == whole[1].start


def test_studies_share_runs_and_seeds_may_be_added(song: str, whole: tuple[Path, StudyResult]) -> None:
    """sigma-MoE as it is serves all three; a second seed adds to the first."""
    out, first = whole
    run = out / "runs" / "sigma-moe" / "seed-0" / "result.json"
    before = run.stat().st_mtime_ns
    balance = study(settings(song, "balance", n_seeds=2), out)
    assert run.stat().st_mtime_ns == before
    assert balance.variants[0].runs[0] == first.variants[0].runs[0]
    assert [len(variant.runs) for variant in balance.variants] == [2, 2, 2, 2]


def test_competition_tells_interference_apart(song: str, whole: tuple[Path, StudyResult]) -> None:
    """None for the sigmoid, some for the softmaxes."""
    result = study(settings(song, "competition"), whole[0])
    found = [variant.runs[0].probes[0].interference for variant in result.variants]
    assert found[0] == 0 and found[1] > 0 and found[2] > 0
    assert "interference" in study_markdown(result) and "gates" in study_tables(result)


def test_budget_that_allows_nothing_is_refused(song: str, tmp_path: Path) -> None:
    """With what to do; the time that does suffice for something makes a result that names what is missing."""
    with pytest.raises(UserError, match=r"`budget` must suffice for one measurement.*; fix: --budget 1m"):
        study(settings(song, "competition", budget_s=1e-6), tmp_path / "a")
    result = study(settings(song, "init", budget_s=1e-6), tmp_path / "b")
    assert result.missing_sizes == [GRID.points[1].name] and len(result.missing) == 4
    assert "not run yet" in study_markdown(result) and GRID.points[1].name in study_markdown(result)
    page = write_study(result, tmp_path / "b")[1].read_text()
    assert "not run yet" in page


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"study": "inti"}, "unknown study 'inti'; fix: did you mean 'init'"),
        ({"n_seeds": 0}, "`seeds` must be at least 1; got 0; fix: --seeds 3"),
    ],
    ids=["study", "seeds"],
)
def test_settings_out_of_range_are_refused(song: str, changes: dict[str, Any], message: str) -> None:
    """Before anything is read."""
    with pytest.raises(UserError, match=message):
        settings(song, **{"name": "init", **changes} if "study" not in changes else {"name": changes["study"]})


def test_unknown_scheme_is_refused() -> None:
    """What a typing error would be."""
    with pytest.raises(UserError, match="`init` must be one of"):
        next(schemes(Point(1, 4, 4, 2), 32)).replace(init="xavier")


def test_folder_of_another_scale_is_refused(song: str, whole: tuple[Path, StudyResult]) -> None:
    """Nothing is overwritten."""
    other = dataclasses.replace(SCALE, eval_tokens=100)
    with pytest.raises(UserError, match=r"scale.eval_tokens is 200, not 100"):
        study(settings(song, "init", scale=other), whole[0])


def test_run_of_a_study_is_evaluated_like_any_other(
    song: str, whole: tuple[Path, StudyResult], capsys: pytest.CaptureFixture[str]
) -> None:
    """On the whole split, which says that the run's own loss is of less; another corpus is refused by its digest."""
    run = whole[0] / "runs" / "sigma-moe" / "seed-0"
    assert main(["eval", str(run), "--data-dir", song, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["predictions"] > 200 and found["run_evaluated_tokens"] == 200
    assert main(["eval", str(run), "--data-dir", song]) == 0
    assert "the run's own results are of its first 200 tokens" in capsys.readouterr().out
    other = Path(song).with_name("other.txt")
    other.write_text(Path(song).read_text()[:-31])
    assert main(["eval", str(run), "--data-dir", str(other)]) == 2
    assert f"the corpus must be the run's, digest {found['digest']}; got" in capsys.readouterr().err


def test_damaged_files_are_named(song: str, whole: tuple[Path, StudyResult], tmp_path: Path) -> None:
    """A result that is cut short, and one of something else."""
    path = tmp_path / "study-init.json"
    path.write_text((whole[0] / "study-init.json").read_text()[:100])
    with pytest.raises(UserError, match="must hold JSON"):
        read_study(path)
    path.write_text(json.dumps({"kind": "layer", "format": 1}))
    with pytest.raises(UserError, match="must hold a valid `kind`; got invalid enum value 'layer'"):
        read_study(path)


def test_every_figure_is_written(whole: tuple[Path, StudyResult], tmp_path: Path) -> None:
    """Tables, page and drawings in both forms, from the file alone."""
    written = write_study(read_study(whole[0] / "study-init.json"), tmp_path)
    assert {path.suffix for path in written} == {".md", ".html", ".svg", ".png"}
    assert len([path for path in written if path.suffix == ".png"]) == 8
    assert all(path.stat().st_size > 500 for path in written)
    assert {"scale n_experts", "load k", "loss", "selectors"} <= set(study_tables(whole[1]))


def runs_of(*losses: float) -> list[StudyRun]:
    """Seeds from 0 on; the last probe's entropy is the loss's negative."""
    probe = SelectorProbe(
        load_entropy=0.0, dead=0.0, largest_over_mean=1.0, norm=1.0, norm_spread=0.0, gate_square=0.5, interference=0.0
    )
    return [
        StudyRun(seed=seed, valid=loss, test=loss, probes=[probe, structs.replace(probe, step=13, load_entropy=-loss)])
        for seed, loss in enumerate(losses)
    ]


def test_difference_is_paired_and_undecided_when_it_may_be_zero() -> None:
    """Only seeds that both have; 4.303 standard errors for three."""
    found = differences(runs_of(1.1, 2.1, 3.4), runs_of(1.0, 2.0, 3.0, 9.0))
    assert (found["valid"].difference, found["valid"].half_width) == pytest.approx((0.2, 0.4303), abs=1e-4)
    assert found["load_entropy"].difference == pytest.approx(-0.2) and found["valid"].n_seeds == 3
    assert not found["valid"].decided
    assert differences(runs_of(1.0), []) == {}
