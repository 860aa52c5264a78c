"""Tables in the terminal: a wide one comes in as many parts as the width asks for, the rows' labels leading each."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from itertools import groupby

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from sparseffn.report.table import Cell, Table

# Characters of a label where a table needs several parts, and those that a column of words is to have before it is broken.
_LABEL_WIDTH, _WORDS_WIDTH = 26, 30


def print_tables(tables: Iterable[Table], console: Console | None = None) -> None:
    """Print tables with a blank line behind each."""
    console = console or Console(highlight=False)
    for table in tables:
        print_table(table, console)
        console.print()


def print_table(table: Table, console: Console | None = None) -> None:
    """Print a table with everything that belongs to it, to standard output by default."""
    console = console or Console(highlight=False)
    for line in filter(None, (table.title, table.incomplete, table.lead)):
        console.print(Text(line))
    for part in table_parts(table, console):
        console.print(part)
    lines = [f"{row.cells[0].text}: {row.missing}" for row in table.rows if row.missing]
    lines += [f"({letter}) {text}" for letter, text in table.footnotes.items()]
    for line in (*lines, *table.notes, *table.facts):
        console.print(Text(line))


def table_parts(table: Table, console: Console) -> list[RichTable]:
    """Whole groups of columns side by side while they fit the console."""
    indices = range(table.n_labels, len(table.columns))
    whole = _part(table, indices, None)
    if _width(whole, console) <= console.width:
        return [whole]
    parts: list[list[int]] = []
    for group in _groups(table):
        joined = [*parts[-1], *group] if parts else group
        if parts and _width(_part(table, joined, _WORDS_WIDTH), console) <= console.width:
            parts[-1] = joined
        else:
            parts.append(group)
    return [_part(table, part, None, label_width=_LABEL_WIDTH) for part in parts]


def _groups(table: Table) -> list[list[int]]:
    """Columns that are not parted: those of a group."""
    indices = range(table.n_labels, len(table.columns))
    return [list(group) for _, group in groupby(indices, key=lambda index: table.columns[index].group or index)]


def _width(part: RichTable, console: Console) -> int:
    # Unbounded: a measure within the console's width would never exceed it.
    return console.measure(part, options=console.options.update(width=10_000)).maximum


def _part(table: Table, indices: Sequence[int], words_width: int | None, *, label_width: int | None = None) -> RichTable:
    """The labels and these columns; columns of words no wider than `words_width`, where that is given."""
    part = RichTable(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    shown = [*range(table.n_labels), *indices]
    for index in shown:
        column = table.columns[index]
        if index < table.n_labels:
            width = _LABEL_WIDTH if words_width else label_width
            justify = "left" if column.is_words or index == 0 else "right"
            part.add_column(Text(column.heading), justify=justify, overflow="fold", vertical="bottom", max_width=width)
        elif column.is_words:
            part.add_column(Text(column.heading), overflow="fold", max_width=words_width)
        else:
            widest = max((len(_marked(row.cells[index])) for row in table.rows if not row.missing), default=0)
            # No wider than the numbers below, where its words allow.
            heading = textwrap.fill(column.heading, max(9, widest), break_long_words=False, break_on_hyphens=False)
            part.add_column(Text(heading), justify="right", overflow="fold")
    for row in table.rows:
        if row.missing:
            texts = [*(_marked(cell) for cell in row.cells), "missing", *("" for _ in indices[1:])]
        else:
            texts = [_marked(row.cells[index]) for index in shown]
        part.add_row(*map(Text, texts))
    return part


def _marked(cell: Cell) -> str:
    """Text with the letters of its footnotes behind it."""
    return cell.text + (f" ({','.join(cell.marks)})" if cell.marks else "")
