"""A table's result from the pool: a cell without a result says why; nothing is left out."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from sparseffn.data import to_metric
from sparseffn.paper.planned import PlannedCell, PlannedColumn, PlannedTable, is_unequal, residual_percent
from sparseffn.paper.pool import Finished, Pool, Status, window_losses
from sparseffn.paper.table_notes import table_notes
from sparseffn.paper.table_rows import convention_percent, counted_percent
from sparseffn.results import table_result as results
from sparseffn.stats import Difference, SeedNoise, difference, seed_noise
from sparseffn.storage import environment


@dataclass(frozen=True, kw_only=True, eq=False)
class MeasuredCell:
    """A cell with what the pool holds of it."""

    cell: PlannedCell
    statuses: Mapping[int, Status]

    @cached_property
    def finished(self) -> dict[int, Finished]:
        """By seed."""
        return {seed: status.finished for seed, status in self.statuses.items() if status.finished is not None}

    @property
    def load(self) -> results.Load | None:
        """Mean over seeds."""
        loads = [run.load for run in self.finished.values() if run.load is not None]
        if not loads:
            return None
        valid, training = ([getattr(load, mode) for load in loads] for mode in ("valid", "training"))
        return results.Load(valid=statistics.fmean(valid), training=statistics.fmean(training))

    @property
    def train_s(self) -> float | None:
        """Mean over seeds."""
        times = [run.train_s for run in self.finished.values()]
        return statistics.fmean(times) if times else None


@dataclass(frozen=True, kw_only=True, eq=False)
class _Column:
    """What the cells of a column share."""

    planned: PlannedColumn
    cells: Sequence[MeasuredCell]
    noise: SeedNoise | None
    """In nats, pooled over the rows."""
    equal_time_s: float | None
    """The shortest training time: how far every run is."""

    @classmethod
    def of(cls, planned: PlannedColumn, cells: Sequence[MeasuredCell]) -> _Column:
        losses = {m.cell.row: {seed: run.result.test for seed, run in m.finished.items()} for m in cells if m.finished}
        times = [time for m in cells if (time := m.train_s) is not None]
        equal_time_s = min(times) if len(times) > 1 else None
        return cls(planned=planned, cells=cells, noise=seed_noise(losses), equal_time_s=equal_time_s)

    @property
    def unit(self) -> str:
        """Of differences."""
        metric = None if self.planned.corpus is None else to_metric(0.0, self.planned.corpus.unit)[0]
        return "nats per token" if metric in (None, "perplexity") else metric

    @property
    def nats(self) -> float:
        """In one unit of differences."""
        return 1.0 if self.unit == "nats per token" else math.log(2)

    def metric(self, nats: float) -> float:
        assert self.planned.corpus is not None, "there are runs, so there is a corpus"
        return to_metric(nats, self.planned.corpus.unit)[1]

    @property
    def noise_note(self) -> str:
        if self.noise is None:
            return ""
        scatter = f"{self.noise.std / self.nats:.4f} {self.unit}"
        return (
            f"{self.planned.column.name}: runs of one row scatter by {scatter} (standard deviation, pooled over the rows, "
            f"{self.noise.freedom} degrees of freedom); the intervals of differences take it for that of every row"
        )

    def difference(self, ours: MeasuredCell, theirs: MeasuredCell | None) -> Difference | None:
        """Test loss less another row's, paired over seeds and windows; None without a common seed."""
        if theirs is None or theirs is ours or not set(theirs.finished) & set(ours.finished):
            return None
        found = difference(_windows(ours), _windows(theirs), noise=self.noise)
        return found.in_unit(self.nats)

    def at_equal_time(self, finished: Mapping[int, Finished]) -> float | None:
        """Validation metric after that much training time, linear between the points of the curve; mean over seeds."""
        if self.equal_time_s is None or not finished:
            return None
        losses = []
        for run in finished.values():
            points = [(record["step"], record["valid"]) for record in run.folder.read_metrics() if "valid" in record]
            steps, values = zip(*points, strict=True)
            # Seeds differ in speed: the end of one that is a little faster stands for that time.
            losses.append(float(np.interp(self.equal_time_s, np.array(steps) * run.step_s, values)))
        return self.metric(statistics.fmean(losses))


def _windows(measured: MeasuredCell) -> dict[int, np.ndarray]:
    return {seed: window_losses(finished, "test") for seed, finished in measured.finished.items()}


def table_result(planned: PlannedTable, pool: Pool) -> results.TableResult:
    """The table as the pool knows it."""
    cells = [
        MeasuredCell(cell=cell, statuses={seed: pool.status(spec) for seed, spec in cell.specs.items()})
        for cell in planned.cells
    ]
    columns = [_Column.of(column, [m for m in cells if m.cell.column == c]) for c, column in enumerate(planned.columns)]
    runs = [run for measured in cells for run in measured.finished.values()]
    loads = [(columns[m.cell.column].planned, m.cell, load) for m in cells if (load := m.load) is not None]
    return results.TableResult(
        table=planned.table.name,
        title=planned.table.title,
        scale=planned.request.scale.name,
        settings=planned.request.settings,
        columns=[_column(planned, column) for column in columns],
        rows=_rows(planned),
        cells=[_cell(measured, columns[measured.cell.column]) for measured in cells],
        difference_unit=" or ".join(sorted({column.unit for column in columns})),
        sweep=_sweep(planned),
        notes=[note for note in (*table_notes(planned, runs, loads), *(column.noise_note for column in columns)) if note],
        environment=_environment(runs),
    )


