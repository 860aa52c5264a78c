"""`analyze`: what a finished run's feedforward blocks do, as JSON, tables and figures."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from sparseffn.analysis import analyze_run
from sparseffn.analysis.run import finished_run
from sparseffn.cli.bench_output import can_draw, check_out, say
from sparseffn.cli.compare import set_threads
from sparseffn.cli.output import console, print_files, print_json
from sparseffn.cli.run import run_corpus
from sparseffn.data import Split
from sparseffn.report import print_tables
from sparseffn.report.analysis_plots import analysis_plots
from sparseffn.report.analysis_report import analysis_tables, facts_line
from sparseffn.report.plotting import write_plots
from sparseffn.storage import write_json
from sparseffn.training import RunSettings

SPLITS: dict[str, tuple[Split, ...]] = {"valid": ("valid",), "test": ("test",), "both": ("valid", "test")}

# Seconds between lines of progress.
_SAY_EVERY = 15.0


def analyze_command(options: argparse.Namespace) -> int:
    """Analyse a run, write everything, print the tables."""
    set_threads(options)
    out = Path(options.folder) / "analysis" if options.out is None else Path(options.out)
    finished_run(options.folder)
    check_out(str(out))
    analysis = analyzed(options.folder, options, SPLITS[options.split])
    written = [out / "analysis.json"]
    write_json(written[0], analysis)
    if can_draw():
        written += write_plots(analysis_plots(analysis), out)
    if options.json:
        print_json(analysis)
        return 0
    print_tables(analysis_tables(analysis), console())
    print(facts_line(analysis))
    print_files(path for path in written if path.suffix != ".svg")
    return 0


def analyzed(folder: str, options: argparse.Namespace, splits: Sequence[Split]) -> dict[str, Any]:
    """The analysis of a run; tells its progress.

    Args:
        folder: the run folder.
        options: with `max_tokens`, `data_dir` and `cache_dir`.
        splits: what to read.
    """
    run = finished_run(folder)
    corpus = run_corpus(run, RunSettings.read(run), options)
    said = [time.monotonic()]

    def on_progress(n_done: int, n_tokens: int) -> None:
        if time.monotonic() - said[0] >= _SAY_EVERY:
            said[0] = time.monotonic()
            say(f"{folder}: {n_done:,} of {n_tokens:,} tokens")

    found = analyze_run(folder, corpus, splits=splits, max_tokens=options.max_tokens, on_progress=on_progress)
    return msgspec.to_builtins(found)
