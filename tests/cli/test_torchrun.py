"""The commands under torchrun: what several processes print and write is what one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparseffn.storage import read_json

SETTINGS = ["--corpus", "text", "--data-dir", "song.txt", "--batch", "4", "--context", "16", "--steps", "4", "--threads", "1"]


def command(folder: Path, n: int, *words: str) -> subprocess.CompletedProcess[str]:
    """`sparseffn WORDS` in n processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)] if n > 1 else []
    return subprocess.run(
        [sys.executable, *launcher, "-m", "sparseffn", *words],
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip


def done(folder: Path, n: int, *words: str) -> str:
    """Its output, with success."""
    ended = command(folder, n, *words)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "song.txt").write_text("".join(f"{i} bottles of beer on the wall\n" for i in range(600)))
    return tmp_path


@pytest.mark.parametrize("n_processes", [1, 2])
@pytest.mark.parametrize(("word", "code", "says"), [("--no-such-option", 2, "no-such-option"), ("--help", 0, "--strategy")])
def test_one_of_several_processes_ends_before_the_interpreter_goes_away(
    word: str, code: int, says: str, n_processes: int
) -> None:
    """Threads of gloo that still free a tensor then would abort it (exit code -6); what was printed is not lost."""
    program = (
        "import atexit, sys; from sparseffn.__main__ import main; "
        "atexit.register(print, 'the interpreter goes away'); print('printed'); sys.exit(main())"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, "train", word],
        env={**os.environ, "WORLD_SIZE": str(n_processes)}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ended.returncode == code
    assert says in ended.stderr + ended.stdout
    assert ended.stdout.startswith("printed\n")
    assert ended.stdout.endswith("the interpreter goes away\n") == (n_processes == 1)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", "ep-fsdp"])
def test_a_run_of_two_processes_is_evaluated_and_gone_on_from_by_one_and_two(strategy: str, folder: Path) -> None:
    """Losses by every number of processes, in float32."""
    words = ["train", "--method", "sigma-moe", *SETTINGS, "--json", "--out"]
    one, two = json.loads(done(folder, 1, *words, "one")), json.loads(done(folder, 2, *words, "two", "--strategy", strategy))
    assert two["valid"] == pytest.approx(one["valid"], rel=1e-4)
    again = [json.loads(done(folder, n, "eval", "two", "--json")) for n in (1, 2)]
    assert [found["nats_per_token"] for found in again] == pytest.approx([two["test"]] * 2, rel=1e-6)


@pytest.mark.slow
def test_a_comparison_of_two_processes_is_that_of_one(folder: Path) -> None:
    """Each method's losses; a method that cannot be spread is refused before anything is trained, with no traceback of ours."""
    words = ["compare", "--methods", "sigma-moe", "switch", *SETTINGS, "--out"]
    done(folder, 1, *words, "one")
    done(folder, 2, *words, "two", "--strategy", "ep-fsdp")
    losses = [
        {run.parent.parent.name: read_json(run)["valid"] for run in (folder / name).rglob("result.json")}
        for name in ("one", "two")
    ]
    assert set(losses[0]) == {"sigma-moe", "switch"}
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    refused = command(
        folder, 2, "compare", "--methods", "dense", "sigma-moe", *SETTINGS, "--strategy", "ep-fsdp", "--out", "no"
    )
    assert refused.returncode != 0
    assert refused.stderr.count("sparseffn: experts can be spread over 1 device for dense") == 1
    assert not list(folder.glob("no/runs/*/*/checkpoints"))


@pytest.mark.slow
def test_a_row_of_the_paper_by_two_processes_is_that_of_one(folder: Path) -> None:
    """The same run of the pool by its digest, whichever number of processes trains it; then nothing is left to train."""
    words = ["reproduce", "table", "table10", "--corpus", "text", "--data-dir", "song.txt", "--columns", "WT-S", "--steps", "4"]
    words += ["--rows", "sigma-moe", "--threads", "1", "--json", "--pool"]
    done(folder, 1, *words, "one")
    printed = done(folder, 2, *words, "two", "--strategy", "fsdp")
    (one,), (two,) = (list((folder / pool).rglob("result.json")) for pool in ("one", "two"))
    assert one.parent.name == two.parent.name
    for loss in ("valid", "test"):
        assert read_json(two)[loss] == pytest.approx(read_json(one)[loss], rel=1e-6)
    assert json.loads(done(folder, 1, *words, "two", "--view"))["rows"] == json.loads(printed)["rows"]
