"""The paper's tables of hyperparameters: each as it is here, with the published value behind it where the two differ."""

from __future__ import annotations

from sparseffn.errors import UserError
from sparseffn.report import formats
from sparseffn.report.paper_cells import Cell
from sparseffn.report.paper_result import SETTINGS_KIND
from sparseffn.report.paper_view import Block, PaperTable, build_paper_table, numbered_title
from sparseffn.report.result import Result

VERSION = 1


def build_table(result: Result) -> PaperTable:
    """Arrange the parsed JSON of a table of either kind.

    Raises:
        UserError: the kind or version is another, or the file is damaged.
    """
    return build_settings_table(result) if result.get("kind") == SETTINGS_KIND else build_paper_table(result)


def build_settings_table(result: Result) -> PaperTable:
    """Arrange the parsed JSON of a table of hyperparameters.

    Raises:
        UserError: the version is another or the file is damaged.
    """
    if result.get("version") != VERSION:
        raise UserError(
            f"`version` of the table must be {VERSION}; got {result.get('version')!r}; fix: run `sparseffn reproduce` again"
        )
    try:
        return _table(result)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(
            f"the table is damaged: {type(error).__name__} {error}; fix: run `sparseffn reproduce` again"
        ) from error


def _table(result: Result) -> PaperTable:
    names = list(result["rows"][0]["here"])
    rows = tuple((Cell(text=row["name"]), tuple(_cell(row, name) for name in names)) for row in result["rows"])
    block = Block(
        name="settings",
        title="Settings",
        facts="",
        headings=tuple(("as it is here [as published, where it differs]", name, name) for name in names),
        rows=rows,
    )
    return PaperTable(
        name=result["table"],
        title=numbered_title(result),
        summary=f"Scale {result['scale']}, {result['settings']} settings.",
        incomplete=None,
        overview=None,
        blocks=(block,),
        footnotes={},
        notes=("A value in brackets is the published one, where it differs from the one here.",),
        environment=result["environment"],
    )


def _cell(row: Result, name: str) -> Cell:
    here = _number(row["here"][name])
    return Cell(text=f"{here} [{_number(row['published'][name])}]" if name in row["differences"] else here)


def _number(value: object) -> str:
    """Six digits at most; millions of parameters are not published with more."""
    return f"{value:.4g}" if isinstance(value, float) else formats.setting(value)
