"""Damaged folders, read in this process and by whole commands: a clear error or unharmed numbers, nothing else."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from mutations import damage, fresh
from tally import Tally
from victims import HANG, SONG, in_child

from sparseffn.cli import main
from sparseffn.data import load_corpus
from sparseffn.data.shards import read_local
from sparseffn.errors import UserError
from sparseffn.training import RunFolder, RunSettings, TrainResult, load_run_model, load_run_tokenizer
from sparseffn.training.snapshots import list_snapshots, load_snapshot

READ_LIMIT_S, COMMAND_LIMIT_S = 10, 60
MORE_MEMORY = 4 << 30
"""Bytes that a command may ask for beyond what this process has mapped."""


def read_run(out: Path) -> dict[str, object]:
    """All that a run folder says to its readers."""
    folder = RunFolder(out)
    settings = RunSettings.read(folder)
    model, _ = load_run_model(out)
    with torch.no_grad():
        logits = model(torch.arange(8)[None] % settings.model.vocab_size).logits
    result = TrainResult.read(folder.result_path)
    return {
        "settings": settings,
        "logits": logits.numpy().tobytes(),
        "tokenizer": load_run_tokenizer(folder).to_json(),
        "result": result,
        "metrics": folder.read_metrics(),
        "routing": [[t.numpy().tobytes() for t in load_snapshot(path)] for path in list_snapshots(out).values()],
    }


def read_cache(folder: Path) -> object:
    """The tokens of a corpus, from its cache alone where that serves."""
    corpus = load_corpus("text", data_dir=folder / "song.txt", cache_dir=folder / "cache", tokenizer="chars")
    return corpus.digest, [corpus.tokens(split).tobytes() for split in ("train", "valid", "test")]


def read_shards(folder: Path) -> object:
    """Every document of a folder of two shards."""
    return [list(read_local(folder / f"{number}.json.gz")) for number in range(2)]


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise `TimeoutError` in what takes longer, as a pipe that nobody writes into."""

    def ring(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fuzz_reads(
    source: Path, read: Callable[[Path], object], n: int, work: Path, strangers: list[Path], tally: Tally, draw: random.Random
) -> None:
    """Damage copies of a folder and read them here."""
    whole = read(source)
    for _ in range(n):
        if not tally.time_is_left():
            return
        copy = fresh(source, work)
        root = copy / "cache" if (copy / "cache").is_dir() else copy
        what = "; ".join(damage(root, draw, strangers) for _ in range(1 + (draw.random() < 0.2)))
        outcome, lost = "refused", 0
        try:
            with limited(READ_LIMIT_S):
                found = read(copy)
            outcome, lost = ("unharmed", 0) if found == whole else ("other numbers", 1)
        except UserError as error:
            if "fix:" not in str(error):
                outcome, lost = f"no remedy: {error}", 1
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            outcome, lost = f"{type(error).__name__}: {str(error)[:200]}", 1
        tally.add(1, lost=lost, what=f"{what} -> {outcome}", outcome=outcome.split(":")[0])


def commands(folder: Path) -> dict[str, list[str]]:
    """Whole commands on a run folder in a folder with its text."""
    text = ["--data-dir", str(folder / "song.txt"), "--cache-dir", str(folder / "cache")]
    run = str(folder / "run")
    return {
        "eval": ["eval", run, *text, "--json", "--device", "cpu"],
        "generate": ["generate", run, "--n-tokens", "8", "--device", "cpu"],
        "analyze": ["analyze", run, *text, "--json", "--max-tokens", "200", "--device", "cpu"],
        "resume": [*train_command(folder), "--json"],
    }


def train_command(folder: Path) -> list[str]:
    words = ["train", "--method", "sigma-moe", "n_experts=4", "expert_size=8", "--preset", "tiny", "--steps", "4"]
    words += ["--batch", "2", "--context", "16", "--corpus", "text", "--tokenizer", "chars", "--device", "cpu"]
    words += ["--data-dir", str(folder / "song.txt"), "--cache-dir", str(folder / "cache")]
    return [*words, "--checkpoint-every", "2", "--eval-every", "2", "--out", str(folder / "run")]


def run_command(words: list[str], log: Path) -> tuple[int, str]:
    """Exit code and output of a command in a child of bounded memory, `COMMAND_LIMIT_S` of processor time or without any."""

    def work() -> int:
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + MORE_MEMORY, resource.RLIM_INFINITY))
        return main(words)

    child, waited, used, seen = in_child(work, log), 0.0, 0.0, time.monotonic()
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        time.sleep(0.01)
        before, seen = seen, time.monotonic()
        # A busy machine, or one that stops both of us for a while, is no hang.
        waited = waited + min(seen - before, 1.0) if (now := processor_s(child)) == used else 0.0
        if (used := now) > COMMAND_LIMIT_S or waited > COMMAND_LIMIT_S:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return HANG, "hangs"
    return os.waitstatus_to_exitcode(ended[1]), log.read_text(errors="replace")


def processor_s(process: int) -> float:
    """Seconds of processor that a child has used so far."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def numbers_of(output: str) -> object:
    """What a command printed for programs, without what depends on the clock; for people, as it is."""
    begin = output.find("{")
    try:
        data = json.loads(output[begin:]) if begin >= 0 else output
    except ValueError:
        return output
    clocks = ("seconds", "saving_seconds")
    return {key: value for key, value in data.items() if key not in clocks} if isinstance(data, dict) else data


def fuzz_commands(n: int, work: Path, strangers: list[Path], tally: Tally, draw: random.Random) -> None:
    """Damage copies of a finished or unfinished run, its text and its cache, and run commands on them."""
    source, place = work / "source", work / "place"
    source.mkdir()
    (source / "song.txt").write_text(SONG)
    # Commands name the copy: the source is made at its place and moved.
    source.rename(place)
    code, output = run_command(train_command(place), work / "log")
    assert code == 0, output
    place.rename(source)
    whole = {}
    for name, words in commands(place).items():
        fresh(source, place)
        code, output = run_command(words, work / "log")
        assert code == 0, output
        whole[name] = numbers_of(output)
    for _ in range(n):
        if not tally.time_is_left():
            return
        fresh(source, place)
        name, words = draw.choice(list(commands(place).items()))
        if name == "resume":
            (place / "run" / "result.json").unlink()
        root = place / draw.choice(["run", "run", "run", "cache"])
        what = "; ".join(damage(root, draw, strangers) for _ in range(1 + (draw.random() < 0.2)))
        before = outside(work, place)
        code, output = run_command(words, work / "log")
        lost = verdict(code, output, whole[name])
        if outside(work, place) != before:
            lost = "a file outside was changed"
        outcome = "lost" if lost else "refused" if code else "unharmed"
        tally.add(1, lost=bool(lost), what=f"{name} after {what} -> {lost}: {output[-400:]}", outcome=outcome)


def outside(work: Path, place: Path) -> dict[str, bytes]:
    """Files beside the folder that a command may write into."""
    return {str(path): path.read_bytes() for path in sorted((work / "source").rglob("*")) if path.is_file()}


def verdict(code: int, output: str, whole: object) -> str:
    """Why a command is lost; nothing where it is not."""
    if code == HANG:
        return "hangs"
    if code not in (0, 1, 2):
        return f"exit code {code}"
    if "Traceback (most recent call last)" in output:
        return "traceback"
    if code and "fix:" not in output:
        return "no remedy"
    if code == 0 and numbers_of(output) != whole:
        return "other numbers"
    return ""
