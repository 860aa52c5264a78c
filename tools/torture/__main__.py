"""Does training survive? `python tools/torture` kills runs, fills disks and damages files at random, and says what was lost.

    python tools/torture                       half an hour: 200 kills, 10,000 reads, 600 commands
    python tools/torture --only kill --kills 10

Every run must end with the bits of an undisturbed one; everything that reads a damaged file must refuse it with a remedy, or
come to unharmed numbers. Faults are drawn from `--seed`. Exit code 1: something was lost.
"""

from __future__ import annotations

import argparse
import os

# One thread: a child that is forked while OpenMP has threads would wait for them for ever.
os.environ["OMP_NUM_THREADS"] = "1"

import functools
import gzip
import json
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from fuzz import fuzz_commands, fuzz_reads, read_cache, read_run, read_shards
from kills import disturb, fill_disk, kill, kill_one_of_two
from tally import Tally
from victims import SONG, Pair, make_corpus, make_victims

CLASSES = {
    "kill": 0.3,
    "one-of-two": 0.1,
    "terminate": 0.1,
    "disk-full": 0.1,
    "run-folders": 0.1,
    "caches": 0.05,
    "shards": 0.05,
    "commands": 0.2,
}
"""Faults by class, each with its share of the time."""


def main() -> int:
    """Torture, and print a line a class."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=28.0)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--reads", type=int, default=10_000)
    parser.add_argument("--commands", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(CLASSES), nargs="*", default=list(CLASSES))
    options = parser.parse_args()
    shares, tallies = sum(CLASSES[name] for name in options.only), []
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        for name in options.only:
            tally = Tally(name, time.monotonic() + 60 * options.minutes * CLASSES[name] / shares)
            work = Path(folder) / name
            work.mkdir()
            torture(name, options, work, tally, random.Random(f"{options.seed} {name}"))
            tallies.append(tally)
            sys.stdout.write(tally.line() + "\n")
            sys.stdout.flush()
    return int(any(tally.lost or not tally.tried for tally in tallies))


def torture(name: str, options: argparse.Namespace, work: Path, tally: Tally, draw: random.Random) -> None:
    """Try the faults of a class."""
    corpus = make_corpus(work)
    victims = make_victims(corpus)
    draw.shuffle(victims)
    place, copy = work / "runs", work / "copy"
    place.mkdir()
    strangers = []
    if name in ("run-folders", "commands"):
        victims[0].train(place / "stranger")
        strangers = [path for path in (place / "stranger").rglob("*") if path.is_file()]
    match name:
        case "kill":
            disturb(victims, options.kills, place, tally, functools.partial(kill, number=signal.SIGKILL, draw=draw))
        case "terminate":
            disturb(victims, options.kills // 4, place, tally, functools.partial(kill, number=signal.SIGTERM, draw=draw))
        case "one-of-two":
            pairs = [Pair(victim, strategy) for victim in victims for strategy in victim.strategies()]
            draw.shuffle(pairs)
            disturb(pairs, options.kills // 4, place, tally, functools.partial(kill_one_of_two, draw=draw))
        case "disk-full":
            disturb(victims, options.kills // 4, place, tally, functools.partial(fill_disk, draw=draw))
        case "run-folders":
            victim = next(victim for victim in victims if victim.name.startswith("sigma-moe"))
            victim.train(place / "run")
            fuzz_reads(place / "run", read_run, options.reads // 2, copy, strangers, tally, draw)
        case "caches":
            whole = place / "whole"
            whole.mkdir()
            make_corpus(whole)
            fuzz_reads(whole, read_cache, options.reads // 4, copy, strangers, tally, draw)
        case "shards":
            (place / "shards").mkdir()
            lines = "".join(json.dumps({"text": line}) + "\n" for line in SONG.splitlines()[:40]).encode()
            for number in range(2):
                (place / "shards" / f"{number}.json.gz").write_bytes(gzip.compress(lines, mtime=0))
            fuzz_reads(place / "shards", read_shards, options.reads // 4, copy, strangers, tally, draw)
        case _:
            fuzz_commands(options.commands, place, strangers, tally, draw)


if __name__ == "__main__":
    sys.exit(main())
