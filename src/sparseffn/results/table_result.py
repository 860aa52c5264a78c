"""One of the paper's tables as `sparseffn reproduce table` writes it: measured cells (`paper-table`), or settings.

    table = storage.read(path, PaperTable, fix="run `sparseffn reproduce table` again")

A cell without a result says why; what a table does not hold of a place is missing there.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from sparseffn.stats import Difference
from sparseffn.storage import Count

Status = Literal["measured", "missing", "failed", "counted"]
"""Trained and evaluated; not run, or run by another version; run without a result; never trained."""


class Column(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    published_name: str | None = None
    """None for a column of our own."""
    corpus: str
    metric: str
    published_metric: str | None = None
    digest: str | None = None
    """Of the corpus; None where it is not there or none is needed."""
    reason: str | None = None
    """Why there is no corpus."""
    sizes: str | None = None
    steps: Count | None = None
    equal_time_s: float | None = None
    """Training time after which `equal_time` is: that of the fastest row."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    label: str
    """With the numbers of this scale."""
    published_label: str | None = None
    settings: str | None = None
    """paper or released."""
    marks: list[str]


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """Largest over mean load of the experts in the worst layer, mean over seeds."""

    valid: float
    training: float


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """A row in a column. Losses are in the column's metric, differences in the table's `difference_unit`."""

    row: Count
    column: Count
    published: float | None = None
    status: Status
    reason: str | None = None
    n: Count = 0
    mean: float | None = None
    """Test loss, mean over seeds; of a counted cell the percentage."""
    spread: float | None = None
    """Standard deviation over seeds; None for one."""
    valid_mean: float | None = None
    seeds: list[int] = []
    values: list[float] = []
    """Test loss by seed."""
    params: float | None = None
    residual_percent: float | None = None
    flops_percent: float | None = None
    """K / N_E, the paper's convention."""
    counted_flops_percent: float | None = None
    equal_time: float | None = None
    """Validation loss after the column's `equal_time_s` of training."""
    train_s: float | None = None
    load: Load | None = None
    against_dense: Difference | None = None
    against_sigma_moe: Difference | None = None
    against_paper_form: Difference | None = None
    """Of a released form, its difference from the paper's."""
    versions: list[str] = []
    """Of the package, that made the runs, where another made them than wrote the table."""

    def __post_init__(self) -> None:
        if self.status in ("missing", "failed") and not self.reason:
            raise ValueError(f"a cell that is {self.status} must have a reason")
        if self.status == "measured" and (self.mean is None or self.n < 1 or len(set(self.seeds)) != self.n):
            raise ValueError(f"a measured cell must have a mean of n different seeds; got {self.mean}, {self.n}, {self.seeds}")


class Sweep(msgspec.Struct, frozen=True, kw_only=True):
    axis: str
    x: list[float | None]
    """Place of each row on the axis; None for one beside it."""


class TableResult(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="paper-table"):
    version: Literal[1] = 1
    """Of the layout."""
    table: str
    title: str
    scale: str
    settings: str
    columns: list[Column]
    rows: list[Row]
    cells: list[Cell]
    difference_unit: str
    sweep: Sweep | None = None
    notes: list[str]
    environment: dict[str, Any]

    def __post_init__(self) -> None:
        for name in ("columns", "rows", "cells"):
            if not getattr(self, name):
                raise ValueError(f"`{name}` must not be empty")
        names = [column.name for column in self.columns]
        if len(set(names)) < len(names):
            raise ValueError(f"columns must have different names; got {', '.join(names)}")
        places = [(cell.row, cell.column) for cell in self.cells]
        for row, column in places:
            if row >= len(self.rows) or column >= len(self.columns):
                raise ValueError(f"a cell must be in the table; got row {row}, column {column}")
            if places.count((row, column)) > 1:
                raise ValueError(f"a cell must be the only one of its place; got row {row}, column {column} again")


class SettingsRow(msgspec.Struct, frozen=True, kw_only=True):
    """The hyperparameters of a column, as they are here and as published."""

    name: str
    here: dict[str, Any]
    published: dict[str, Any]
    differences: list[str]
    """Names of those that differ."""


class SettingsResult(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="paper-settings"):
    version: Literal[1] = 1
    table: str
    title: str
    scale: str
    settings: str
    rows: list[SettingsRow]
    environment: dict[str, Any]

    def __post_init__(self) -> None:
        if not self.rows:
            raise ValueError("`rows` must not be empty")


PaperTable = TableResult | SettingsResult


class PlannedRun(msgspec.Struct, frozen=True, kw_only=True):
    """A run of a dry run, with what it costs."""

    table: str
    row: str
    column: str
    published: float | None
    n_seeds: int
    residual_percent: float
    unequal: bool
    flops_percent: float | None
    counted_flops_percent: float
    shared: bool
    """Listed with an earlier table, and counted there."""
    corpus: str
    corpus_missing: str | None
    params: int
    training_flops: float
    memory_bytes: float
    tokens: int
    seconds_here: float
    seconds_gpu: float


class Totals(msgspec.Struct, frozen=True, kw_only=True):
    training_flops: float
    seconds_here: float
    seconds_gpu: float


class DryRunResult(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="paper-dry-run"):
    version: Literal[1] = 1
    scale: str | None
    runs: list[PlannedRun]
    without_runs: list[str]
    n_distinct: int
    """Seeds counted."""
    totals: Totals
    here: str
    gpu: str
    memory: str
    """What each estimate rests on."""
