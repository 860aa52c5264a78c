"""`bench figures`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sparseffn.bench.backends import check_backends
from sparseffn.bench.figures import bench_figures
from sparseffn.bench.layer import DTYPES, LayerSettings
from sparseffn.bench.machine import find_device
from sparseffn.cli.bench_output import can_draw, check_out, say, show, write_files
from sparseffn.cli.compare import set_threads
from sparseffn.cli.output import parse_duration
from sparseffn.ops import requested_backend
from sparseffn.report.bench_page import read_bench
from sparseffn.report.bench_plots import plots
from sparseffn.report.figures import write_plots


def figures_command(options: argparse.Namespace) -> int:
    """Measure what is not there yet, then draw."""
    set_threads(options)
    check_out(options.out)
    result = measure_figures(options)
    drawn = write_plots(plots(result), Path(options.out)) if can_draw() else []
    return show(result, [*write_files(result, options.out), *drawn], options)


def measure_figures(options: argparse.Namespace) -> dict[str, Any]:
    """What `figures.json` in the folder `options.out` holds, once what it lacks and what fits is measured."""
    path = Path(options.out) / "figures.json"
    if options.redraw:
        return read_bench(path)
    settings = LayerSettings(
        tokens=(options.tokens,),
        rounds=options.rounds,
        backends=(options.backend or requested_backend(),),
        dtype=options.dtype,
        device=options.device,
    )
    check_backends(settings.backends, find_device(settings.device), DTYPES[settings.dtype])
    limit_s = parse_duration(options.time_limit, "time-limit")
    return bench_figures(options.figures, settings, path, time_limit_s=limit_s, say=say)
