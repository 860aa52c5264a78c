"""How a cell of the paper's tables is written: its quantities, one function each, and the footnotes that a cell needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import get_args

from sparseffn.report import formats
from sparseffn.report.table import Column
from sparseffn.results import table_result
from sparseffn.results.table_result import Cell, Status, TableResult
from sparseffn.stats import Difference

# Stands behind a difference, and the value that it is of, where the interval excludes zero.
DECIDED = "*"
# Fields of a cell that hold a difference from another row, and how they are called; the second is shown where there is one.
DIFFERENCES = {"against_dense": "against dense", "against_sigma_moe": "against sigma-moe"}


@dataclass(frozen=True, slots=True)
class Quantity:
    """A column's headings, how its cells are written, and the footnote that a cell needs, if any."""

    group: str
    name: str
    standalone: str
    write: Callable[[Cell], str]
    note: Callable[[Cell], str | None] = lambda cell: None

    @property
    def column(self) -> Column:
        return Column(group=self.group, name=self.name, standalone=self.standalone)


def cell_counts(result: TableResult) -> dict[str, int]:
    """How many cells there are of each status; a place without a cell is a missing one."""
    cells = [cell_of(result, row, column) for row in range(len(result.rows)) for column in range(len(result.columns))]
    return {status: sum(cell.status == status for cell in cells) for status in get_args(Status)}


def cell_of(result: TableResult, row: int, column: int) -> Cell:
    """The cell of a place; one that the file lacks is missing, and says so."""
    for cell in result.cells:
        if (cell.row, cell.column) == (row, column):
            return cell
    return Cell(row=row, column=column, status="missing", reason="the file holds nothing for it")


def trained_and_measured(result: TableResult) -> tuple[bool, bool]:
    """Whether there are cells to be trained, and whether one was."""
    counts = cell_counts(result)
    return counts["counted"] < sum(counts.values()), counts["measured"] > 0


def reason(cell: Cell) -> str | None:
    """Why a cell has no loss, or lacks a seed."""
    if cell.status == "measured":
        return cell.reason
    if cell.status == "counted":
        return "counted; nothing is trained for it"
    return f"{cell.status}: {cell.reason}"


def measured_text(cell: Cell, metric: str) -> str:
    """The loss over seeds; how many there are has a column of its own."""
    if cell.status != "measured":
        return formats.NOT_MEASURED
    return formats.loss(cell.mean, metric) + ("" if cell.spread is None else f" ± {formats.loss(cell.spread, metric)}")


def _published(cell: Cell, column: table_result.Column) -> str:
    """As the paper prints it: two decimals, one for a percentage."""
    metric = column.published_metric or column.metric
    return percent_text(cell.published) if "percent" in metric or "%" in metric else formats.fixed(cell.published)


def percent_text(percentage: float | None) -> str:
    """A number that is a percentage already."""
    return formats.percent(None if percentage is None else percentage / 100)


def _difference(cell: Cell, key: str) -> str:
    """The difference, its interval, and the sign of what is decided; a narrow interval has a decimal more."""
    found: Difference | None = getattr(cell, key)
    if found is None or cell.status != "measured":
        return formats.NOT_MEASURED
    digits = 3 if found.high - found.low >= 0.01 else 4
    mean, low, high = (f"{value:+.{digits}f}" for value in (found.difference, found.low, found.high))
    return f"{mean} [{low}, {high}]" + (f" {DECIDED}" if found.decided else "")


def _difference_note(cell: Cell, key: str) -> str | None:
    """Seeds that only one of the two has are not in the difference."""
    found: Difference | None = getattr(cell, key)
    if cell.status != "measured" or found is None or found.n_seeds == cell.n:
        return None
    return f"the difference is over {found.n_seeds} of {cell.n} seeds, those that both rows have"


def difference_unit(result: TableResult, column: table_result.Column) -> str:
    """The unit of a column's differences; a table whose columns differ in it says `bits per character or nats per token`."""
    units = result.difference_unit.split(" or ")
    own = "nats per token" if column.metric == "perplexity" else column.metric
    return own if own in units else result.difference_unit


def has_published(result: TableResult, column: int) -> bool:
    """Whether the paper has the column, or a value for it; columns of our own have neither."""
    values = [cell.published for cell in result.cells if cell.column == column]
    return result.columns[column].published_name is not None or any(value is not None for value in values)


def quantities(result: TableResult, index: int) -> list[Quantity]:
    """What the block of a column shows; but for the published values the same for all columns of a table."""
    column, (trained, measured) = result.columns[index], trained_and_measured(result)
    shown = _losses(column, trained=trained, published=has_published(result, index))
    if measured:
        # The difference stands beside the loss that it is of; in a terminal of 100 columns they share a part.
        name = f"{difference_unit(result, column)}, 95% interval"
        for key, group in DIFFERENCES.items():
            if key == "against_dense" or any(getattr(cell, key) is not None for cell in result.cells):
                write, note = partial(_difference, key=key), partial(_difference_note, key=key)
                shown.append(Quantity(group, name, f"{group}, {name}", write, note))
        shown += _validation(column)
    return [*shown, *_COSTS]


def overview_quantities(result: TableResult, index: int) -> list[Quantity]:
    """The main one of a column: what was measured, or counted where nothing is trained; and what was published."""
    column, (trained, _) = result.columns[index], trained_and_measured(result)

    def ours(cell: Cell) -> str:
        text = measured_text(cell, column.metric) if trained else percent_text(cell.flops_percent)
        decided = cell.status == "measured" and cell.against_dense is not None and cell.against_dense.decided
        return f"{text} {DECIDED}" if decided else text

    name = "test" if trained else "K/N_E"
    shown = [Quantity(column.name, name, f"{column.name} {name}", ours, reason if trained else lambda c: None)]
    if has_published(result, index):
        shown.append(Quantity(column.name, "published", f"{column.name} published", partial(_published, column=column)))
    return shown


def _losses(column: table_result.Column, *, trained: bool, published: bool) -> list[Quantity]:
    published_metric = column.published_metric or column.metric
    loss, paper = f"test, {column.metric}", f"published, {published_metric}"
    shown: list[Quantity] = []
    if trained:
        shown += [
            Quantity(loss, "mean ± std", loss, lambda c: measured_text(c, column.metric), reason),
            Quantity(loss, "n", "", lambda c: str(c.n) if c.status == "measured" else ""),
        ]
    if published:
        group, name = (loss, paper) if trained else ("in the paper", published_metric)
        shown.append(Quantity(group, name, paper, partial(_published, column=column)))
    return shown


def _validation(column: table_result.Column) -> list[Quantity]:
    metric, seconds, group = column.metric, column.equal_time_s, "validation"
    after = "at equal time" + (f" ({formats.seconds(seconds)})" if seconds is not None else "")
    return [
        Quantity(group, "at the end", group, lambda c: formats.loss(c.valid_mean, metric)),
        Quantity(group, after, f"{group} {after}", lambda c: formats.loss(c.equal_time, metric)),
    ]


_COSTS = (
    Quantity("parameters", "total", "parameters", lambda c: formats.count(None if c.params is None else round(c.params))),
    Quantity("parameters", "residual", "", lambda c: formats.signed_percent(c.residual_percent)),
    Quantity("FLOPs", "K/N_E", "FLOPs, K/N_E", lambda c: percent_text(c.flops_percent)),
    Quantity("FLOPs", "counted", "FLOPs counted", lambda c: percent_text(c.counted_flops_percent)),
)
