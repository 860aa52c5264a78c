"""A table's JSON from the pool: what `report` renders. A cell without a result says why; nothing is left out."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from sparseffn.comparison.runs import valid_at
from sparseffn.comparison.schedule import CURVE_TOKENS
from sparseffn.data import to_metric
from sparseffn.paper.own_tables import OWN_TABLES
from sparseffn.paper.planned import PlannedCell, PlannedColumn, PlannedTable, is_unequal, residual_percent
from sparseffn.paper.pool import Finished, Pool, Status, median_step_s, sources_note, window_losses
from sparseffn.paper.published import SCALED_COLUMNS, facts
from sparseffn.paper.table_rows import RELEASED_FORMS, convention_percent, counted_percent
from sparseffn.paper.tables import TABLES
from sparseffn.stats import SeedNoise, difference, seed_noise
from sparseffn.storage import environment

VERSION = 1
"""Layout of a table's JSON."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Measured:
    """A cell with what the pool holds of it."""

    cell: PlannedCell
    statuses: Mapping[int, Status]

    @property
    def finished(self) -> dict[int, Finished]:
        """Runs by seed."""
        return {seed: status.finished for seed, status in self.statuses.items() if status.finished is not None}


def table_json(planned: PlannedTable, pool: Pool) -> dict[str, Any]:
    """The table as the pool knows it."""
    cells = [
        _Measured(cell=cell, statuses={seed: pool.status(spec) for seed, spec in cell.specs.items()}) for cell in planned.cells
    ]
    by_column = [[m for m in cells if m.cell.column == c] for c in range(len(planned.columns))]
    times = [_equal_time(column) for column in by_column]
    noises = [_seed_noise(column) for column in by_column]
    units = {_difference_unit(column) for column in planned.columns}
    runs = [run for measured in cells for run in measured.finished.values()]
    return {
        "kind": "paper-table",
        "version": VERSION,
        "table": planned.table.name,
        "title": planned.table.title,
        "scale": planned.request.scale.name,
        "settings": planned.request.settings,
        "columns": [_column_json(planned, c, t) for c, t in zip(planned.columns, times, strict=True)],
        "rows": _rows_json(planned),
        "cells": [
            _cell_json(m, planned.columns[c := m.cell.column], times[c])
            | {f"against_{name}": _against(m, other, planned.columns[c], noises[c]) for name, other in _others(m, by_column[c])}
            for m in cells
        ],
        "difference_unit": " or ".join(sorted(units)),
        "sweep": _sweep_json(planned),
        "notes": _notes(planned, cells) + [_noise_note(planned.columns[c], n) for c, n in enumerate(noises) if n is not None],
        "environment": _environment(runs),
    }


def _sweep_json(planned: PlannedTable) -> dict[str, Any] | None:
    """Of a sweep: its axis and each row's place there."""
    table = planned.table
    return {"axis": table.axis, "x": [table.places.get(row.key) for row in table.rows]} if table.axis else None


def _others(measured: _Measured, column: Sequence[_Measured]) -> list[tuple[str, _Measured | None]]:
    """What a cell is held against: the rows of its column by these keys, and of a released form the paper's."""
    by_key = {other.cell.key: other for other in column}
    row = measured.cell.sized.row
    paper = next((m for m in column if m.cell.sized.row.published == row.published and m.cell.sized.row.form == "paper"), None)
    return [
        ("dense", by_key.get("dense")),
        ("sigma_moe", by_key.get("sigma-moe")),
        ("paper_form", paper if row.form == "released" else None),
    ]


def _environment(runs: Sequence[Finished]) -> dict[str, Any]:
    """Of the runs; what differs between them is listed. Of this process where there is no run."""
    here = environment()
    if not runs:
        return here
    values = {name: {str(run.environment.get(name, "unknown")) for run in runs} for name in here}
    return {name: " or ".join(sorted(several)) for name, several in values.items()}


