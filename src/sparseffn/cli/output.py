"""What commands print and write: tables, JSON, progress, durations, files."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec
import torch
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from sparseffn.cli.process import printable
from sparseffn.cli.settings import Machine, Printed
from sparseffn.data import to_metric
from sparseffn.devices import device_name, find_device
from sparseffn.errors import UserError
from sparseffn.report import Table, print_table, print_tables
from sparseffn.training.journal import OnStep, StepReport

# Seconds between lines of progress where there is no terminal to draw a bar in, and those that a speed is the mean of.
_LINE_EVERY = 15.0
_SPEED_OVER = 10.0


def console(*, stderr: bool = False) -> Console:
    """Where text is printed as it is; wide where it goes to no terminal, so that no table and no line is folded in a file."""
    width = None if (sys.stderr if stderr else sys.stdout).isatty() else 160
    return Console(stderr=stderr, width=width, highlight=False, markup=False, emoji=False)


def log(text: str) -> None:
    """A line of progress, on standard error."""
    console(stderr=True).print(text)


def print_json(data: object) -> None:
    """Print JSON for programs; what is not finite is null, as JSON has no word for it."""
    print(msgspec.json.format(msgspec.json.encode(data), indent=1).decode())


def print_rows(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "", n_words: int = 1) -> None:
    """A plain table; all columns but the first `n_words` are right-aligned."""
    shown = [tuple(map(printable, row)) for row in rows]
    print_table(Table.of(columns, shown, n_words=n_words, title=title), console())


def print_records(records: Sequence[Mapping[str, str]], *, title: str = "", n_words: int = 1) -> None:
    """A plain table of texts by heading; nothing where there are none."""
    if records:
        print_rows(list(records[0]), [list(record.values()) for record in records], title=title, n_words=n_words)


def show(result: object, settings: Printed, tables: Iterable[Table], facts: str = "", files: Iterable[Path] = ()) -> int:
    """Print a result as JSON, or its tables, a line of facts and where its files are; returns the exit code, 0."""
    if settings.json:
        print_json(result)
        return 0
    print_tables(tables, console())
    if facts:
        print(facts)
    print_files(files)
    return 0


def print_files(paths: Iterable[Path]) -> None:
    """Where files are, each as its kind and an address that a terminal opens."""
    for path in paths:
        print(f"{path.suffix[1:]}: {path.resolve().as_uri()}")


def check_out(out: str | Path | None) -> None:
    """Refuse a folder that cannot be written to before anything is measured; makes nothing.

    Raises:
        UserError: it is a file, or is in one, or the rights are missing.
    """
    if out is None:
        return
    nearest = next(p for p in (Path(out).absolute(), *Path(out).absolute().parents) if p.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        why = "cannot be written to" if nearest.is_dir() else "is a file"
        raise UserError(f"`--out` must be a folder to write to; got {str(out)!r}, where {nearest} {why}; fix: choose another")


MAX_SEEDS = 1000
"""More runs of one method than anybody can do: a slip, or an attack on the memory."""


def check_seeds(n: int) -> None:
    """Refuse a number of seeds that cannot be meant.

    Raises:
        UserError: it is not positive, or above `MAX_SEEDS`.
    """
    if not 1 <= n <= MAX_SEEDS:
        raise UserError(f"`--seeds` must be 1 to {MAX_SEEDS}; got {n}; fix: --seeds 3")


def can_draw() -> bool:
    """Whether matplotlib is there; reports where it is not."""
    found = importlib.util.find_spec("matplotlib") is not None
    if not found:
        log("nothing will be drawn: pip install 'sparseffn[plot]', then the same command again")
    return found


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


class Progress:
    """Progress of training runs: a bar in a terminal, a line now and then elsewhere. Goes to standard error."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = console(stderr=True)
        self.console.quiet = quiet
        self.bar: Bar | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def log(self, text: str) -> None:
        """End the last run's bar, and print a line."""
        self.close()
        self.console.print(text)

    def run(self, label: str, seed: int, position: int, n_runs: int) -> OnStep:
        """Begin a run; returns what its steps are reported to."""
        self.close()
        name, speed, last = f"[{position + 1}/{n_runs}] {label}, seed {seed}", Speed(), 0.0
        if self.console.is_terminal:
            before, after = (TextColumn(field, markup=False) for field in ("{task.description}", "{task.fields[text]}"))
            self.bar = Bar(before, BarColumn(), after, console=self.console)
            self.bar.add_task(name, total=None, text="")
            self.bar.start()

        def on_step(report: StepReport) -> None:
            nonlocal last
            metric, value = to_metric(report.loss, report.unit)
            text = (
                f"step {report.step}/{report.n_steps}  {value:.3f} {metric}  "
                f"{speed.mean(report):,.0f} tokens/s  {clock(report.seconds_left)} left"
            )
            if self.bar is not None:
                self.bar.update(self.bar.task_ids[0], total=report.n_steps, completed=report.step, text=text)
            elif time.monotonic() - last >= _LINE_EVERY or report.step == report.n_steps:
                last = time.monotonic()
                self.console.print(f"{name}: {text}")

        return on_step

    def close(self) -> None:
        """End the bar of the run before."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


class Speed:
    """Tokens per second over the steps of the last seconds."""

    def __init__(self) -> None:
        self._steps: deque[tuple[float, float]] = deque()

    def mean(self, report: StepReport) -> float:
        """The mean with one more step: steps have equally many tokens, so that times are what is averaged."""
        now = time.monotonic()
        self._steps.append((now, 1.0 / report.tokens_per_s))
        while now - self._steps[0][0] > _SPEED_OVER:
            self._steps.popleft()
        return len(self._steps) / sum(seconds for _, seconds in self._steps)


def use_machine(settings: Machine) -> torch.device:
    """Apply `--threads` and find `--device`; reports the device where another one could have been meant.

    Raises:
        UserError: there is no such device, or no thread.
    """
    if settings.threads is not None:
        if settings.threads < 1:
            raise UserError(f"`--threads` must be at least 1; got {settings.threads}; fix: leave it out to use all cores")
        torch.set_num_threads(settings.threads)
    device = find_device(settings.device)
    if device.type != "cpu":
        log(f"device: {device}, {device_name(device)}")
    return device
