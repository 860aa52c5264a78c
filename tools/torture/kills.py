"""Runs that are killed, interrupted, or find the disk full, at random moments, and go on."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path

from tally import Tally
from victims import Pair, Victim, everything, in_child, wait

MAX_FAULTS = 5
"""Faults of one run, after which it may end."""


class Reference:
    """What a victim is without faults, and how long it takes."""

    def __init__(self, victim: Victim | Pair, folder: Path) -> None:
        self.victim, started = victim, time.perf_counter()
        _, status = os.waitpid(in_child(lambda: victim.train(folder / "whole"), folder / "log"), 0)
        assert status == 0, (folder / "log").read_text()
        self.seconds = time.perf_counter() - started
        self.whole = everything(folder / "whole")


def kill(reference: Reference, out: Path, number: int, draw: random.Random) -> int | None:
    """Train, and send a signal at a random moment; the exit code, None where the run ended by the signal."""
    child = in_child(lambda: reference.victim.train(out), out.with_suffix(".log"))
    time.sleep(draw.uniform(0.0, 0.7 * reference.seconds))
    os.kill(child, number)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == number:
        return None
    code = os.waitstatus_to_exitcode(status)
    return None if code == 128 + number else code


def kill_one_of_two(reference: Reference, out: Path, draw: random.Random) -> int | None:
    """Train in two processes and kill one of them at a random moment; None where the other one ended too, with a message."""
    assert isinstance(reference.victim, Pair), "of two processes"
    log = out.with_suffix(".log")
    children = reference.victim.start(out, log)
    time.sleep(draw.uniform(0.0, 0.7 * reference.seconds))
    killed = draw.choice(children)
    os.kill(killed, signal.SIGKILL)
    codes = {child: wait(child) for child in children}
    other = next(code for child, code in codes.items() if child != killed)
    # Either was done before the other was killed, or the killed one was.
    return None if codes[killed] == -signal.SIGKILL and other in (0, 2) else max(codes.values())


def fill_disk(reference: Reference, out: Path, draw: random.Random) -> int | None:
    """Train where no file may be larger than a random size, as on a disk that is full; None where the run was refused."""

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(10 ** draw.uniform(1, 5.5)), resource.RLIM_INFINITY))
        reference.victim.train(out)

    draw.random()
    _, status = os.waitpid(in_child(work, out.with_suffix(".log")), 0)
    code = os.waitstatus_to_exitcode(status)
    return None if code == 2 else code


def disturb(
    victims: Sequence[Victim | Pair], n_faults: int, folder: Path, tally: Tally, fault: Callable[[Reference, Path], int | None]
) -> None:
    """Disturb runs of all victims in turn until there were enough faults; each then goes on to its end and is compared."""
    references: dict[str, Reference] = {}
    for number, victim in enumerate(cycle(victims)):
        if tally.tried >= n_faults or not tally.time_is_left():
            return
        place = folder / f"{number}"
        place.mkdir()
        if victim.name not in references:
            references[victim.name] = Reference(victim, place)
        reference, out = references[victim.name], place / "run"
        faults, code = _disturb(reference, out, min(MAX_FAULTS, n_faults - tally.tried), fault)
        same = code == 0 and everything(out) == reference.whole
        what = out.with_suffix(".log").read_text()[-300:] if code else "other numbers"
        tally.add(faults, lost=0 if same else max(1, faults), what=f"{victim.name}: {what}")
        shutil.rmtree(place)


def _disturb(reference: Reference, out: Path, n: int, fault: Callable[[Reference, Path], int | None]) -> tuple[int, int]:
    """Disturb a run up to n times and let it end; returns the faults and the exit code."""
    for number in range(n):
        code = fault(reference, out)
        if code is not None:
            return number, code
    _, status = os.waitpid(in_child(lambda: reference.victim.train(out), out.with_suffix(".log")), 0)
    return n, os.waitstatus_to_exitcode(status)
