"""A study's files, made from its JSON alone: tables as Markdown, one HTML page, figures as SVG and PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparseffn.report.bench_page import render
from sparseffn.report.figures import write_plots
from sparseffn.report.result import Result
from sparseffn.report.sheet import markdown_sheet
from sparseffn.report.study_plots import study_plots
from sparseffn.report.study_tables import TITLES, check_study, reading, study_sheets
from sparseffn.storage import read_json, write_text


def read_study(path: str | Path) -> dict[str, Any]:
    """Read a `study-NAME.json`.

    Raises:
        UserError: the file is absent, is not JSON, or is not a study's result.
    """
    result = read_json(Path(path), fix="run `sparseffn study` again")
    check_study(result)
    return result


def study_markdown(result: Result) -> str:
    """Every table as Markdown."""
    return "\n".join(markdown_sheet(sheet) for sheet in study_sheets(result).values())


def study_html(result: Result, *, drawn: bool = True) -> str:
    """The page as text; without `drawn` it has its tables alone."""
    return render(
        result,
        title=TITLES[result["kind"]],
        command=f"study {result['settings']['study']}",
        reading=reading(result),
        sheets=list(study_sheets(result).values()),
        plots=study_plots(result) if drawn else [],
    )


def write_study(result: Result, folder: Path, *, drawn: bool = True) -> list[Path]:
    """Tables, page and, where matplotlib is there, figures; returns the files."""
    text, page = folder / f"{result['kind']}.md", folder / f"{result['kind']}.html"
    write_text(text, study_markdown(result))
    write_text(page, study_html(result, drawn=drawn))
    return [text, page, *(write_plots(study_plots(result), folder) if drawn else [])]
