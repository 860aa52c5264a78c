"""Where the benchmark's results go: tables or JSON in the terminal, and with `--out` a JSON file and a page."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from sparseffn.cli.output import console, print_files, print_json
from sparseffn.errors import UserError
from sparseffn.report import print_tables
from sparseffn.report.bench_report import bench_tables, machine_line, write_bench
from sparseffn.results.bench_result import Head
from sparseffn.storage import write_json


def say(text: str) -> None:
    """A line of progress, on standard error."""
    Console(stderr=True, highlight=False).print(text, markup=False)


def deliver(measured: Head, options: argparse.Namespace) -> int:
    """Write a result where `--out` says, and print it."""
    # The command's own choice for its process, hence the same for all candidates; see cli/memory.py.
    kept = sys.platform.startswith("linux")
    result = msgspec.to_builtins(measured)
    result["environment"]["freed_memory"] = "kept by the process" if kept else "the C library's default"
    written = write_files(result, options.out) if options.out else []
    return show(result, written, options)


def show(result: dict[str, Any], written: list[Path], options: argparse.Namespace) -> int:
    """Print a result and where its files are."""
    if options.json:
        print_json(result)
        return 0
    print_tables(bench_tables(result), console())
    print(machine_line(result))
    print_files(written)
    return 0


def check_out(out: str | None) -> None:
    """Refuse a folder that cannot be written to before anything is measured; makes nothing.

    Raises:
        UserError: it is a file, or is in one, or the rights are missing.
    """
    if out is None:
        return
    nearest = next(p for p in (Path(out).absolute(), *Path(out).absolute().parents) if p.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        why = "cannot be written to" if nearest.is_dir() else "is a file"
        raise UserError(f"`--out` must be a folder to write to; got {out!r}, where {nearest} {why}; fix: choose another")


def can_draw() -> bool:
    """Whether matplotlib is there; says so where it is not."""
    found = importlib.util.find_spec("matplotlib") is not None
    if not found:
        say("nothing will be drawn: pip install 'sparseffn[plot]', then the same command again")
    return found


def write_files(result: dict[str, Any], out: str) -> list[Path]:
    """The result as JSON, as a page and, of the paper's figures, as drawings."""
    data = Path(out) / f"{result['kind']}.json"
    write_json(data, result)
    return [data, *write_bench(result, out, drawn=can_draw())]
