"""What commands print: progress, durations."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import subprocess
import sys

import pytest
from rich.console import Console

from sparseffn.cli.output import Progress, Speed, clock, console, log, parse_duration, print_json, print_rows
from sparseffn.cli.process import printable, write_any_text
from sparseffn.errors import UserError
from sparseffn.training.journal import StepReport

TEXT = "step 3/12  3.607 bits per byte  12,346 tokens/s  3:07 left"


def report(step: int = 3) -> StepReport:
    """A step with numbers that all differ."""
    return StepReport(step=step, n_steps=12, loss=2.5, balance_loss=-0.1, unit="byte", tokens_per_s=12345.6, seconds_left=187.4)


def progress(*, terminal: bool) -> tuple[Progress, io.StringIO]:
    """Progress that is written into memory."""
    file = io.StringIO()
    made = Progress()
    made.console = Console(file=file, force_terminal=terminal, width=200, color_system=None, highlight=False, markup=False)
    return made, file


def test_lines_tell_loss_speed_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a terminal: the first step, then one every 15 seconds, and the last."""
    now = [1000.0]
    monkeypatch.setattr("sparseffn.cli.output.time.monotonic", lambda: now[0])
    shown, file = progress(terminal=False)
    on_step = shown.run("pkm [a]", 1, 1, 4)
    for step, at in ((3, 0.0), (4, 14.9), (5, 15.1), (6, 20.0), (12, 21.0)):
        now[0] = 1000.0 + at
        on_step(report(step))
    lines = file.getvalue().splitlines()
    assert lines[0] == f"[2/4] pkm [a], seed 1: {TEXT}"
    assert [line.split("step ")[1].split("/")[0] for line in lines] == ["3", "5", "12"]


def test_bar_tells_the_same_in_a_terminal() -> None:
    """It ends where another line is printed."""
    shown, file = progress(terminal=True)
    shown.run("pkm [a]", 0, 0, 1)(report())
    assert shown.bar is not None and shown.bar.tasks[0].percentage == 25.0
    shown.log("timing")
    assert shown.bar is None
    text = file.getvalue()
    assert "[1/1] pkm [a], seed 0" in text and TEXT in text and text.rstrip().endswith("timing")


def test_a_run_ends_the_bar_of_the_one_before() -> None:
    """Never two at once."""
    shown, _ = progress(terminal=True)
    shown.run("a", 0, 0, 2)
    first = shown.bar
    shown.run("b", 0, 1, 2)
    assert first is not None and first.finished is False and not first.live.is_started
    assert shown.bar is not first
    shown.close()
    shown.close()


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


def test_speed_is_the_mean_of_the_last_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equally many tokens in twice the time halve what they count; steps of long ago do not count."""
    now = [0.0]
    monkeypatch.setattr("sparseffn.cli.output.time.monotonic", lambda: now[0])
    speed = Speed()
    assert speed.mean(dataclasses.replace(report(), tokens_per_s=1.0)) == 1.0
    now[0] = 11.0
    assert speed.mean(dataclasses.replace(report(), tokens_per_s=100.0)) == 100.0
    assert speed.mean(dataclasses.replace(report(), tokens_per_s=50.0)) == pytest.approx(2 / (1 / 100 + 1 / 50))


def test_json_has_no_number_that_json_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    """NaN and infinity are null, at any depth."""
    print_json({"a": [math.nan, {"b": -math.inf}], "c": 1.5})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {"a": [None, {"b": None}], "c": 1.5}


def test_cells_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    """Neither markup nor emoji nor escapes of a terminal."""
    print_rows(("a", "b"), [("[bold]x[/]", ":smile: \x1b[31m")])
    assert "[bold]x[/]" in (out := capsys.readouterr().out) and ":smile:" in out and r"\x1b[31m" in out


def test_control_characters_are_escaped() -> None:
    """But line ends and tabs."""
    assert printable("a\tb\n\x1b]0;x\x07\r\x9b\x7f") == "a\tb\n" + r"\x1b]0;x\x07\r\x9b\x7f"


@pytest.mark.parametrize("words", ["reproduce table table7", "match --help", "--help"])
def test_output_works_where_only_ascii_can_be_written(words: str) -> None:
    """Under LC_ALL=C: signs have stand-ins, nothing fails."""
    env = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-m", "sparseffn", *words.split()], env=env, capture_output=True, check=True)
    assert done.stdout.decode("ascii").strip() and done.stderr == b""


def test_characters_have_ascii_stand_ins() -> None:
    """Of the same meaning where there are any."""
    with io.TextIOWrapper(io.BytesIO(), encoding="ascii") as stream:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            write_any_text()
        stream.write("a \u00d7 b \u00b1 \u00e1 \u2192 \u4e2d \udcff")
        stream.flush()
        assert stream.buffer.getvalue() == b"a x b +- a -> ? ?"  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("words", "given", "wanted"),
    [
        (("eval", "no-such-run"), {}, "1000"),
        (("eval", "no-such-run"), {"GOMP_SPINCOUNT": "7"}, "7"),
        (("eval", "no-such-run"), {"OMP_WAIT_POLICY": "active"}, ""),
        (("methods", "--json"), {}, ""),
    ],
)
def test_training_shares_cores(words: tuple[str, ...], given: dict[str, str], wanted: str) -> None:
    """Before PyTorch is loaded, which reads it then; what the user has set stays, and other commands wait as they did."""
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    program = (
        "import atexit, os, sys; from sparseffn.__main__ import main; "
        "atexit.register(lambda: print('spins', os.environ.get('GOMP_SPINCOUNT', ''))); sys.exit(main())"
    )
    environment = {key: value for key, value in os.environ.items() if key not in names} | given
    ended = subprocess.run(
        [sys.executable, "-c", program, *words], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.stdout.splitlines()[-1] == f"spins {wanted}"


def test_cores_are_shared_before_pytorch_is_loaded() -> None:
    """PyTorch's threads read how they wait when it is imported: the command is parsed, and they are told, without it."""
    program = (
        "import sys; from sparseffn.cli import parse; share_cores = parse.share_cores\n"
        "def told(): share_cores(); print('torch' in sys.modules)\n"
        "parse.share_cores = told; parse.run(['eval', 'no-such-run'])"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert ended.stdout == "False\n"


def test_a_line_of_progress_is_not_folded_in_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    """As long as the longest of a comparison, on both streams."""
    line = "[4/4] sigma-moe, seed 0: step 74/107  3.202 bits per byte  12,987 tokens/s  0:05 left" + " or so" * 10
    log(line)
    console().print(line)
    assert capsys.readouterr() == (line + "\n", line + "\n")
