"""Tables that the paper has not, on the same engine: Penn Treebank, inner top-K, shared layers, sweeps of K, G and N_E."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from sparseffn.paper.scales import SHARED
from sparseffn.paper.table_rows import Row
from sparseffn.paper.tables import DENSE, MIXTURE, PKM, SIGMA, TOPK, Table


def _own(row: Row, label: str | None = None) -> Row:
    """A row of the paper where the paper has no value."""
    return dataclasses.replace(row, own=True, published=row.published if label is None else label)


def _sigma(label: str, *, k: int | None = None, g: int = 128, n_experts: int | None = None, inner_k: int | None = None) -> Row:
    return Row(published=label, method="sigma-moe", k=k, g=g, n_experts=n_experts, inner_k=inner_k, own=True)


def _sweep(name: str, title: str, axis: str, rows: Mapping[int, Row]) -> Table:
    """One curve, and the dense model beside it."""
    return Table(
        name=name,
        title=title,
        columns=("WT-S",),
        rows=(_own(DENSE), *rows.values()),
        axis=axis,
        places={row.key: float(x) for x, row in rows.items()},
    )


# One row for each main method, with the K x G of sigma-MoE where it has one.
_MAIN = (
    DENSE,
    TOPK[-1],
    PKM[3],
    Row(published="sparsely gated (noisy)", method="noisy-moe"),
    MIXTURE["softmax before top-k (no renorm.)"],
    MIXTURE["softmax after top-k (renorm.)"],
    MIXTURE["switch, K=1, G=512, no dropout"],
    MIXTURE["s-base, K=4, G=128"],
    SIGMA,
)
_EXPERTS = (8, 16, 32, 64, 128)
_ACTIVE = (1, 2, 4, 8, 16)

OWN_TABLES: Mapping[str, Table] = MappingProxyType(
    {
        table.name: table
        for table in (
            Table(
                name="ptb",
                title="Penn Treebank, characters and words",
                columns=("PTB-char", "PTB-word"),
                rows=tuple(_own(row) for row in _MAIN),
            ),
            Table(
                name="universal",
                title="Layer-shared (Universal) Transformer, one block with the pairs of all layers",
                columns=(SHARED, "WT-S"),
                rows=(_own(DENSE), _own(SIGMA)),
            ),
            Table(
                name="inner",
                title="Top-K among the selected experts' pairs",
                columns=("WT-S", "E8"),
                rows=(
                    _own(DENSE),
                    _own(SIGMA),
                    *(_sigma(f"sigma-moe, inner K={inner_k}", inner_k=inner_k) for inner_k in (256, 128, 64)),
                ),
            ),
            _sweep(
                "sweep-k",
                "K at constant N_E: compute grows, parameters do not",
                "K",
                {k: _sigma(f"K={k}", k=k) for k in _ACTIVE},
            ),
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
                {n: _sigma(f"N_E={n}", n_experts=n) for n in _EXPERTS},
            ),
        )
    }
)
