"""A plain table, for the terminal and for the page."""

from __future__ import annotations

from dataclasses import dataclass

from sparseffn.report.grid import markdown_line


@dataclass(frozen=True, slots=True, kw_only=True)
class Sheet:
    """Its head, its rows, and how many leading columns hold words instead of numbers."""

    head: tuple[str, ...]
    rows: list[tuple[str, ...]]
    n_words: int
    title: str = ""
    """What the table shows; empty where a heading says so."""
    notes: tuple[str, ...] = ()
    """Lines below the table."""


def markdown_sheet(sheet: Sheet) -> str:
    """The sheet as Markdown: title, table, notes; ends in a newline."""
    marks = [":--" if i < sheet.n_words else "--:" for i in range(len(sheet.head))]
    lines = [f"**{sheet.title}**", ""] if sheet.title else []
    lines += [markdown_line(map(_escaped, cells)) for cells in (sheet.head, marks, *sheet.rows)]
    for note in sheet.notes:
        lines += ["", _escaped(note)]
    return "\n".join(lines) + "\n"


def _escaped(cell: str) -> str:
    """Sheets hold our own words, which stay readable in the source of a document."""
    return cell.replace("|", "\\|")
