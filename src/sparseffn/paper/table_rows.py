"""The settings that make each row of the paper's tables, as data.

A row is one change to the published mixture. Where the released code does something else than the paper says, the row has a
second form, labelled: PKM without top-K, S-BASE with the released signs of Sinkhorn, softmax after top-k balanced over the K
slots, Switch with the released weight.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sparseffn.accounting import count_block
from sparseffn.ffn import FFNConfig, method_class
from sparseffn.ffn.dense import DenseConfig
from sparseffn.ffn.mixture import MixtureConfig
from sparseffn.ffn.pkm import PKMConfig
from sparseffn.ffn.topk import TopKConfig
from sparseffn.matching import match
from sparseffn.paper.published import facts, topk_label
from sparseffn.paper.scales import Column, Settings

# Expert size that the labels of the paper's rows are written for.
PAPER_G = 128
SWITCH_WEIGHT = 0.01

# What the second form of a method's rows is called in tables.
RELEASED_FORMS: Mapping[str, str] = {
    "s-base": "Sinkhorn as released",
    "softmax-renorm-moe": "balanced over the K slots, as released",
    "switch": "balancing weight 0.01 / N_E^2, as released",
    "pkm": "no top-K, as released",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row, before it is given a column's sizes."""

    published: str
    """Label in the paper; for rows of our own, the label."""
    method: str
    k: int | None = None
    """None: the column's K. Of Top-K: entries at the published d_ff."""
    g: int = PAPER_G
    """Expert size at the published scale; N_E G stays what it is."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the method's config."""
    form: Settings = "paper"
    """Whether what the method does is the paper's or the released code's."""
    dropout: Literal["none", "standard"] = "none"
    """Standard dropout inside experts."""
    n_experts: int | None = None
    """N_E in place of the column's, so that the block grows or shrinks."""
    inner_k: int | None = None
    """Pairs that an inner top-K leaves of the K G selected ones, at the published scale."""
    own: bool = False
    """Not in the paper."""

    @property
    def key(self) -> str:
        """What tells rows of a table apart."""
        return self.published if self.form == "paper" else f"{self.published} ({RELEASED_FORMS[self.method]})"

    def released(self) -> Row:
        """The second form of the row; itself where there is none."""
        return dataclasses.replace(self, form="released") if self.method in RELEASED_FORMS else self


@dataclass(frozen=True, kw_only=True)
class Sized:
    """A row at a column's sizes."""

    row: Row
    label: str
    """With the real numbers."""
    ffn: FFNConfig
    marks: tuple[str, ...]


def sized(row: Row, column: Column, vocab_size: int) -> Sized:
    """The row's block at the column's sizes.

    Raises:
        UserError: the sizes do not go with the method.
    """
    shape, marks = column.shape, []
    if row.method == "dense":
        return Sized(row=row, label=row.key, ffn=DenseConfig.from_shape(shape), marks=())
    if row.method == "topk":
        return _topk(row, column)
    if row.method == "pkm":
        ffn = _pkm(row, column, vocab_size)
        marks.append(f"{ffn.n_subkeys} + {ffn.n_b} sub-keys a head, {ffn.n_channels} values")
        marks.append("every value is read, without top-K" if ffn.k is None else f"K = {ffn.k} a head (the paper gives none)")
        return Sized(row=row, label=row.key, ffn=ffn, marks=tuple(marks))
    ffn = _mixture(row, column)
    label = shown_label(row, column)
    if label != row.key:
        marks.append(f"{real_numbers(row, column, row.published)} stands for {row.published}")
    elif column.expert_ratio != 1 and not row.own:
        # A label without G: the sizes that the paper's row has.
        k = shape.k if row.k is None else row.k
        marks.append(real_numbers(row, column, f"K={k}, G={row.g}") + f" stands for K={k}, G={row.g}")
    if row.form == "released":
        marks += _released_marks(ffn, _mixture(dataclasses.replace(row, form="paper"), column))
    if row.dropout == "standard" and shape.dropout == 0 and ffn.to_json()["dropout"] > 0:
        marks.append(f"dropout {column.standard_dropout:g} inside experts alone: the model has none at this scale")
    return Sized(row=row, label=label, ffn=ffn, marks=tuple(marks))


def shown_label(row: Row, column: Column) -> str:
    """What tables call a row: its label with the numbers that it has at the column's sizes."""
    return topk_label(_topk_k(row, column)) if row.method == "topk" else real_numbers(row, column, row.key)


def _topk_k(row: Row, column: Column) -> int:
    """K scales with d_ff, the nearest multiple of the expert ratio."""
    assert row.k is not None, "Top-K rows name their K"
    return max(1, round(row.k * column.expert_ratio))


