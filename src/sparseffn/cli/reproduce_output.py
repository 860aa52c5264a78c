"""What `sparseffn reproduce` writes to `--out` and prints in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sparseffn.cli.output import can_draw, print_rows
from sparseffn.report import formats
from sparseffn.report.paper_plots import sweep_plots
from sparseffn.report.paper_report import write_index, write_paper_table
from sparseffn.report.plotting import write_plots
from sparseffn.results.table_result import DryRunResult, PaperTable, TableResult
from sparseffn.storage import write_json


def write_tables(results: Mapping[str, PaperTable], out: str) -> list[Path]:
    """Each table's JSON and, beside it, the renderings; returns the files of the index of all that the folder holds."""
    for name, result in results.items():
        path = Path(out) / f"{name}.json"
        write_json(path, result)
        write_paper_table(path)
        if isinstance(result, TableResult) and result.sweep and can_draw():
            write_plots(sweep_plots(result), path.parent)
    return write_index(out)


def print_dry_run(result: DryRunResult) -> None:
    """Every run with its cost, and what the estimates rest on."""
    header = (
        "table",
        "column",
        "row",
        "params",
        "residual",
        "FLOPs, K/N_E",
        "FLOPs counted",
        "training FLOPs",
        "tokens",
        "memory",
        "time here",
        "time GPU",
    )
    rows = [
        (
            run.table,
            run.column,
            run.row + (" (shared)" if run.shared else ""),
            formats.count(run.params),
            formats.signed_percent(run.residual_percent) + ("*" if run.unequal else ""),
            "-" if run.flops_percent is None else formats.percent(run.flops_percent / 100),
            formats.percent(run.counted_flops_percent / 100),
            f"{run.training_flops:.2e}",
            formats.count(run.tokens),
            f"{run.memory_bytes / 2**30:.1f} GiB",
            _duration(run.seconds_here),
            _duration(run.seconds_gpu),
        )
        for run in result.runs
    ]
    print_rows(header, rows, title=f"every run, scale {result.scale}", n_words=3)
    totals = result.totals
    print(
        f"\n{result.n_distinct} distinct runs, seeds counted: {totals.training_flops:.2e} FLOPs, "
        f"{_duration(totals.seconds_here)} here, {_duration(totals.seconds_gpu)} on the GPU"
    )
    if names := result.without_runs:
        print(f"- {', '.join(names)}: no run needed; `sparseffn reproduce table {' '.join(names)}` prints what is counted")
    for name in ("here", "gpu", "memory"):
        print(f"- {name}: {getattr(result, name)}")
    if any(run.unequal for run in result.runs):
        print("- *: more than 0.5% off the dense model's parameters, as published")
    for reason in dict.fromkeys(run.corpus_missing for run in result.runs if run.corpus_missing):
        print(f"- {reason}")


def _duration(seconds: float) -> str:
    """In a unit that leaves few digits: some of these take years, which `clock` would give in hours."""
    for unit, size in (("y", 365.25 * 86400), ("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
