"""The page of a benchmark: one HTML file with its tables, drawings and machine, that loads nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from sparseffn.errors import UserError
from sparseffn.report import formats
from sparseffn.report.bench_plots import plots
from sparseffn.report.bench_tables import machine_line, reading, sheets
from sparseffn.report.figures import Plot
from sparseffn.report.pages import fill_template
from sparseffn.report.result import FORMAT, Result
from sparseffn.report.sheet import Sheet
from sparseffn.storage import read_json, write_text

TITLES = {
    "layer": "Time of one layer",
    "step": "Time of a training step",
    "memory": "Bytes kept for backward",
    "roofline": "What this machine allows",
    "figures": "Time and memory over sizes",
}


def read_bench(path: str | Path) -> dict[str, object]:
    """Read a result of `sparseffn bench`.

    Raises:
        UserError: the file is absent, is not JSON, or is not of a kind and format known here.
    """
    result = read_json(Path(path), fix="measure again")
    if not isinstance(result, dict) or result.get("format") != FORMAT or result.get("kind") not in TITLES:
        raise UserError(f"{str(path)!r} must be a result of `sparseffn bench`, format {FORMAT}; fix: measure again")
    return result


def bench_html(result: Result, *, drawn: bool = True) -> str:
    """The page as text.

    Args:
        result: a parsed result.
        drawn: whether to draw; without matplotlib the page has its tables alone.

    Raises:
        UserError: something is to be drawn and matplotlib is not installed.
    """
    return render(
        result,
        title=TITLES[result["kind"]],
        command=f"bench {result['kind']}",
        reading=reading(result),
        sheets=sheets(result),
        plots=plots(result) if drawn else [],
    )


def render(result: Result, *, title: str, command: str, reading: str, sheets: Sequence[Sheet], plots: Sequence[Plot]) -> str:
    """The page of any result that has the benchmark's head; `command` is what made it, without `sparseffn`."""
    return fill_template(
        "bench.html.j2",
        title=title,
        command=command,
        machine=machine_line(result, timed=result["kind"] in TITLES),
        reading=reading,
        sheets=sheets,
        plots=plots,
        environment=result["environment"],
        settings=result["settings"],
        formats=formats,
        kind=result["kind"],
        markup=Markup,
    )


def write_bench_page(result: Result, path: str | Path, *, drawn: bool = True) -> None:
    """Write the page; see `bench_html`."""
    write_text(Path(path), bench_html(result, drawn=drawn))