def _seed_noise(column: Sequence[_Measured]) -> SeedNoise | None:
    """In nats, pooled over the rows of a column."""
    runs = {m.cell.row: {seed: run.result.test for seed, run in m.finished.items()} for m in column if m.finished}
    return seed_noise(runs)


def _noise_note(planned: PlannedColumn, noise: SeedNoise) -> str:
    scatter = f"{_in_difference_unit(noise.std, planned):.4f} {_difference_unit(planned)}"
    return (
        f"{planned.column.name}: runs of one row scatter by {scatter} (standard deviation, pooled over the rows, "
        f"{noise.freedom} degrees of freedom); the intervals of differences take it for that of every row"
    )


def _column_json(table: PlannedTable, planned: PlannedColumn, equal_time: float | None) -> dict[str, Any]:
    column, corpus = planned.column, planned.corpus
    is_own = column.is_own or not table.table.values
    return {
        "name": column.name,
        "published_name": None if is_own else column.name,
        "corpus": column.corpus[0] if corpus is None else corpus.name,
        "metric": _published_metric(planned) if corpus is None else to_metric(0.0, corpus.unit)[0],
        "published_metric": None if is_own else _published_metric(planned),
        "digest": None if corpus is None else corpus.digest,
        "reason": planned.reason,
        "sizes": column.sizes,
        "steps": planned.steps,
        "equal_time_s": equal_time,
    }


def _published_metric(planned: PlannedColumn) -> str:
    return "bits per character" if planned.column.name == "E8" else "perplexity"


def _rows_json(planned: PlannedTable) -> list[dict[str, Any]]:
    """Labels with the numbers of this scale; a mark that does not hold in every column names its own."""
    rows = []
    for r, row in enumerate(planned.table.rows):
        cells = [cell for cell in planned.cells if cell.row == r]
        names = [planned.columns[cell.column].column.name for cell in cells]
        marks = dict.fromkeys(mark for cell in cells for mark in cell.sized.marks)
        shown = []
        for mark in marks:
            where = [name for name, cell in zip(names, cells, strict=True) if mark in cell.sized.marks]
            shown.append(mark if len(where) == len(cells) else f"{', '.join(where)}: {mark}")
        rows.append(
            {
                "label": cells[0].sized.label if cells else row.key,
                "published_label": None if row.own else row.published,
                "settings": "released" if planned.request.settings == "released" else row.form,
                "marks": shown + _unequal_marks(planned, cells),
            }
        )
    return rows


def _unequal_marks(planned: PlannedTable, cells: Sequence[PlannedCell]) -> list[str]:
    """Say which models are not parameter-equal."""
    marks = []
    for cell in cells:
        percent = residual_percent(cell, planned.columns[cell.column])
        if is_unequal(percent):
            marks.append(f"{planned.columns[cell.column].column.name}: {percent:+.2f}% parameters against dense")
    return marks


def _cell_json(measured: _Measured, planned: PlannedColumn, equal_time: float | None) -> dict[str, Any]:
    cell, finished = measured.cell, measured.finished
    status, reason = _cell_status(measured)
    test, valid = ([_metric(getattr(f.result, split), planned) for f in finished.values()] for split in ("test", "valid"))
    return {
        "row": cell.row,
        "column": cell.column,
        "published": cell.published,
        "status": status,
        "reason": reason,
        "n": len(finished),
        "mean": statistics.fmean(test) if test else None,
        "spread": statistics.stdev(test) if len(test) > 1 else None,
        "valid_mean": statistics.fmean(valid) if valid else None,
        "seeds": list(finished),
        "values": test,
        "params": cell.model.num_params(),
        "residual_percent": residual_percent(cell, planned),
        "flops_percent": convention_percent(cell.model.ffn, planned.column),
        "counted_flops_percent": counted_percent(cell.model.ffn, planned.dense.ffn),
        "equal_time": _at_time(finished, equal_time, planned),
        "train_s": _train_s(finished),
        "load": _mean_load(finished),
    }


