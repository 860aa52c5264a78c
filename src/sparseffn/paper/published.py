"""The paper's numbers, read from `published.toml`: values of a table by the published label of the row and the column."""

from __future__ import annotations

import functools
import math
import tomllib
from collections.abc import Mapping
from importlib import resources
from types import MappingProxyType
from typing import Any

# Value by (published label of the row, column); what the paper did not evaluate is absent.
Values = Mapping[tuple[str, str], float]

# Columns of tables 4, 6, 7 and 10.
MAIN_COLUMNS = ("WT-S", "WT-S*", "WT-B", "E8")
SCALED_COLUMNS = ("C4-S", "C4-B", "peS2o-S", "peS2o-B")


@functools.cache
def facts() -> Mapping[str, Any]:
    """The whole file."""
    text = resources.files("sparseffn.paper").joinpath("published.toml").read_text(encoding="utf-8")
    return MappingProxyType(tomllib.loads(text))


def vocabulary(column: str) -> int:
    """Vocabulary of a column's published model."""
    return facts()["vocabulary"].get(column, facts()["vocabulary"]["other"])


@functools.cache
def published_values(table: str) -> Values:
    """Published values of tables 1 to 7 and 10."""
    found = _READERS[table]()
    return MappingProxyType({key: value for key, value in found.items() if not math.isnan(value)})


def rows_of(table: str) -> tuple[str, ...]:
    """Published labels of a table's rows, in order."""
    return tuple(dict.fromkeys(row for row, _ in _READERS[table]()))


def dense_values() -> dict[tuple[str, str], float]:
    """The dense models' values."""
    dense = facts()["dense"]
    return {("dense", column): value for column, value in zip(dense["columns"], dense["values"], strict=True)}


def topk_label(k: int) -> str:
    """How rows of table 1 are named here; 0 stands for the dense model."""
    return f"Top-K, K={k}" if k else "dense"


def pkm_label(variant: str, matched_on: str, activation: str) -> str:
    """How rows of table 6 are named here."""
    return "dense" if variant == "dense" else f"{variant}, {matched_on}, {activation}"


def _table1() -> dict[tuple[str, str], float]:
    rows = sorted(facts()["table1"]["rows"], key=lambda row: row[3])
    return {(topk_label(k), dataset): value for dataset, _, _, k, value in rows}


def _table6() -> dict[tuple[str, str], float]:
    table = facts()["table6"]
    columns = table["columns"][3:]
    return {
        (pkm_label(*row[:3]), column): value for row in table["rows"] for column, value in zip(columns, row[3:], strict=True)
    }


def _table2() -> dict[tuple[str, str], float]:
    """The parameter-matched part of table 6, without "+ init"."""
    return {key: value for key, value in _table6().items() if key[0] == "dense" or key[0].startswith("pkm, parameters")}


def _table3() -> dict[tuple[str, str], float]:
    return {(model, dataset): value for dataset, model, _, _, value in facts()["table3"]["rows"]}


def _with_sizes(table: str) -> dict[tuple[str, str], float]:
    """A table whose rows begin with label, G and K."""
    data = facts()[table]
    columns = data["columns"][3:]
    return {(row[0], column): value for row in data["rows"] for column, value in zip(columns, row[3:], strict=True)}


def _table10() -> dict[tuple[str, str], float]:
    """With the dense models in front, which the paper gives elsewhere."""
    dense = {key: value for key, value in dense_values().items() if key[1] in MAIN_COLUMNS}
    return dense | _with_sizes("table10")


def _table4() -> dict[tuple[str, str], float]:
    wanted = ["dense", *facts()["table4"]["rows_of_table10"]]
    whole = _table10()
    return {(label, column): whole[label, column] for label in wanted for column in MAIN_COLUMNS}


_READERS = {
    "table1": _table1,
    "table2": _table2,
    "table3": _table3,
    "table4": _table4,
    "table5": lambda: _with_sizes("table5"),
    "table6": _table6,
    "table7": lambda: _with_sizes("table7"),
    "table10": _table10,
}