def _sweep(planned: PlannedTable) -> results.Sweep | None:
    table = planned.table
    return results.Sweep(axis=table.axis, x=[table.places.get(row.key) for row in table.rows]) if table.axis else None


def _environment(runs: Sequence[Finished]) -> dict[str, Any]:
    """Of the runs; what differs between them is listed. Of this process where there is no run."""
    here = environment()
    if not runs:
        return here
    # What no run wrote down, as those of earlier versions, is left out.
    known = [name for name in here if any(name in run.environment for run in runs)]
    values = {name: {str(run.environment.get(name, "unknown")) for run in runs} for name in known}
    return {name: " or ".join(sorted(several)) for name, several in values.items()}


def _column(planned: PlannedTable, shared: _Column) -> results.Column:
    column, corpus = shared.planned.column, shared.planned.corpus
    is_own = column.is_own or not planned.table.values
    published_metric = "bits per character" if column.name == "E8" else "perplexity"
    return results.Column(
        name=column.name,
        published_name=None if is_own else column.name,
        corpus=column.corpus[0] if corpus is None else corpus.name,
        metric=published_metric if corpus is None else to_metric(0.0, corpus.unit)[0],
        published_metric=None if is_own else published_metric,
        digest=None if corpus is None else corpus.digest,
        reason=shared.planned.reason,
        sizes=column.sizes,
        steps=shared.planned.steps,
        equal_time_s=shared.equal_time_s,
    )


def _rows(planned: PlannedTable) -> list[results.Row]:
    """Labels with the numbers of this scale; a mark that does not hold in every column, or of parameters, names its own."""
    rows = []
    for r, row in enumerate(planned.table.rows):
        cells = {planned.columns[cell.column].column.name: cell for cell in planned.cells if cell.row == r}
        marks = []
        for mark in dict.fromkeys(mark for cell in cells.values() for mark in cell.sized.marks):
            where = [name for name, cell in cells.items() if mark in cell.sized.marks]
            marks.append(mark if len(where) == len(cells) else f"{', '.join(where)}: {mark}")
        percents = {name: residual_percent(cell, planned.columns[cell.column]) for name, cell in cells.items()}
        marks += [f"{name}: {p:+.2f}% parameters against dense" for name, p in percents.items() if is_unequal(p)]
        rows.append(
            results.Row(
                label=next((cell.sized.label for cell in cells.values()), row.key),
                published_label=None if row.own else row.published,
                settings="released" if planned.request.settings == "released" else row.form,
                marks=marks,
            )
        )
    return rows


def _cell(measured: MeasuredCell, column: _Column) -> results.Cell:
    cell, finished = measured.cell, measured.finished
    status, reason = _cell_status(measured)
    test, valid = ([column.metric(getattr(run.result, split)) for run in finished.values()] for split in ("test", "valid"))
    by_key = {other.cell.key: other for other in column.cells}
    row = cell.sized.row
    # The paper's form has the published label for its key.
    paper = by_key.get(row.published) if row.form == "released" else None
    return results.Cell(
        row=cell.row,
        column=cell.column,
        published=cell.published,
        status=status,
        reason=reason,
        n=len(finished),
        mean=statistics.fmean(test) if test else None,
        spread=statistics.stdev(test) if len(test) > 1 else None,
        valid_mean=statistics.fmean(valid) if valid else None,
        seeds=list(finished),
        values=test,
        params=cell.model.num_params(),
        residual_percent=residual_percent(cell, column.planned),
        flops_percent=convention_percent(cell.model.ffn, column.planned.column),
        counted_flops_percent=counted_percent(cell.model.ffn, column.planned.dense.ffn),
        equal_time=column.at_equal_time(finished),
        train_s=measured.train_s,
        load=measured.load,
        against_dense=column.difference(measured, by_key.get("dense")),
        against_sigma_moe=column.difference(measured, by_key.get("sigma-moe")),
        against_paper_form=column.difference(measured, paper),
        versions=sorted({str(run.environment.get("sparseffn", "unknown")) for run in finished.values()}),
    )


def _cell_status(measured: MeasuredCell) -> tuple[results.Status, str | None]:
    """Of all seeds: measured when there is a result, with a reason where one is missing."""
    if measured.cell.reason is not None:
        return "missing", measured.cell.reason
    lacking = {seed: status for seed, status in measured.statuses.items() if status.finished is None}
    if measured.finished:
        return "measured", "; ".join(f"seed {seed}: {status.reason}" for seed, status in lacking.items()) or None
    failed = any(status.kind == "failed" for status in lacking.values())
    return "failed" if failed else "missing", "; ".join(dict.fromkeys(str(status.reason) for status in lacking.values()))