def _cell_status(measured: _Measured) -> tuple[str, str | None]:
    """Of all seeds: measured when there is a result, with a reason where one is missing."""
    if measured.cell.reason is not None:
        return "missing", measured.cell.reason
    lacking = {seed: status for seed, status in measured.statuses.items() if status.finished is None}
    reasons = dict.fromkeys(str(status.reason) for status in lacking.values())
    if measured.finished:
        words = [f"seed {seed}: {status.reason}" for seed, status in lacking.items()]
        return "measured", "; ".join(words) or None
    kind = "failed" if any(status.kind == "failed" for status in lacking.values()) else "missing"
    return kind, "; ".join(reasons)


def _metric(nats: float, planned: PlannedColumn) -> float:
    assert planned.corpus is not None, "there are runs, so there is a corpus"
    return to_metric(nats, planned.corpus.unit)[1]


def _difference_unit(planned: PlannedColumn) -> str:
    if planned.corpus is None:
        return "nats per token"
    metric = to_metric(0.0, planned.corpus.unit)[0]
    return "nats per token" if metric == "perplexity" else metric


def _in_difference_unit(nats: float, planned: PlannedColumn) -> float:
    return nats if _difference_unit(planned) == "nats per token" else nats / math.log(2)


def _against(
    measured: _Measured, other: _Measured | None, planned: PlannedColumn, noise: SeedNoise | None
) -> dict[str, Any] | None:
    """Test loss less another row's, paired over seeds and windows; None without a common seed."""
    if other is None or other is measured or not set(other.finished) & set(measured.finished):
        return None
    found = difference(_windows(measured), _windows(other), noise=noise)
    return msgspec.structs.asdict(found.in_unit(1.0 if _difference_unit(planned) == "nats per token" else math.log(2)))


def _windows(measured: _Measured) -> dict[int, np.ndarray]:
    return {seed: window_losses(finished, "test") for seed, finished in measured.finished.items()}


def _train_s(finished: Mapping[int, Finished]) -> float | None:
    """Training time: steps x the median step, mean over seeds."""
    times = [run.result.steps * median_step_s(run) for run in finished.values()]
    return statistics.fmean(times) if times else None


def _equal_time(column: Sequence[_Measured]) -> float | None:
    """The shortest training time in a column: how far every run is."""
    times = [time for measured in column if (time := _train_s(measured.finished)) is not None]
    return min(times) if len(times) > 1 else None


def _at_time(finished: Mapping[int, Finished], seconds: float | None, planned: PlannedColumn) -> float | None:
    """Validation metric when that much training time had passed, linear between the points of the curve; mean over seeds."""
    if seconds is None or not finished:
        return None
    losses = []
    for run in finished.values():
        step_s = median_step_s(run)
        points = [(record["step"] * step_s, record["valid"]) for record in run.folder.read_metrics() if "valid" in record]
        # Seeds differ in speed: the end of one that is a little faster stands for that time.
        losses.append(valid_at(points, seconds))
    return _metric(statistics.fmean(losses), planned)


def _mean_load(finished: Mapping[int, Finished]) -> dict[str, float] | None:
    """Largest over mean load by mode, mean over seeds."""
    loads = [run.load for run in finished.values() if run.load is not None]
    return {mode: statistics.fmean([load[mode] for load in loads]) for mode in loads[0]} if loads else None


