"""`sparseffn bench`: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparseffn.bench import benchmark
from sparseffn.cli import main

from .wrong_backends import wrong_backends

LAYER = ["bench", "layer", "--methods", "sigma-moe", "--tokens", "70", "--rounds", "1", "--no-peers"]


COMMANDS = {
    "layer": LAYER,
    "experts": ["bench", "experts", "--shapes", "16x8x4x2", "--tokens", "3", "70", "--rounds", "1"],
    "hf": ["bench", "hf", "--models", "tiny", "--prompt", "5", "--decoded", "2", "--rounds", "2"],
    "memory": ["bench", "memory", "--methods", "sigma-moe", "--tokens", "9", "--no-peers"],
    "roofline": ["bench", "roofline", "--preset", "tiny", "--tokens", "9"],
    "step": ["bench", "step", "--preset", "tiny", "--batch", "1", "--rounds", "1"],
}


@pytest.mark.usefixtures("quick_roof")
@pytest.mark.parametrize(
    ("kind", "words"),
    [pytest.param(*item, marks=pytest.mark.slow) if item[0] == "experts" else item for item in COMMANDS.items()],
    ids=list(COMMANDS),
)
def test_table_json_and_page_tell_the_same(
    kind: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A table with the machine, and with `--out` the result as JSON and as a page."""
    assert main([*words, "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    result = json.loads((tmp_path / f"{kind}.json").read_text())
    assert result["kind"] == kind and result["environment"]["blas"] in text and result["environment"]["date"] in text
    assert (tmp_path / f"{kind}.html").as_uri() in text
    assert kind != "step" or result["settings"]["backend"] in ("cpu", "torch")
    assert result["environment"]["freed_memory"] and (kind != "step" or result["ratio"] > 0)


@pytest.mark.usefixtures("quick_roof")
def test_json_is_all_that_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """Progress goes to standard error."""
    assert main([*LAYER, "--json"]) == 0
    out, err = capsys.readouterr()
    assert [row["label"] for row in json.loads(out)["rows"]] == ["dense", "sigma-moe"] and "checking sigma-moe" in err


TIMED = {
    "layer": [*LAYER, "--backends"],
    "step": [*COMMANDS["step"], "--backend"],
    "figures": ["bench", "figures", "--figures", "11", "--tokens", "2", "--rounds", "1", "--backend"],
}


@pytest.mark.usefixtures("quick_roof")
@pytest.mark.parametrize("backend", ["last-row", "scores"])
@pytest.mark.parametrize("words", TIMED.values(), ids=list(TIMED))
def test_no_speed_is_reported_for_a_wrong_kernel(
    words: list[str], backend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, the kernel's backend and error by name, no table and no file."""
    with wrong_backends():
        assert main([*words, backend, "--out", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert "sigma-moe must agree with float64 to be timed" in err and f"backend {backend}" in err and out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("quick_roof")
def test_figures_are_drawn_again_without_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From figures.json alone; the same files come out."""
    monkeypatch.setattr(benchmark, "last_level_cache_bytes", lambda device: (2**20, "made up"))
    words = ["bench", "figures", "--figures", "11", "--tokens", "2", "--rounds", "1", "--out", str(tmp_path)]
    assert main([*words, "--time-limit", "2.2s"]) == 0
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {"figures.json", "figures.html", "figure-11-time.svg", "figure-11-memory.png"} <= set(files)
    assert "Not measured" in files["figure-11-time.svg"].decode()
    monkeypatch.setattr("sparseffn.paper.figure_points._measure", None)
    assert main(["bench", "figures", "--redraw", "--out", str(tmp_path)]) == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
    assert "not measured: d_model 2,048: time limit" in capsys.readouterr().out


FIGURES = ["bench", "figures", "--rounds", "1"]
BAD = {
    "tokens": (["bench", "layer", "--tokens", "0"], "`--tokens` and `--rounds` must be at least 1"),
    "backend": ([*LAYER, "--backends", "trch"], "did you mean 'torch'"),
    "preset": ([*LAYER, "--preset", "papr"], "unknown preset 'papr'"),
    "expert-shape": (["bench", "experts", "--shapes", "1024x512"], "width x units x experts x experts of a token"),
    "expert-k": (["bench", "experts", "--shapes", "8x8x2x3"], "K at most E"),
    "expert-tokens": (["bench", "experts", "--tokens", "0"], "`--tokens` and `--rounds` must be at least 1"),
    "expert-dtype": (["bench", "experts", "--dtype", "float32", "float32"], "each once"),
    "hf-model": (["bench", "hf", "--models", "olmo"], "did you mean 'olmoe'"),
    "hf-prompt": (["bench", "hf", "--prompt", "1"], "`prompt` must be at least 2"),
    "hf-layers": (["bench", "hf", "--layers", "0"], "`layers` must be at least 1"),
    "device": ([*LAYER, "--device", "cuda"], "`--device` must be one that this machine has"),
    "method": (["bench", "memory", "--methods", "sigma-mo"], "did you mean 'sigma-moe'"),
    "batch": (["bench", "step", "--batch", "0"], "`batch` and `context` must be at least 1"),
    "rounds": (["bench", "step", "--rounds", "0"], "`--rounds` must be at least 1"),
    "figure": ([*FIGURES, "--figures", "3"], "must be among 2, 8, 9, 10, 11; got 3"),
    "figure-tokens": ([*FIGURES, "--tokens", "0"], "`--tokens` and `--rounds` must be at least 1"),
    "figure-backend": ([*FIGURES, "--backend", "trch"], "did you mean 'torch'"),
    "time-limit": ([*FIGURES, "--time-limit", "soon"], "`time-limit` must be a time such as"),
    "redraw": ([*FIGURES, "--redraw"], "measure first"),
}


@pytest.mark.parametrize(("words", "message"), BAD.values(), ids=list(BAD))
def test_bad_input_is_one_line_and_exit_code_2(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Value and remedy, no traceback, nothing written."""
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.strip().splitlines()[-1].startswith("sparseffn: ") and message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [LAYER, COMMANDS["step"], FIGURES], ids=["layer", "step", "figures"])
def test_unwritable_folder_is_refused_before_anything_is_measured(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here a folder inside a file."""
    (tmp_path / "file").write_text("precious")
    assert main([*words, "--out", str(tmp_path / "file" / "out")]) == 2
    error = capsys.readouterr().err
    assert "`--out` must be a folder to write to" in error and "checking" not in error
