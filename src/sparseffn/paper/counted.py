"""Tables that need no training: 7, relative FLOPs, and 8 and 9, hyperparameters as the presets have them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparseffn.errors import UserError
from sparseffn.paper.planned import Request
from sparseffn.paper.published import MAIN_COLUMNS, facts, published_values, rows_of, vocabulary
from sparseffn.paper.scales import Column
from sparseffn.paper.table_rows import Row, convention_percent, counted_percent, real_numbers, sized
from sparseffn.paper.tables import DENSE, MIXTURE, picked
from sparseffn.results import table_result as results
from sparseffn.storage import environment

COUNTED = ("table7", "table8", "table9")
"""The tables of this file."""

# Rows of table 7 by the rows of table 10 that have their sizes.
_SAME_SIZES = {"sigma-moe and every variant with G*K = 512": "sigma-moe"}


def counted_columns(name: str) -> tuple[str, ...]:
    """Columns of table 7, 8 or 9; the last two have them as rows."""
    return MAIN_COLUMNS if name == "table7" else tuple(row[0] for row in facts()[name]["rows"])


def table7(request: Request, columns: Sequence[str] | None = None) -> results.TableResult:
    """FLOPs of the blocks relative to dense: K / N_E as the paper has it, and counted with the selector."""
    values = published_values("table7")
    kept = [request.scale.column(name, request.settings) for name in _kept("table7", columns)]
    rows = [(label, MIXTURE[_SAME_SIZES.get(label, label)]) for label in rows_of("table7")]
    # A scale has one expert size for all columns.
    product = f"G*K = {kept[0].shape.active_channels}"
    return results.TableResult(
        table="table7",
        title="FLOPs of the feedforward blocks relative to dense, in percent",
        scale=request.scale.name,
        settings=request.settings,
        columns=[
            results.Column(
                name=column.name,
                published_name=column.name,
                corpus="none (counted)",
                metric="percent of the dense block's FLOPs",
                published_metric="percent of the dense block's FLOPs",
                sizes=column.sizes,
                steps=0,
            )
            for column in kept
        ],
        rows=[
            results.Row(
                label=real_numbers(row, kept[0], label).replace("G*K = 512", product),
                published_label=label,
                settings="paper",
                marks=list(sized(row, kept[0], vocabulary(kept[0].name)).marks),
            )
            for label, row in rows
        ],
        cells=[
            _counted(r, c, row, column, values.get((label, column.name)))
            for r, (label, row) in enumerate(rows)
            for c, column in enumerate(kept)
        ],
        difference_unit="percent",
        notes=[
            "K / N_E is the paper's convention, without the selector; beside it 2 FLOPs for each multiply-add, selector "
            "included, against the dense block of the same parameters",
        ],
        environment=environment(),
    )


def _kept(name: str, wanted: Sequence[str] | None) -> Sequence[str]:
    every = counted_columns(name)
    return every if wanted is None else picked("column", wanted, every)


def _counted(r: int, c: int, row: Row, column: Column, published: float | None) -> results.Cell:
    vocab_size = vocabulary(column.name)
    ffn, dense = sized(row, column, vocab_size).ffn, sized(DENSE, column, vocab_size).ffn
    params, dense_params = (column.model(block, vocab_size).num_params() for block in (ffn, dense))
    percent = convention_percent(ffn, column)
    return results.Cell(
        row=r,
        column=c,
        published=published,
        status="counted",
        mean=percent,
        params=params,
        residual_percent=100.0 * (params - dense_params) / dense_params,
        flops_percent=percent,
        counted_flops_percent=counted_percent(ffn, dense),
    )


def settings_table(name: str, request: Request, columns: Sequence[str] | None = None) -> results.SettingsResult:
    """Table 8 or 9: each hyperparameter as it is here, beside the published one, and where the two differ."""
    data, kept = facts()[name], _kept(name, columns)
    title, read = {
        "table8": ("Hyperparameters of the models", _model_settings),
        "table9": ("Hyperparameters of the mixtures", _mixture_settings),
    }[name]
    rows = []
    for published_row in data["rows"]:
        published = dict(zip(data["columns"], published_row, strict=True))
        if published["name"] not in kept:
            continue
        here = read(request.scale.column(published["name"], request.settings), request)
        differences = [key for key, value in published.items() if key in here and not _same(here[key], value)]
        rows.append(results.SettingsRow(name=published["name"], here=here, published=published, differences=differences))
    return results.SettingsResult(
        table=name,
        title=title,
        scale=request.scale.name,
        settings=request.settings,
        rows=rows,
        environment=environment(),
    )


def _same(here: object, published: object) -> bool:
    # Millions of parameters are published without decimals.
    return (round(here) if isinstance(here, float) and isinstance(published, int) else here) == published


def _vocabulary(column: Column, request: Request) -> int:
    """That of the corpus where a small scale has one here, else the published one."""
    if request.scale.is_published:
        return vocabulary(column.name)
    try:
        return request.corpora.of(column).tokenizer.vocab_size
    except UserError:
        return vocabulary(column.name)


def _model_settings(column: Column, request: Request) -> dict[str, Any]:
    preset, shape = column.preset, column.shape
    vocab_size = _vocabulary(column, request)
    dense = column.model(sized(DENSE, column, vocab_size).ffn, vocab_size)
    return {
        "vocab_size": vocab_size,
        "params_m": dense.num_params() / 1e6,
        "d_model": shape.d_model,
        "d_ff": shape.d_ff,
        "n_layers": shape.n_layers,
        "n_heads": preset.n_heads,
        "d_head": preset.d_head,
        "context": preset.context,
        "batch": preset.batch,
        "dropout": shape.dropout,
        "warmup": preset.warmup,
    }


def _mixture_settings(column: Column, request: Request) -> dict[str, Any]:
    shape = column.shape
    return {
        "d_model": shape.d_model,
        "N_E": shape.n_experts,
        "G": shape.expert_size,
        "K": shape.k,
        "delta": shape.expert_dropout,
        "gamma": shape.entropy_weight,
    }