def _notes(planned: PlannedTable, cells: Sequence[_Measured]) -> list[str]:
    """What one must know to read the numbers."""
    request = planned.request
    runs = [run for measured in cells for run in measured.finished.values()]
    notes = [
        *_settings_notes(planned),
        _choice_note(planned),
        sources_note(runs) or "",
        f"validation at equal time is of the first {2 * CURVE_TOKENS:,} tokens, as during training" if runs else "",
        "hyperparameters are the same for all methods of a column" if request.settings == "paper" else "",
        request.scale.note,
        "training time is steps x the median step of the runs themselves, as the machine was then",
        *_published_notes(planned),
    ]
    if request.settings == "released":
        notes.append(
            "gamma of WT-S is 1e-4 here, and 1e-3 occurs among the released runs too; gamma of C4-S and "
            "peS2o-S is 0 (paper: 1e-3); delta of WT-B, C4-B and peS2o-B is 0.1 (paper: 0.2); Switch starts at standard scale "
            "with rows of equal norm on C4-B and peS2o-B, elsewhere at a tenth of the variance with free rows"
        )
    for measured in cells:
        load = _mean_load(measured.finished)
        if load is not None and measured.cell.sized.row.method in ("s-base", "softmax-renorm-moe", "switch"):
            name = planned.columns[measured.cell.column].column.name
            notes.append(
                f"{name}, {measured.cell.sized.label}: largest over mean load {load['training']:.2f} as in training, "
                f"{load['valid']:.2f} on validation"
            )
    return [note for note in notes if note]


def _choice_note(planned: PlannedTable) -> str:
    """How much of the table was asked for."""
    chosen = planned.table
    table = TABLES.get(chosen.name) or OWN_TABLES[chosen.name]
    whole = table.selected(columns=None, rows=None, settings=planned.request.settings)
    if (len(chosen.rows), len(chosen.columns)) == (len(whole.rows), len(whole.columns)):
        return ""
    return (
        f"a part of the table: {len(chosen.rows)} of {len(whole.rows)} rows and {len(chosen.columns)} of "
        f"{len(whole.columns)} columns were asked for"
    )


def _published_notes(planned: PlannedTable) -> list[str]:
    """In what the published values differ from one another, and from what is measured here."""
    own = facts().get(planned.table.name, {}).get("note", "")
    notes = [f"of the published values: {own}" if own else ""]
    if any(cell.published is not None for cell in planned.cells):
        notes.append(
            "the published runs mix two clippings of the gradient: 0.1 for the small dense and Top-K models on words, 0.25 for "
            "all others" + (", and so do these" if planned.request.settings == "released" else "; here a column has one")
        )
    forms = {cell.sized.row.method for cell in planned.cells if cell.published is not None} & RELEASED_FORMS.keys()
    if forms:
        beside = "; both forms stand beside the same published value" if planned.request.settings == "paper" else ""
        notes.append(
            f"the published rows of {', '.join(sorted(forms))} come from the released code, whose form differs from the "
            f"paper's ({'; '.join(RELEASED_FORMS[method] for method in sorted(forms))}){beside}"
        )
    if planned.request.scale.is_published:
        names = [planned.columns[cell.column].column.name for cell in planned.cells]
        if any(name.startswith("WT") for name in names):
            notes.append(
                "the published WikiText-103 runs encoded the text line by line without an end-of-line token; here line ends "
                "are kept and predicted"
            )
        if any(name in SCALED_COLUMNS for name in names):
            notes.append("C4 and peS2o: what separates documents, and the part of peS2o that is evaluated, are chosen here")
    return notes


def _settings_notes(planned: PlannedTable) -> list[str]:
    """Length, batch and optimiser of the columns; those that share them on one line."""
    columns: dict[str, list[str]] = {}
    for c, column in enumerate(planned.columns):
        train = next(cell.train for cell in planned.cells if cell.column == c)
        # Released runs clip some methods otherwise, which a note of its own says.
        clip = f", clip {train.clip:g}" if planned.request.settings == "paper" else ""
        words = (
            f"{train.steps:,} steps of {train.tokens_per_step:,} tokens, lr {train.lr:g}, warm-up {train.warmup}{clip}, "
            f"dropout {column.column.shape.dropout:g}, {train.precision}"
        )
        columns.setdefault(words, []).append(column.column.name)
    return [f"{', '.join(names)}: {words}" for words, names in columns.items()]
