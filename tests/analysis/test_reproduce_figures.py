"""The paper's figures from runs and from the benchmark: what is written, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparseffn.cli import bench, main, output, reproduce_figures
from sparseffn.cli.reproduce_figures import figures
from sparseffn.cli.reproduce_settings import ReproduceFigure
from sparseffn.errors import UserError
from sparseffn.paper import figure_runs
from sparseffn.paper.figure_runs import FIGURE_NAMES
from sparseffn.results.bench_result import LayerSettings


def settings(names: list[str], out: Path, song: Path, runs: list[Path], **changes: Any) -> ReproduceFigure:
    """Of one call."""
    given: dict[str, Any] = {
        "names": tuple(names),
        "from_": tuple(str(run) for run in runs),
        "out": str(out),
        "time_limit": "1s",
        "tokens": 4,
        "max_tokens": 300,
        "data_dir": str(song),
        "cache_dir": str(song.parent / "cache"),
    }
    return ReproduceFigure(**{**given, **changes})


def test_there_are_eleven_figures() -> None:
    """As in the paper."""
    assert tuple(f"fig{number}" for number in range(1, 12)) == FIGURE_NAMES


def test_figures_from_runs_stand_beside_the_statement(
    runs: dict[str, Path], song: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each from the runs that suit it; channels on validation and test, the rest on validation."""
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed here")
    assert figures(settings(["fig6", "fig1", "fig3", "fig7"], tmp_path / "f", song, list(runs.values()))) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "f" / "reproduced.json").read_text())["figures"]
    assert [(figure["name"], figure["runs"]) for figure in found] == [
        ("fig1", ["dense"]),
        ("fig3", ["sigma-moe"]),
        ("fig6", ["sigma-moe"]),
        ("fig7", ["sigma-moe"]),
    ]
    text = (tmp_path / "f" / "figures.md").read_text()
    for figure in found:
        assert figure["files"] == [f"{figure['name']}.png", f"{figure['name']}.svg"]
        assert all((tmp_path / "f" / file).stat().st_size > 1000 for file in figure["files"])
        assert all(words in text and words in printed for words in [figure["statement"], *figure["measured"]])
    assert "of 32 channels active" in found[0]["measured"][0] and "N_E = 4, layer 1:" in found[2]["measured"][0]


REFUSED = {
    "no-run": (["fig1"], [], r"must name a finished run of the dense block for fig1; got no run; fix: sparseffn train"),
    "no-dense": (["fig4"], ["sigma-moe"], r"of the dense block for fig4; got sigma-moe"),
    "no-experts": (["fig6"], ["dense"], r"of a mixture that selects several experts for fig6; got dense"),
    "no-mixture": (["fig7"], ["dense"], r"of a mixture of experts for fig7; got dense"),
    "none-of-several": (["fig3", "fig6"], ["dense"], r"of a mixture of experts for fig3"),
    "name": (["fig12"], ["dense"], r"unknown figure 'fig12'; fix: did you mean"),
}


@pytest.mark.parametrize(("names", "given", "message"), REFUSED.values(), ids=list(REFUSED))
def test_figure_without_its_run_is_refused_before_anything_is_written(
    names: list[str], given: list[str], message: str, runs: dict[str, Path], song: Path, tmp_path: Path
) -> None:
    """With the command that makes one."""
    with pytest.raises(UserError, match=message):
        figures(settings(names, tmp_path / "f", song, [runs[name] for name in given]))
    assert not (tmp_path / "f").exists()


def test_figure_that_lacks_its_run_does_not_stop_the_others(
    runs: dict[str, Path], song: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is listed with the reason wherever the others are."""
    monkeypatch.setattr(reproduce_figures, "can_draw", lambda: False)
    assert figures(settings(["fig1", "fig3"], tmp_path / "f", song, [runs["sigma-moe"]])) == 0
    printed, text = capsys.readouterr().out, (tmp_path / "f" / "figures.md").read_text()
    one, three = json.loads((tmp_path / "f" / "reproduced.json").read_text())["figures"]
    reason = "`--from` must name a finished run of the dense block for fig1; got sigma-moe; fix: sparseffn train"
    assert one["not_drawn"].startswith(reason) and (one["measured"], one["runs"]) == ([], [])
    assert three["runs"] == ["sigma-moe"] and three["measured"][0] in printed
    assert f"  not drawn: {reason}" in printed and f"Not drawn: {reason}" in text


def test_folder_that_is_no_run_is_refused(song: Path, tmp_path: Path) -> None:
    """By name."""
    with pytest.raises(UserError, match=r"config.json` must exist"):
        figures(settings(["fig1"], tmp_path / "f", song, [tmp_path]))


def test_figures_of_time_are_the_benchmarks(
    song: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All at once, with the time limit and the tokens given; the words are made from what it measured."""
    asked: list[tuple[object, ...]] = []

    def measure(numbers: list[int], timed: LayerSettings, path: Path, time_limit: str) -> str:
        asked.append((numbers, timed.tokens, path, time_limit))
        return "measured"

    monkeypatch.setattr(figure_runs, "bench_words", lambda result, number: [f"{result}, {number}"])
    monkeypatch.setattr(reproduce_figures, "measure_figures", measure)
    monkeypatch.setattr(output.importlib.util, "find_spec", lambda name: None)
    assert figures(settings(["fig9", "fig2"], tmp_path / "f", song, [], json=True)) == 0
    assert asked == [([2, 9], (4,), tmp_path / "f" / "figures.json", "1s")]
    two, nine = json.loads(capsys.readouterr().out)["figures"]
    assert (two["measured"], nine["measured"]) == (["measured, 2"], ["measured, 9"]) and nine["files"] == []
    assert "Not drawn: matplotlib is not installed." in (tmp_path / "f" / "figures.md").read_text()


def test_figures_without_a_folder_go_to_the_usual_one(
    runs: dict[str, Path], song: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As typed, without `--out`: drawn ones and timed ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce_figures, "can_draw", lambda: False)
    asked: list[Path] = []

    def measure(numbers: list[int], timed: object, path: Path, **limits: object) -> dict[str, Any]:
        asked.append(path)
        raise UserError("measured elsewhere")

    monkeypatch.setattr(bench, "bench_figures", measure)
    data = ["--data-dir", str(song), "--cache-dir", str(song.parent / "cache")]
    drawn = ["fig1", "fig3", "--from", *map(str, runs.values()), "--max-tokens", "300"]
    assert main(["reproduce", "figure", *drawn, *data, "--json"]) == 0
    assert {path.name for path in (tmp_path / "runs" / "figures").iterdir()} == {"reproduced.json", "figures.md"}
    assert main(["reproduce", "figure", "fig10"]) == 2 and asked == [Path("runs/figures/figures.json")]


def test_runs_of_one_method_get_labels_that_differ() -> None:
    """The folder's name where the method does not tell them apart."""
    methods = {"a/x": "dense", "b/x": "sigma-moe", "b/y": "sigma-moe", "c/y": "sigma-moe"}
    assert list(figure_runs._labels(methods).values()) == ["dense", "sigma-moe x", "sigma-moe y", "sigma-moe y'"]
