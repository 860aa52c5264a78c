"""What `sparseffn reproduce` prints in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparseffn.cli.bench_output import can_draw
from sparseffn.cli.output import print_rows
from sparseffn.report.paper_table import render
from sparseffn.report.sweep_plots import sweep_plots
from sparseffn.stored import write_json


def write_tables(results: Mapping[str, dict[str, Any]], out: str) -> None:
    """Each table's JSON and, beside it, the renderings."""
    for name, result in results.items():
        path = Path(out) / f"{name}.json"
        write_json(path, result)
        render(path)
        if result.get("sweep") and can_draw():
            for plot in sweep_plots(result):
                path.with_name(f"{plot.name}.svg").write_text(plot.svg, encoding="utf-8")
                path.with_name(f"{plot.name}.png").write_bytes(plot.png)


def print_dry_run(result: dict[str, Any]) -> None:
    """Every run with its cost, and what the estimates rest on."""
    header = (
        "table",
        "column",
        "row",
        "params",
        "against dense",
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
            run["table"],
            run["column"],
            run["row"] + (" (shared)" if run["shared"] else ""),
            _large(run["params"]),
            f"{run['residual_percent']:+.2f}%" + ("*" if run["unequal"] else ""),
            "-" if run["flops_percent"] is None else f"{run['flops_percent']:.1f}%",
            f"{run['counted_flops_percent']:.1f}%",
            f"{run['training_flops']:.2e}",
            _large(run["tokens"]),
            f"{run['memory_bytes'] / 2**30:.1f} GiB",
            _duration(run["seconds_here"]),
            _duration(run["seconds_gpu"]),
        )
        for run in result["runs"]
    ]
    print_rows(header, rows, title=f"every run, scale {result['scale']}", n_words=3)
    totals = result["totals"]
    print(
        f"\n{result['n_distinct']} distinct runs, seeds counted: {totals['training_flops']:.2e} FLOPs, "
        f"{_duration(totals['seconds_here'])} here, {_duration(totals['seconds_gpu'])} on the GPU"
    )
    for name in ("here", "gpu", "memory"):
        print(f"- {name}: {result[name]}")
    if any(run["unequal"] for run in result["runs"]):
        print("- *: more than 0.5% off the dense model's parameters, as published")
    for reason in dict.fromkeys(run["corpus_missing"] for run in result["runs"] if run["corpus_missing"]):
        print(f"- {reason}")


def _large(number: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return str(number)


def _duration(seconds: float) -> str:
    for unit, size in (("y", 365.25 * 86400), ("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
