"""Interleaved timing: candidates take turns, so that a machine's drift hits all of them alike; medians are compared.

Ratios are medians of the ratios within a round: what slows the machine for longer than a round slows both sides of each ratio,
and up to half of the rounds may be spoilt by a burst before the median moves. A ratio of medians has neither.
"""

from __future__ import annotations

import gc
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import final

from sparseffn.results.bench_result import Spread

Clock = Callable[[], float]
Times = Mapping[str, list[float]]

# No more rounds than this, however short they are: the median no longer moves.
_MOST_ROUNDS = 200


class Turn(ABC):
    """What a candidate does in a round: some preparation, one timed call, and tidying up."""

    @abstractmethod
    def prepare(self, index: int) -> Callable[[], object]:
        """Ready everything that is not to be timed for round `index`, and return the call that is."""

    def finish(self) -> None:  # noqa: B027
        """Drop what the timed call left behind; not timed."""


@final
class _PlainTurn(Turn):
    """The same call in every round."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.call = call

    def prepare(self, index: int) -> Callable[[], object]:
        return self.call


def interleaved(
    candidates: Mapping[str, Callable[[], object]], *, rounds: int = 7, warmup: int = 2, clock: Clock = time.perf_counter
) -> dict[str, list[float]]:
    """`take_turns` of calls that need no preparation."""
    turns = {name: _PlainTurn(call) for name, call in candidates.items()}
    return take_turns(turns, rounds=rounds, warmup=warmup, clock=clock)


def take_turns(
    turns: Mapping[str, Turn],
    *,
    rounds: int = 7,
    warmup: int = 2,
    at_least_s: float = 0.0,
    clock: Clock = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each candidate's timed calls; the order is rotated by one from round to round.

    Args:
        turns: candidates by name.
        rounds: timed calls of each, at least.
        warmup: untimed rounds before.
        at_least_s: go on until the timed calls have taken this long together, up to 200 rounds.
        clock: seconds from any start.
    """
    names = list(turns)
    with _no_garbage_collection():
        for index in range(warmup):
            _round(turns, names, index, clock)
        times: dict[str, list[float]] = {name: [] for name in names}
        index, timed_s = 0, 0.0
        while index < rounds or (timed_s < at_least_s and index < _MOST_ROUNDS):
            start = index % len(names)
            seconds = _round(turns, names[start:] + names[:start], warmup + index, clock)
            for name, value in seconds.items():
                times[name].append(value)
            timed_s += sum(seconds.values())
            index += 1
    return times


def _round(turns: Mapping[str, Turn], order: list[str], index: int, clock: Clock) -> dict[str, float]:
    seconds = {}
    for name in order:
        call = turns[name].prepare(index)
        start = clock()
        call()
        seconds[name] = clock() - start
        turns[name].finish()
    return seconds


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A collection would fall on whichever candidate happens to run."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def spread(times: list[float]) -> Spread:
    """Median and interquartile range of one or more timings."""
    if len(times) == 1:
        return Spread(median_s=times[0], q1_s=times[0], q3_s=times[0], n=1)
    q1, middle, q3 = statistics.quantiles(times, n=4, method="inclusive")
    return Spread(median_s=middle, q1_s=q1, q3_s=q3, n=len(times))


def ratio(times: Times, name: str, base: str) -> float:
    """Time of a candidate over another's: the median of the ratios within each round."""
    return statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))


def medians(times: Times) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in times.items()}
