"""What commands print: tables, JSON, progress, durations."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from sparseffn.errors import UserError
from sparseffn.report import Table, print_table
from sparseffn.training.loop import OnStep, StepReport

# Seconds between lines of progress where there is no terminal to draw a bar in.
_LINE_EVERY = 15.0


def console() -> Console:
    """Standard output; wide where it is not a terminal, so that no table is folded in a file."""
    return Console(width=None if sys.stdout.isatty() else 160, highlight=False)


def print_json(data: object) -> None:
    """Print JSON for programs."""
    print(json.dumps(msgspec.to_builtins(data), indent=1))


def print_rows(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "", n_words: int = 1) -> None:
    """A plain table; all columns but the first `n_words` are right-aligned."""
    print_table(Table.of(columns, rows, n_words=n_words, title=title), console())


def print_files(paths: Iterable[Path]) -> None:
    """Where files are, each as its kind and an address that a terminal opens."""
    for path in paths:
        print(f"{path.suffix[1:]}: {path.resolve().as_uri()}")


def parse_duration(text: str, name: str = "budget") -> float:
    """Seconds of `90s`, `8m`, `2h` or a plain number of seconds; `name` is the option's.

    Raises:
        UserError: the text is none of these, or not positive.
    """
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    number, unit = (text[:-1], text[-1]) if text[-1:] in units else (text, "s")
    try:
        seconds = float(number) * units[unit]
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise UserError(f"`{name}` must be a time such as 90s, 8m or 2h; got {text!r}; fix: --{name} 8m")
    return seconds


def clock(seconds: float) -> str:
    """`3:07` or `1:02:40`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Watch:
    """Progress of training runs: a bar in a terminal, a line now and then elsewhere. Goes to standard error."""

    def __init__(self, show: Callable[[float], str]) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.show = show
        self.progress: Progress | None = None

    def log(self, text: str) -> None:
        self.say(text)

    def say(self, text: str) -> None:
        """One line."""
        self.close()
        self.console.print(text, markup=False)

    def run(self, label: str, seed: int, position: int, n_runs: int) -> OnStep:
        """Begin a run; returns what is told of its steps."""
        self.close()
        name = f"[{position + 1}/{n_runs}] {label}, seed {seed}"
        return self._bar(name) if self.console.is_terminal else self._lines(name)

    def close(self) -> None:
        """End the bar of the run before."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

    def _text(self, report: StepReport) -> str:
        return (
            f"step {report.step}/{report.n_steps}  {self.show(report.loss)}  "
            f"{report.tokens_per_s:,.0f} tokens/s  {clock(report.seconds_left)} left"
        )

    def _bar(self, name: str) -> OnStep:
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
            console=self.console,
        )
        task = self.progress.add_task(name, total=None, text="")
        self.progress.start()
        progress = self.progress

        def on_step(report: StepReport) -> None:
            progress.update(task, total=report.n_steps, completed=report.step, text=self._text(report))

        return on_step

    def _lines(self, name: str) -> OnStep:
        last = [0.0]

        def on_step(report: StepReport) -> None:
            if time.monotonic() - last[0] >= _LINE_EVERY or report.step == report.n_steps:
                last[0] = time.monotonic()
                self.console.print(f"{name}: {self._text(report)}", markup=False)

        return on_step
