"""`sparseffn study`."""

from __future__ import annotations

import argparse
from pathlib import Path

from msgspec import to_builtins

from sparseffn.cli.bench_output import can_draw, check_out
from sparseffn.cli.compare import set_threads
from sparseffn.cli.output import Watch, console, parse_duration, print_files, print_json
from sparseffn.paper.study import StudySettings, study
from sparseffn.report import print_tables
from sparseffn.report.bench_report import machine_line
from sparseffn.report.study_report import study_tables, write_study


def study_command(options: argparse.Namespace) -> int:
    """Measure what is missing, print the tables, write them, the page and the figures."""
    set_threads(options)
    check_out(options.out)
    settings = StudySettings(
        study=options.study,
        corpus=options.corpus,
        data_dir=options.data_dir,
        cache_dir=options.cache_dir,
        n_seeds=options.seeds,
        budget_s=None if options.budget is None else parse_duration(options.budget),
    )
    watch = Watch(lambda nats: f"loss {nats:.3f} nats")
    try:
        result = to_builtins(study(settings, options.out, watcher=watch))
    finally:
        watch.close()
    written = write_study(result, Path(options.out), drawn=can_draw())
    if options.json:
        print_json(result)
        return 0
    print_tables(study_tables(result).values(), console())
    print(machine_line(result, timed=False))
    print_files(written)
    return 0
