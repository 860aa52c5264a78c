"""`bench figures`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from sparseffn.bench.candidates import DTYPES, check_backends
from sparseffn.cli.bench_output import check_out, say, show, write_files
from sparseffn.cli.compare import set_threads
from sparseffn.cli.output import parse_duration
from sparseffn.devices import find_device
from sparseffn.errors import UserError
from sparseffn.ops import requested_backend
from sparseffn.paper.figure_points import bench_figures
from sparseffn.report.bench_report import read_bench
from sparseffn.results.bench_result import LayerSettings


def figures_command(options: argparse.Namespace) -> int:
    """Measure what is not there yet, then draw."""
    set_threads(options)
    check_out(options.out)
    path = Path(options.out) / "figures.json"
    result = _read(path) if options.redraw else _measured(options, path)
    return show(result, write_files(result, options.out), options)


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise UserError(f"`--redraw` must have a result to draw; got no {str(path)!r}; fix: measure first, without --redraw")
    return read_bench(path)


def _measured(options: argparse.Namespace, path: Path) -> dict[str, Any]:
    settings = LayerSettings(
        tokens=(options.tokens,),
        rounds=options.rounds,
        backends=(options.backend or requested_backend(),),
        dtype=options.dtype,
        device=options.device,
    )
    return measure_figures(options.figures, settings, path, time_limit=options.time_limit)


def measure_figures(figures: Sequence[int], settings: LayerSettings, path: Path, *, time_limit: str) -> dict[str, Any]:
    """What the file of the figures holds, once what it lacks and what fits is measured; tells its progress.

    Args:
        figures: numbers of the paper's.
        settings: how layers are timed.
        path: the file.
        time_limit: as typed, `20m`; see `parse_duration`.

    Raises:
        UserError: the device or a backend is not there, or the time limit is none.
    """
    check_backends(settings.backends, find_device(settings.device), DTYPES[settings.dtype])
    limit_s = parse_duration(time_limit, "time-limit")
    return msgspec.to_builtins(bench_figures(figures, settings, path, time_limit_s=limit_s, progress=say))
