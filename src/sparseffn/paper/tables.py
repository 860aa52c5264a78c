"""Which rows and columns each table has: the paper's, and our own on the same engine.

Our own: Penn Treebank, inner top-K, shared layers, sweeps of K, G and N_E.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparseffn.errors import UserError, unknown_name
from sparseffn.paper.published import Values, published_values, rows_of
from sparseffn.paper.scales import SHARED, Settings
from sparseffn.paper.table_rows import RELEASED_FORMS, Row

DENSE = Row(published="dense", method="dense")
SIGMA = Row(published="sigma-moe", method="sigma-moe")

# Fedus 2022: a tenth of the usual variance, selector rows as drawn.
_SWITCH = {"init": "switch", "selector_init": "free"}

MIXTURES = (
    SIGMA,
    Row(published="standard dropout", method="sigma-moe", dropout="standard"),
    Row(published="softmax after top-k (renorm.)", method="softmax-renorm-moe"),
    Row(published="softmax before top-k (no renorm.)", method="softmax-moe"),
    Row(published="standard init", method="sigma-moe", options={"init": "standard"}),
    Row(published="no reg (gamma=0, delta=0)", method="sigma-moe", options={"entropy_weight": 0.0, "expert_dropout": 0.0}),
    Row(published="K=8, G=64", method="sigma-moe", k=8, g=64),
    Row(published="K=2, G=256", method="sigma-moe", k=2, g=256),
    Row(published="K=1, G=512", method="sigma-moe", k=1, g=512),
    Row(published="2 N_E, G=64", method="sigma-moe", g=64),
    Row(published="K=1", method="sigma-moe", k=1),
    Row(published="K=2", method="sigma-moe", k=2),
    Row(published="K=8", method="sigma-moe", k=8),
    Row(published="switch, K=1, G=512", method="switch", k=1, g=512, options=_SWITCH, dropout="standard"),
    Row(published="switch, K=1, G=512, no dropout", method="switch", k=1, g=512, options=_SWITCH),
    Row(published="switch, K=4, G=128", method="switch", k=4, options=_SWITCH, dropout="standard"),
    Row(published="switch, K=1, G=128", method="switch", k=1, options=_SWITCH, dropout="standard"),
    Row(published="switch, K=1, G=128, no dropout", method="switch", k=1, options=_SWITCH),
    Row(published="s-base, K=4, G=128", method="s-base", k=4),
    Row(published="s-base, K=1, G=512", method="s-base", k=1, g=512),
)
MIXTURE = {row.published: row for row in MIXTURES}

TOPK = tuple(Row(published=f"Top-K, K={k}", method="topk", k=k) for k in (64, 128, 256, 512))


def _pkm(matched_on: str, activation: str, *, init: bool = False) -> Row:
    options = {"matched_on": matched_on, "activation": activation, "values_init": "n_values" if init else "d_model"}
    return Row(published=f"pkm{'+init' if init else ''}, {matched_on}, {activation}", method="pkm", options=options)


PKM = (
    _pkm("value-count", "softmax"),
    _pkm("value-count", "relu"),
    _pkm("parameters", "softmax"),
    _pkm("parameters", "relu"),
    _pkm("parameters", "relu", init=True),
)


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows and columns; cells are the runs of their products."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    values: Values = field(default_factory=dict)
    """Published values by (published label, column)."""
    axis: str = ""
    """Of a sweep: what its rows vary."""
    places: Mapping[str, float] = field(default_factory=dict)
    """Of a sweep: place on the axis by the row's key."""

    def selected(self, *, columns: Sequence[str] | None, rows: Sequence[str] | None, settings: Settings) -> Table:
        """Some of the columns and rows, with the released forms beside the paper's, or alone under released settings.

        Raises:
            UserError: a column or a row is unknown or named twice.
        """
        chosen = self.columns if columns is None else picked("column", columns, self.columns)
        every = with_forms(self.rows, settings)
        labels = None if rows is None else picked("row", rows, [row.key for row in every])
        kept = every if labels is None else tuple(row for row in every if row.key in labels)
        return dataclasses.replace(self, columns=tuple(chosen), rows=kept)


def with_forms(rows: Sequence[Row], settings: Settings) -> tuple[Row, ...]:
    """Rows in the paper's and the released form where they differ; under released settings that form alone."""
    if settings == "released":
        return tuple(row.released() for row in rows)
    return tuple(form for row in rows for form in ((row, row.released()) if row.method in RELEASED_FORMS else (row,)))