def _topk(row: Row, column: Column) -> Sized:
    k, label = _topk_k(row, column), shown_label(row, column)
    marks = (f"{label} of {column.shape.d_ff} stands for K={row.k} of {column.published.shape.d_ff}",) if k != row.k else ()
    return Sized(row=row, label=label, ffn=TopKConfig.from_shape(column.shape).replace(k=k), marks=marks)


def _pkm(row: Row, column: Column, vocab_size: int) -> PKMConfig:
    """Sub-keys by number of values or by parameters; the published ones at the published sizes."""
    shape = column.shape
    options = dict(row.options)
    matched_on = options.pop("matched_on")
    base = PKMConfig.from_shape(shape).replace(**options)
    if row.form == "released":
        base = base.replace(k=None)
    if column.preset.name == column.published.name:
        sizes = facts()["pkm_subkeys"]
        return base.replace(n_subkeys=sizes[matched_on][1 if column.name == "WT-B" else 0])
    if matched_on == "value-count":
        return base.replace(n_subkeys=round(math.sqrt(shape.d_ff)))
    dense = DenseConfig.from_shape(shape)
    model = column.model(dense, vocab_size)
    # k = None is no size of its own; the counts are the same.
    found = match(base, dense.num_params(), n_blocks=model.n_blocks, other_params=model.other_params()).config
    assert isinstance(found, PKMConfig), "matching keeps the method"
    return found


def _mixture(row: Row, column: Column) -> FFNConfig:
    """The column's mixture with the row's change."""
    shape = column.shape
    config_class = method_class(row.method)
    expert_size = shape.expert_size * row.g // PAPER_G
    # N_E G is the column's, whatever G is.
    n_experts = shape.n_experts * PAPER_G // row.g if row.n_experts is None else row.n_experts
    k = shape.k if row.k is None else row.k
    base = config_class.from_shape(shape).replace(n_experts=n_experts, expert_size=expert_size, k=k, dropout=0.0)
    changes = dict(row.options)
    if row.inner_k is not None:
        changes["inner_k"] = _inner_k(row, column)
    if row.dropout == "standard":
        changes |= {"dropout": column.standard_dropout, "expert_dropout": 0.0}
    if row.form == "released":
        changes |= _released_changes(row, column, n_experts)
    return base.replace(**changes)


def _released_changes(row: Row, column: Column, n_experts: int) -> dict[str, Any]:
    """What the released code does otherwise (`s-base` also reuses delta, Switch's K = 4 has no dropout)."""
    match row.method:
        case "s-base":
            return {"sinkhorn": "released", "expert_dropout": column.shape.expert_dropout}
        case "softmax-renorm-moe":
            return {"entropy_weight": 0.0, "slot_entropy_weight": column.shape.entropy_weight}
        case "switch":
            changes: dict[str, Any] = {"switch_weight": SWITCH_WEIGHT / n_experts**2}
            if column.name in ("C4-B", "peS2o-B"):
                changes |= {"init": "standard", "selector_init": "equal-norm"}
            return changes | ({"dropout": 0.0} if row.k == 4 else {})
        case _:
            raise AssertionError(f"{row.method} has no released form")


def _released_marks(released: FFNConfig, paper: FFNConfig) -> list[str]:
    """Every option in which a released form is not the paper's; the label names one of them."""
    options, others = released.to_json(), paper.to_json()
    return [
        f"as released: {name} {_shown(value)}, in the paper's form {_shown(others[name])}"
        for name, value in options.items()
        if value != others[name]
    ]


def _shown(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def convention_percent(ffn: FFNConfig, column: Column) -> float | None:
    """K / N_E in percent, 100 for a dense block; None where the paper's convention compares nothing.

    A share of a block's own channels says what of the dense block is computed only while the block has the dense block's pairs.
    """
    if isinstance(ffn, DenseConfig):
        return 100.0
    if not isinstance(ffn, MixtureConfig) or ffn.n_channels != column.shape.n_experts * column.shape.expert_size:
        return None
    return 100.0 * ffn.active_channels / ffn.n_channels


def counted_percent(ffn: FFNConfig, dense: FFNConfig) -> float:
    """FLOPs of a block in percent of the dense one's, selection included: 2 for each multiply-add."""
    return 100.0 * count_block(ffn).forward_flops / count_block(dense).forward_flops


def _inner_k(row: Row, column: Column) -> int:
    assert row.inner_k is not None, "asked of rows that have one"
    return max(1, round(row.inner_k * column.expert_ratio))


def real_numbers(row: Row, column: Column, text: str) -> str:
    """A label with the expert size, and the inner K, that the row has here."""
    real_g = column.shape.expert_size * row.g // PAPER_G
    text = text.replace(f"G={row.g}", f"G={real_g}")
    return text if row.inner_k is None else text.replace(f"inner K={row.inner_k}", f"inner K={_inner_k(row, column)}")
