"""What a user asks for of the paper's tables, of which each table has its part: columns, rows, runs and results.

    reproduction = Reproduction.plan(("table3",), request, columns=("WT-S",))
    run_all(reproduction.runs(), pool, ...)
    reproduction.results(pool)

A row is named by its published label or by the one that the table shows, which has the scale's real numbers. At a small scale
the two may name different rows (Top-K, K=64 is published, and is what stands for K=128 there): then `published:` or `shown:`
before the label says which is meant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sparseffn.errors import UserError, unknown_name
from sparseffn.paper.costs import Speed, dry_run
from sparseffn.paper.counted import COUNTED, counted_columns, settings_table, table7
from sparseffn.paper.jobs import NamedRun
from sparseffn.paper.measured import table_result
from sparseffn.paper.planned import PlannedTable, Request, plan_table
from sparseffn.paper.pool import Pool
from sparseffn.paper.table_rows import shown_label
from sparseffn.paper.tables import OWN_TABLES, Table, get_table
from sparseffn.results.table_result import DryRunResult, PaperTable

_NAMINGS = ("published", "shown")

# Rows' labels by key, for each naming; a published label is the key itself.
_Labels = Mapping[str, Mapping[str, str]]


def select_columns(
    wanted: Sequence[str], tables: Sequence[Table], counted: Sequence[str]
) -> Mapping[str, Sequence[str] | None]:
    """Of the wanted columns those that each trained or counted table has, by the table's name; None, where none is named: all.

    Raises:
        UserError: no table has such a column, or a table has none of them.
    """
    has = {**{table.name: table.columns for table in tables}, **{name: counted_columns(name) for name in counted}}
    if not wanted:
        return dict.fromkeys(has)
    every = {column.lower(): column for columns in has.values() for column in columns}
    for name in wanted:
        if name.lower() not in every:
            raise unknown_name("column", name, every.values())
    chosen = {table: [name for name in wanted if every[name.lower()] in columns] for table, columns in has.items()}
    _refuse_empty(chosen)
    return chosen


def select_tables(
    tables: Sequence[Table], columns: Mapping[str, Sequence[str] | None], rows: Sequence[str], request: Request
) -> list[Table]:
    """The tables with the chosen columns, and of the wanted rows those that each has.

    Raises:
        UserError: no table has such a row, a table has none of them, or a label names two rows of a table.
    """
    narrow = [table.selected(columns=columns[table.name], rows=None, settings=request.settings) for table in tables]
    if not rows:
        return narrow
    labels = {table.name: _labels(table, request) for table in narrow}
    keys: dict[str, list[str]] = {table.name: [] for table in narrow}
    for wanted in rows:
        found = {name: key for name, own in labels.items() if (key := _key(wanted, own, name)) is not None}
        if not found:
            every = {label for own in labels.values() for naming in own.values() for label in naming.values()}
            raise unknown_name("row", wanted, every)
        for name, key in found.items():
            keys[name].append(key)
    _refuse_empty(keys)
    return [table.selected(columns=columns[table.name], rows=keys[table.name], settings=request.settings) for table in tables]


def _refuse_empty(chosen: Mapping[str, Sequence[str]]) -> None:
    for table, names in chosen.items():
        if not names:
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


PAPER_TABLES = tuple(f"table{number}" for number in range(1, 11))


@dataclass(frozen=True, kw_only=True, eq=False)
class Reproduction:
    """Some of the paper's tables, and of our own, at a scale."""

    names: Sequence[str]
    request: Request
    trained: Mapping[str, PlannedTable]
    """By name; the others are counted."""
    columns: Mapping[str, Sequence[str] | None]
    """Those of each table that are wanted; None: all."""

    @classmethod
    def plan(
        cls, names: Sequence[str], request: Request, *, columns: Sequence[str] = (), rows: Sequence[str] = ()
    ) -> Reproduction:
        """Choose and size every cell; nothing is trained.

        Args:
            names: of tables; `all` is every table of the paper.
            request: scale, corpora, seeds.
            columns: wanted ones; none: all.
            rows: labels of wanted ones; none: all.

        Raises:
            UserError: a table, column or row is not there, or a label names two rows.
        """
        known = {*PAPER_TABLES, *OWN_TABLES, "all"}
        for name in names:
            if name not in known:
                raise unknown_name("table", name, known)
        chosen = list(dict.fromkeys(table for name in names for table in (PAPER_TABLES if name == "all" else (name,))))
        tables = [get_table(name) for name in chosen if name not in COUNTED]
        wanted = select_columns(columns, tables, [name for name in chosen if name in COUNTED])
        trained = {table.name: plan_table(table, request) for table in select_tables(tables, wanted, rows, request)}
        return cls(names=chosen, request=request, trained=trained, columns=wanted)

    def dry_run(self, speed: Speed) -> DryRunResult:
        return dry_run(list(self.trained.values()), speed, [name for name in self.names if name in COUNTED])

    def require_corpus(self) -> None:
        """Refuse a scale none of whose corpora is there; where some are, the others' columns say so.

        Raises:
            UserError: none is there.
        """
        columns = [column for planned in self.trained.values() for column in planned.columns]
        if columns and all(column.corpus is None for column in columns):
            raise UserError(f"scale {self.request.scale.name} needs its corpus: {columns[0].reason}")

    def runs(self) -> list[NamedRun]:
        """Each once."""
        runs: dict[str, NamedRun] = {}
        for planned in self.trained.values():
            for cell, seed, spec in planned.runs():
                label = f"{cell.sized.label}, {planned.columns[cell.column].column.name}"
                runs.setdefault(spec.digest, NamedRun(label=label, seed=seed, spec=spec))
        return list(runs.values())

    def results(self, pool: Pool) -> dict[str, PaperTable]:
        """Every table as the pool knows it, by name."""
        return {name: self._result(name, pool) for name in self.names}

    def _result(self, name: str, pool: Pool) -> PaperTable:
        if name in self.trained:
            return table_result(self.trained[name], pool)
        if name == "table7":
            return table7(self.request, self.columns[name])
        return settings_table(name, self.request, self.columns[name])
