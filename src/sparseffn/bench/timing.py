"""Interleaved timing: candidates take turns, so that a machine's drift hits all of them alike; medians are compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def interleaved(candidates: Mapping[str, Callable[[], object]], *, rounds: int = 7, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each call, candidates in turn.

    Args:
        candidates: name to a call without arguments.
        rounds: timed calls of each.
        warmup: calls of each before.
    """
    for _ in range(warmup):
        for call in candidates.values():
            call()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return times


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    """Median seconds by name."""
    return {name: statistics.median(values) for name, values in times.items()}