def picked(kind: str, wanted: Sequence[str], known: Sequence[str]) -> list[str]:
    """Names as they are known, in the table's order; case does not count.

    Raises:
        UserError: a name is unknown or given twice.
    """
    by_name = {name.lower(): name for name in known}
    for name in wanted:
        if name.lower() not in by_name:
            raise unknown_name(kind, name, known)
    chosen = [by_name[name.lower()] for name in wanted]
    for name in chosen:
        if chosen.count(name) > 1:
            raise UserError(f"each {kind} must be named once; got {name!r} twice; fix: remove one")
    return [name for name in known if name in chosen]


# Table 5 calls its mixtures by their method alone.
_BY_METHOD = (
    Row(published="switch", method="switch", k=1, g=512, options=_SWITCH, dropout="standard"),
    Row(published="s-base", method="s-base", k=4),
)
_PUBLISHED = {row.published: row for row in (DENSE, *TOPK, *PKM, *MIXTURES, *_BY_METHOD)}


def _published(name: str, title: str) -> Table:
    """A table with the rows and columns that the paper has values of."""
    values = published_values(name)
    columns = tuple(dict.fromkeys(column for _, column in values))
    return Table(name=name, title=title, columns=columns, rows=tuple(_PUBLISHED[row] for row in rows_of(name)), values=values)


# Tables that are trained; 7 is counted, 8 and 9 are settings.
TABLES: Mapping[str, Table] = {
    name: _published(name, title)
    for name, title in {
        "table1": "Top-K activation",
        "table2": "Product-key memory, parameters matched",
        "table3": "Dense against sigma-MoE at equal parameters",
        "table4": "Mixtures of experts, chosen rows",
        "table5": "C4 and peS2o",
        "table6": "Product-key memory, all variants",
        "table10": "Mixtures of experts, every row",
    }.items()
}


def _sigma(label: str, **sizes: Any) -> Row:
    return Row(published=label, method="sigma-moe", **sizes)


def _ours(name: str, title: str, columns: Sequence[str], *rows: Row) -> Table:
    own = tuple(dataclasses.replace(row, own=True) for row in rows)
    return Table(name=name, title=title, columns=tuple(columns), rows=own)


def _sweep(name: str, title: str, axis: str, rows: Mapping[int, Row]) -> Table:
    """One curve, and the dense model beside it."""
    places = {row.key: float(x) for x, row in rows.items()}
    return dataclasses.replace(_ours(name, title, ["WT-S"], DENSE, *rows.values()), axis=axis, places=places)


# One row for each main method, with the K x G of sigma-MoE where it has one.
_MAIN = (
    DENSE,
    TOPK[-1],
    _PUBLISHED["pkm, parameters, relu"],
    Row(published="sparsely gated (noisy)", method="noisy-moe"),
    MIXTURE["softmax before top-k (no renorm.)"],
    MIXTURE["softmax after top-k (renorm.)"],
    MIXTURE["switch, K=1, G=512, no dropout"],
    MIXTURE["s-base, K=4, G=128"],
    SIGMA,
)
_INNER = (_sigma(f"sigma-moe, inner K={inner_k}", inner_k=inner_k) for inner_k in (256, 128, 64))
_ACTIVE = (1, 2, 4, 8, 16)
_OWN = (
    _ours("ptb", "Penn Treebank, characters and words", ["PTB-char", "PTB-word"], *_MAIN),
    _ours(
        "universal",
        "Layer-shared (Universal) Transformer, one block with the pairs of all layers",
        [SHARED, "WT-S"],
        DENSE,
        SIGMA,
    ),
    _ours("inner", "Top-K among the selected experts' pairs", ["WT-S", "E8"], DENSE, SIGMA, *_INNER),
    _sweep("sweep-k", "K at constant N_E: compute grows, parameters do not", "K", {k: _sigma(f"K={k}", k=k) for k in _ACTIVE}),
    _sweep(
        "sweep-size",
        "K at constant K G and N_E G: more and smaller experts",
        "K",
        {k: _sigma(f"K={k}, G={512 // k}", k=k, g=512 // k) for k in _ACTIVE},
    ),
    _sweep(
        "sweep-experts",
        "N_E at constant K: parameters grow, compute does not",
        "N_E",
        {n: _sigma(f"N_E={n}", n_experts=n) for n in (8, 16, 32, 64, 128)},
    ),
)
OWN_TABLES: Mapping[str, Table] = {table.name: table for table in _OWN}


def get_table(name: str) -> Table:
    """A trained table by name, the paper's or our own.

    Raises:
        UserError: there is none.
    """
    known = {**TABLES, **OWN_TABLES}
    if name not in known:
        raise unknown_name("table", name, known)
    return known[name]
