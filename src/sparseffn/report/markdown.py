"""Tables as Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping

from sparseffn.report.table import Cell, Row, Table


def markdown_table(table: Table) -> str:
    """A table with everything that belongs to it, ending in a newline."""
    title = f"**{markdown_text(table.title)}**" if table.title else ""
    above = filter(None, (title, markdown_text(table.incomplete), markdown_text(table.lead)))
    below = (*footnote_texts(table.footnotes), *map(markdown_text, (*table.notes, *table.facts)))
    return paragraphs(*above, table_rows(table), *below)


def paragraphs(*texts: str) -> str:
    """Texts with an empty line between them, ending in a newline."""
    return "\n\n".join(texts) + "\n"


def table_rows(table: Table) -> str:
    """Head and rows alone."""
    head = [markdown_text(column.heading) for column in table.columns]
    sides = [":--" if column.is_words or i == 0 else "--:" for i, column in enumerate(table.columns)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, sides, *(_cells(row, table) for row in table.rows)))


def footnote_texts(footnotes: Mapping[str, str]) -> list[str]:
    """Letters and texts, a paragraph each."""
    return [f"<sup>{letter}</sup> {markdown_text(text)}" for letter, text in footnotes.items()]


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
