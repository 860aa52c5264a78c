"""The paper's numbers, read from `published.toml`: values of a table by the published label of the row and the column."""

from __future__ import annotations

import functools
import math
import tomllib
from collections.abc import Callable, Mapping
from importlib import resources
from typing import Any

import msgspec

# Value by (published label of the row, column); what the paper did not evaluate is absent.
Values = Mapping[tuple[str, str], float]

# Columns of tables 4, 6, 7 and 10.
MAIN_COLUMNS = ("WT-S", "WT-S*", "WT-B", "E8")
SCALED_COLUMNS = ("C4-S", "C4-B", "peS2o-S", "peS2o-B")


@functools.cache
def facts() -> Mapping[str, Any]:
    """The whole file."""
    return tomllib.loads(resources.files("sparseffn.paper").joinpath("published.toml").read_text(encoding="utf-8"))


def vocabulary(column: str) -> int:
    """Vocabulary of a column's published model."""
    return facts()["vocabulary"].get(column, facts()["vocabulary"]["other"])


@functools.cache
def published_values(table: str) -> Values:
    """Published values of tables 1 to 7 and 10."""
    return {key: value for key, value in _every_cell(table).items() if not math.isnan(value)}


class PublishedPair(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Two rows of a table whose difference the paper gives."""

    table: str
    row: str
    other: str
    column: str = "WT-S"
    weight: float = 1.0
    """In a sum of differences."""


def published_percent(pair: PublishedPair) -> float:
    """A published difference in percent of the other row's loss, times its weight; of perplexities the logarithms."""
    values = published_values(pair.table)
    ours, theirs = (math.log(values[label, pair.column]) for label in (pair.row, pair.other))
    return pair.weight * 100 * (ours - theirs) / theirs


def rows_of(table: str) -> tuple[str, ...]:
    """Published labels of a table's rows, in order."""
    return tuple(dict.fromkeys(row for row, _ in _every_cell(table)))


def dense_values() -> Values:
    dense = facts()["dense"]
    return {("dense", column): value for column, value in zip(dense["columns"], dense["values"], strict=True)}


def topk_label(k: int) -> str:
    """How rows of table 1 are named here; 0 stands for the dense model."""
    return f"Top-K, K={k}" if k else "dense"


def _every_cell(table: str) -> Values:
    """Values by row and column, NaN where the paper has none; parts of other tables are put together from them."""
    match table:
        case "table1":
            rows = sorted(facts()["table1"]["rows"], key=lambda row: row[3])
            return {(topk_label(k), dataset): value for dataset, _, _, k, value in rows}
        case "table2":
            # The parameter-matched part of table 6, without "+ init".
            return {
                key: value for key, value in _every_cell("table6").items() if key[0].startswith(("dense", "pkm, parameters"))
            }
        case "table3":
            return {(model, dataset): value for dataset, model, _, _, value in facts()["table3"]["rows"]}
        case "table4":
            whole = _every_cell("table10")
            wanted = ("dense", *facts()["table4"]["rows_of_table10"])
            return {(label, column): whole[label, column] for label in wanted for column in MAIN_COLUMNS}
        case "table6":
            return _by_columns("table6", lambda row: "dense" if row[0] == "dense" else ", ".join(row[:3]))
        case "table10":
            # With the dense models in front, which the paper gives elsewhere.
            dense = {key: value for key, value in dense_values().items() if key[1] in MAIN_COLUMNS}
            return dense | _by_columns("table10", lambda row: row[0])
        case _:
            return _by_columns(table, lambda row: row[0])


def _by_columns(table: str, label: Callable[[list[Any]], str]) -> dict[tuple[str, str], float]:
    """A table with a value a column; three entries that name the row stand before them."""
    columns, rows = facts()[table]["columns"][3:], facts()[table]["rows"]
    return {(label(row), column): value for row in rows for column, value in zip(columns, row[3:], strict=True)}
