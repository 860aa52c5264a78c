"""What commands print: progress, durations."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from sparseffn.cli.output import Watch, clock, parse_duration
from sparseffn.errors import UserError
from sparseffn.training.loop import StepReport

TEXT = "step 3/12  loss 2.500 nats  12,346 tokens/s  3:07 left"


def report(step: int = 3) -> StepReport:
    """A step with numbers that all differ."""
    return StepReport(step=step, n_steps=12, loss=2.5, balance_loss=-0.1, tokens_per_s=12345.6, seconds_left=187.4)


def watch(*, terminal: bool) -> tuple[Watch, io.StringIO]:
    """A watcher that writes into memory."""
    file = io.StringIO()
    made = Watch(lambda nats: f"loss {nats:.3f} nats")
    made.console = Console(file=file, force_terminal=terminal, width=200, color_system=None, highlight=False)
    return made, file


def test_lines_tell_loss_speed_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a terminal: the first step, then one every 15 seconds, and the last."""
    now = [1000.0]
    monkeypatch.setattr("sparseffn.cli.output.time.monotonic", lambda: now[0])
    watcher, file = watch(terminal=False)
    on_step = watcher.run("pkm [a]", 1, 1, 4)
    for step, at in ((3, 0.0), (4, 14.9), (5, 15.1), (6, 20.0), (12, 21.0)):
        now[0] = 1000.0 + at
        on_step(report(step))
    lines = file.getvalue().splitlines()
    assert lines[0] == f"[2/4] pkm [a], seed 1: {TEXT}"
    assert [line.split("step ")[1].split("/")[0] for line in lines] == ["3", "5", "12"]


def test_bar_tells_the_same_in_a_terminal() -> None:
    """It ends where another line is printed."""
    watcher, file = watch(terminal=True)
    watcher.run("pkm [a]", 0, 0, 1)(report())
    assert watcher.progress is not None and watcher.progress.tasks[0].percentage == 25.0
    watcher.say("timing")
    assert watcher.progress is None
    text = file.getvalue()
    assert "[1/1] pkm [a], seed 0" in text and TEXT in text and text.rstrip().endswith("timing")


def test_a_run_ends_the_bar_of_the_one_before() -> None:
    """Never two at once."""
    watcher, _ = watch(terminal=True)
    watcher.run("a", 0, 0, 2)
    first = watcher.progress
    watcher.run("b", 0, 1, 2)
    assert first is not None and first.finished is False and not first.live.is_started
    assert watcher.progress is not first
    watcher.close()
    watcher.close()


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (187.4, "3:07"), (3760, "1:02:40")])
def test_clock(seconds: float, text: str) -> None:
    """Minutes and seconds, hours where there are any."""
    assert clock(seconds) == text


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("8m", 480), ("2h", 7200), ("1.5m", 90), ("30", 30)])
def test_duration_is_read(text: str, seconds: float) -> None:
    """A number with a unit, or of seconds."""
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "-1s", "0", "nan", "inf", "8d"])
def test_other_durations_are_refused(text: str) -> None:
    """With the value."""
    with pytest.raises(UserError, match=f"got '{text}'; fix: --budget 8m"):
        parse_duration(text)
