"""Turns, medians and ratios, with a clock that is told the time."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sparseffn.bench.timing import Turn, interleaved, medians, ratio, spread, take_turns

from .conftest import FakeClock


class Recorded(Turn):
    """Writes down what happens, and takes a given time in each round."""

    def __init__(self, name: str, log: list[str], clock: FakeClock, seconds: Callable[[int], float]) -> None:
        self.name, self.log, self.clock, self.seconds = name, log, clock, seconds

    def prepare(self, index: int) -> Callable[[], object]:
        self.clock.call(1000.0)
        self.log.append(f"prepare {self.name}{index}")

        def call() -> None:
            self.log.append(f"call {self.name}{index}")
            self.clock.call(self.seconds(index))

        return call

    def finish(self) -> None:
        self.clock.call(1000.0)
        self.log.append(f"finish {self.name}")


def test_order_rotates_and_only_calls_are_timed(clock: FakeClock) -> None:
    """Nobody is always first; preparation and tidying up cost nothing."""
    log: list[str] = []
    turns = {name: Recorded(name, log, clock, lambda index: 0.5) for name in "abc"}
    times = take_turns(turns, rounds=4, warmup=0, clock=clock)
    order = [line.removeprefix("call ") for line in log if line.startswith("call")]
    assert order == ["a0", "b0", "c0", "b1", "c1", "a1", "c2", "a2", "b2", "a3", "b3", "c3"]
    assert log[:3] == ["prepare a0", "call a0", "finish a"]
    assert times == {name: [0.5] * 4 for name in "abc"}


def test_warmup_rounds_are_not_timed(clock: FakeClock) -> None:
    """The first calls of a process are slow."""
    turns = {"a": Recorded("a", [], clock, lambda index: 100.0 if index < 2 else 1.0)}
    assert take_turns(turns, rounds=2, warmup=2, clock=clock) == {"a": [1.0, 1.0]}


@pytest.mark.parametrize(("seconds", "n"), [(0.25, 8), (1.0, 3), (1e-6, 200)], ids=["short", "long", "instant"])
def test_short_calls_get_more_rounds(seconds: float, n: int, clock: FakeClock) -> None:
    """Until they have been timed for long enough, with a bound."""
    turns = {"a": Recorded("a", [], clock, lambda index: seconds)}
    assert len(take_turns(turns, rounds=3, warmup=0, at_least_s=2.0, clock=clock)["a"]) == n


def test_ratio_is_taken_within_rounds() -> None:
    """A machine that slows down in some rounds slows both sides; the ratio of the medians would be 1.9."""
    times = {"a": [2.0, 2.0, 20.0, 20.0, 20.0], "dense": [1.0, 1.0, 10.5, 10.0, 10.0]}
    assert ratio(times, "a", "dense") == 2.0


def test_spread_is_median_and_quartiles() -> None:
    """Of 1..5, and of a single timing."""
    found = spread([5.0, 1.0, 4.0, 2.0, 3.0])
    assert (found.q1_s, found.median_s, found.q3_s, found.n) == (2.0, 3.0, 4.0, 5)
    assert spread([7.0]).q3_s == 7.0


def test_plain_calls_take_turns(clock: FakeClock) -> None:
    """What other parts of the project use."""
    times = interleaved({"x": lambda: clock.call(1.0), "y": lambda: clock.call(3.0)}, rounds=3, clock=clock)
    assert medians(times) == {"x": 1.0, "y": 3.0} and len(times["x"]) == 3
