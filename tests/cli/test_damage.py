"""Damaged files of run folders: one line with file and remedy, exit code 2, nothing overwritten."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparseffn.cli import main

CHECKPOINT = "checkpoints/step-00000004/checkpoint.json"


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of a comparison of one method, seconds long."""
    path = tmp_path_factory.mktemp("song") / "song.txt"
    path.write_text("".join(f"{i} bottles of beer on the wall\n" for i in range(600)))
    text = ["--corpus", "text", "--data-dir", str(path)]
    return ["compare", "--methods", "dense", *text, "--steps", "4", "--batch", "2", "--context", "16"]


@pytest.fixture(scope="module")
def finished(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison, never written to."""
    out = tmp_path_factory.mktemp("finished") / "out"
    assert main([*words, "--out", str(out)]) == 0
    return out


def contents(folder: Path) -> dict[Path, bytes]:
    """Every file."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_refused(arguments: list[str], file: str, out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Exit code 2, a last line that names the file and a remedy, and no change on the disk; returns that line."""
    before = contents(out)
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    line = error.strip().splitlines()[-1]
    assert line.startswith("sparseffn: `") and file in line and "; got " in line and "fix: " in line
    assert "Traceback" not in error and contents(out) == before
    return line


RUN = "runs/dense/seed-0/"
DAMAGED = {
    "config": ("config.json", ["{}", "[]", '{"methods": 3}', "{", "\x00"]),
    "plan": ("plan.json", ["{}", "[]", '{"steps": "4"}', '{"steps": 4, "step_s": {"dense": -1}}']),
    "layers": ("layers.json", ["{}", "null", '{"(dense)": {"forward_s": 0.1}}']),
    "run-config": (RUN + "config.json", ["{}", "[]", '{"model": {}}']),
    "result": (RUN + "result.json", ["{}", "[]", '{"steps": 4, "valid": NaN, "test": 1, "seconds": 1}']),
    "usage": (RUN + "usage.json", ["{}", "[]", "usage"]),
    "metrics": (RUN + "metrics.jsonl", ["{}\n{}\n", '[]\n{"step": 1}\n', "\n\n"]),
}
CASES = [pytest.param(file, text, id=f"{name}-{text!r}") for name, (file, texts) in DAMAGED.items() for text in texts]


@pytest.mark.parametrize(("file", "text"), CASES)
def test_comparison_with_a_damaged_file_is_refused(
    file: str, text: str, finished: Path, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command, one file of the folder replaced."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / file).write_text(text)
    assert_refused([*words, "--out", str(out)], file, out, capsys)


RUN_DAMAGED = {
    "config": ("config.json", ["{}", "[]", '{"model": {"ffn": {}}, "train": {"steps": 4}, "corpus": {}}']),
    "tokenizer": ("tokenizer.json", ["{}", "[]", '{"tokenizer": "bites"}', "{"]),
    "checkpoint": (CHECKPOINT, ["{}", "[]", '{"format": 1}', '{"format": 2}', '{"format": 2, "step": "4"}', "{"]),
}
RUN_CASES = [pytest.param(file, text, id=f"{name}-{text!r}") for name, (file, texts) in RUN_DAMAGED.items() for text in texts]


@pytest.mark.parametrize(("file", "text"), RUN_CASES)
def test_run_with_a_damaged_file_is_refused(
    file: str, text: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By `eval` and by `generate`."""
    run = tmp_path / "run"
    shutil.copytree(finished / RUN, run)
    (run / file).write_text(text)
    assert_refused(["eval", str(run)], file, run, capsys)
    assert_refused(["generate", str(run), "--n-tokens", "1"], file, run, capsys)


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "step": lambda manifest: manifest.update(step=9),
    "seconds": lambda manifest: manifest["extra"].update(seconds=0.0),
    "more": lambda manifest: manifest.update(more=1),
    "digest": lambda manifest: manifest.update(digest="0" * 32),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_changed_manifest_is_refused(
    change: Callable[[dict[str, Any]], object], finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A field that another value fits as well."""
    run = tmp_path / "run"
    shutil.copytree(finished / RUN, run)
    manifest = json.loads((run / CHECKPOINT).read_text())
    change(manifest)
    (run / CHECKPOINT).write_text(json.dumps(manifest))
    line = assert_refused(["eval", str(run)], CHECKPOINT, run, capsys)
    assert "must match its digest" in line


def test_checkpoint_under_another_step_is_refused(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The folder's name is its step."""
    run = tmp_path / "run"
    shutil.copytree(finished / RUN, run)
    (run / "checkpoints" / "step-00000004").rename(run / "checkpoints" / "step-00000009")
    assert "got one of step 4" in assert_refused(["eval", str(run)], "step-00000009", run, capsys)


def test_checkpoint_of_another_model_is_refused(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Parameters that do not fit the config."""
    run = tmp_path / "run"
    shutil.copytree(finished / RUN, run)
    text = (run / "config.json").read_text()
    (run / "config.json").write_text(text.replace('"vocab_size": 256', '"vocab_size": 255'))
    assert "got one of another config" in assert_refused(["eval", str(run)], "step-00000004", run, capsys)


@pytest.mark.parametrize("file", ["layers.json", RUN + "result.json", RUN + "usage.json"])
def test_file_that_the_remedy_removes_is_made_again(file: str, finished: Path, words: list[str], tmp_path: Path) -> None:
    """The same command gives the same losses."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / file).unlink()
    assert main([*words, "--out", str(out)]) == 0
    losses = [json.loads((folder / RUN / "result.json").read_text())["test"] for folder in (out, finished)]
    assert losses[0] == losses[1] and (out / file).exists()
