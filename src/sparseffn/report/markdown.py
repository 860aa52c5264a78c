"""Tables as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable

from sparseffn.report.table import Cell, Row, Table


def markdown_table(table: Table) -> str:
    """A table with everything that belongs to it, ending in a newline."""
    lines = [f"**{markdown_text(table.title)}**", ""] if table.title else []
    for text in filter(None, (table.incomplete, table.lead)):
        lines += [markdown_text(text), ""]
    lines += table_lines(table)
    lines += footnote_lines(table.footnotes.items())
    for text in (*table.notes, *table.facts):
        lines += ["", markdown_text(text)]
    return "\n".join(lines) + "\n"


def table_lines(table: Table) -> list[str]:
    """The rows alone."""
    head = (markdown_text(column.heading) for column in table.columns)
    sides = (":--" if column.is_words or i == 0 else "--:" for i, column in enumerate(table.columns))
    return [_line(head), _line(sides), *(_line(_cells(row, table)) for row in table.rows)]


def footnote_lines(footnotes: Iterable[tuple[str, str]]) -> list[str]:
    """Letters and texts, a paragraph each."""
    return [line for letter, text in footnotes for line in ("", f"<sup>{letter}</sup> {markdown_text(text)}")]


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is: no markup, no HTML, no new line, no end of a cell.

    What means nothing to Markdown stays readable in the source: a `_` within a word, brackets that make no link.
    """
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"[\\`*|~]|(?<![^\W_])_|_(?![^\W_])|\](?=[\[(:])", r"\\\g<0>", text)


def _cells(row: Row, table: Table) -> list[str]:
    cells = [_cell(cell) for cell in row.cells]
    if row.missing:
        cells += [markdown_text(row.missing), *("" for _ in table.columns[len(cells) + 1 :])]
    return cells


def _cell(cell: Cell) -> str:
    text = markdown_text(cell.text)
    if cell.link:
        # Only pairs of brackets may stand within a link, so that all are escaped.
        label = re.sub(r"\\?([\[\]])", r"\\\1", text)
        text = f"[{label}]({cell.link})"
    return text + (f" <sup>{','.join(cell.marks)}</sup>" if cell.marks else "")


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
