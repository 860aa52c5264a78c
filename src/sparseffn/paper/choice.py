"""The columns and rows that a user asks for, each table taking those that it has.

A row is named by its published label or by the one that the table shows, which has the scale's real numbers. At a small scale
the two may name different rows (Top-K, K=64 is published, and is what stands for K=128 there): then `published:` or `shown:`
before the label says which is meant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sparseffn.errors import UserError, unknown_name
from sparseffn.paper.counted import counted_columns
from sparseffn.paper.planned import Request
from sparseffn.paper.table_rows import shown_label
from sparseffn.paper.tables import Table

_NAMINGS = ("published", "shown")

# Rows' labels by key, for each naming; a published label is the key itself.
_Labels = Mapping[str, Mapping[str, str]]


def select_columns(
    wanted: Sequence[str] | None, tables: Sequence[Table], counted: Sequence[str]
) -> dict[str, list[str] | None]:
    """Of the wanted columns those that each table has, by the table's name; None: all of them.

    Args:
        wanted: names, or None.
        tables: those that are trained.
        counted: names of those that are not.

    Raises:
        UserError: no table has such a column, or a table has none of them.
    """
    has = {**{table.name: table.columns for table in tables}, **{name: counted_columns(name) for name in counted}}
    if wanted is None:
        return dict.fromkeys(has)
    every = {column.lower(): column for columns in has.values() for column in columns}
    for name in wanted:
        if name.lower() not in every:
            raise unknown_name("column", name, every.values())
    chosen = {}
    for table, columns in has.items():
        chosen[table] = [name for name in wanted if every[name.lower()] in columns]
        _refuse_empty(table, chosen[table])
    return chosen


def select_tables(
    tables: Sequence[Table], columns: Mapping[str, Sequence[str] | None], rows: Sequence[str] | None, request: Request
) -> list[Table]:
    """The tables with the chosen columns, and of the wanted rows those that each has.

    Raises:
        UserError: no table has such a row, a table has none of them, or a label names two rows of a table.
    """
    narrow = [table.selected(columns=columns[table.name], rows=None, settings=request.settings) for table in tables]
    if rows is None:
        return narrow
    labels = {table.name: _labels(table, request) for table in narrow}
    keys: dict[str, list[str]] = {table.name: [] for table in narrow}
    for wanted in rows:
        found = {name: key for name in keys if (key := _key(wanted, labels[name], name)) is not None}
        if not found:
            raise unknown_name(
                "row", wanted, {label for own in labels.values() for naming in own.values() for label in naming.values()}
            )
        for name, key in found.items():
            keys[name].append(key)
    for name, chosen in keys.items():
        _refuse_empty(name, chosen)
    return [table.selected(columns=columns[table.name], rows=keys[table.name], settings=request.settings) for table in tables]


def _refuse_empty(table: str, chosen: Sequence[str]) -> None:
    if not chosen:
        raise UserError(f"{table} has none of these columns or rows; fix: leave it out")


def _labels(table: Table, request: Request) -> _Labels:
    """Of all rows, with the numbers of the first column, as the table is labelled."""
    column = request.scale.column(table.columns[0], request.settings)
    return {
        "published": {row.key: row.key for row in table.rows},
        "shown": {row.key: shown_label(row, column) for row in table.rows},
    }


def _key(wanted: str, labels: _Labels, table: str) -> str | None:
    """The key of the row that a label names; None where the table has none. Case does not count."""
    namings = [naming for naming in _NAMINGS if wanted.lower().startswith(f"{naming}:")] or _NAMINGS
    label = wanted if len(namings) > 1 else wanted.partition(":")[2]
    named = (key for naming in namings for key, own in labels[naming].items() if own.lower() == label.strip().lower())
    found = list(dict.fromkeys(named))
    if len(found) > 1:
        choices = " or ".join(f"{f'published:{key}'!r}, shown as {labels['shown'][key]!r}" for key in found)
        raise UserError(f"each row must be named by a label of its own; got {wanted!r} of {table}; fix: {choices}")
    return found[0] if found else None
