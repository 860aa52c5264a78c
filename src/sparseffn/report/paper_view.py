"""One of the paper's tables as text: the same cells, footnotes and notes in every form that it is written in.

A block holds all quantities of one column of the paper; the overview sets the main one of all columns side by side, as the
paper does. A dash never stands alone: it has a footnote, or the notes say what it means.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sparseffn.report import formats
from sparseffn.report.paper_cells import (
    DECIDED,
    Quantity,
    cell_counts,
    cell_of,
    has_published,
    overview_quantities,
    quantities,
    trained_and_measured,
)
from sparseffn.report.table import Cell, Column, Footnotes, Row, Table
from sparseffn.results import table_result
from sparseffn.results.table_result import PaperTable, SettingsResult, SettingsRow, TableResult


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperReport:
    """One of the paper's tables, as it is reported."""

    name: str
    """As the file says, "table3"."""
    title: str
    summary: str
    """Scale, settings, and how many cells were measured."""
    incomplete: str = ""
    """What is lacking."""
    overview: Table | None = None
    """None where the table has one column, which says it all."""
    blocks: tuple[Table, ...]
    footnotes: Mapping[str, str] = field(default_factory=dict)
    """Letter to text, of all blocks."""
    notes: tuple[str, ...]
    """To the whole table, the last of them the machine and the libraries."""
    environment: Mapping[str, Any]

    @property
    def tables(self) -> list[Table]:
        """The overview, where there is one, and the blocks."""
        return [table for table in (self.overview, *self.blocks) if table is not None]

    def footnotes_of(self, table: Table) -> dict[str, str]:
        """Those that a table of it refers to."""
        return {letter: text for letter, text in self.footnotes.items() if letter in table.marks}


def paper_report(result: PaperTable) -> PaperReport:
    """Arrange a table of either kind."""
    if isinstance(result, SettingsResult):
        return _settings_report(result)
    footnotes = Footnotes()
    labels = [Cell(row.label, footnotes.mark(*_row_notes(row, result))) for row in result.rows]
    overview = _overview(result, labels, footnotes) if len(result.columns) > 1 else None
    blocks = tuple(_block(result, index, labels, footnotes) for index in range(len(result.columns)))
    counts = cell_counts(result)
    cells = ", ".join(f"{number} {status}" for status, number in counts.items() if number)
    lacks = " and ".join(f"{counts[status]} {status}" for status in ("missing", "failed") if counts[status])
    return PaperReport(
        name=result.table,
        title=_numbered_title(result),
        summary=f"Scale {result.scale}, {result.settings} settings; cells: {cells}.",
        incomplete=f"incomplete: of {sum(counts.values())} cells {lacks}; the footnotes say why" if lacks else "",
        overview=overview,
        blocks=blocks,
        footnotes=footnotes.texts(),
        notes=(*_general_notes(result, blocks), *result.notes, f"Made with: {formats.setting(result.environment)}"),
        environment=result.environment,
    )


def _numbered_title(result: PaperTable) -> str:
    """The title after the number of the paper's table, which a title may have already."""
    number = re.fullmatch(r"table(\d+)", result.table)
    if number is None or result.title.startswith(f"Table {number[1]}"):
        return result.title
    return f"Table {number[1]}: {result.title}"


def _row_notes(row: table_result.Row, result: TableResult) -> list[str]:
    published, settings = row.published_label, row.settings
    notes = list(row.marks)
    if published and published != row.label and not any(_names_both(mark, row.label, published) for mark in notes):
        notes.append(f"the paper's row {published!r}")
    if settings and settings != result.settings:
        notes.append(f"{settings} settings")
    return notes


def _names_both(mark: str, label: str, published: str) -> bool:
    """Whether a mark says already of which row of the paper this one is."""
    here, _, there = mark.partition(" stands for ")
    return there == published or (there != "" and here.startswith(label))


def _block(result: TableResult, index: int, labels: list[Cell], footnotes: Footnotes) -> Table:
    column = result.columns[index]
    shown = [(index, quantity) for quantity in quantities(result, index)]
    other = f" (the paper's {column.published_name})" if column.published_name not in (None, column.name) else ""
    title = f"{column.name}{other}: {column.corpus}, {column.metric}"
    steps = f"{formats.integer(column.steps)} steps" if column.steps else ""
    digest = f"digest {column.digest[:12]}" if column.digest else ""
    lead = "; ".join(filter(None, (column.sizes, steps, digest)))
    return replace(_table(result, shown, labels, footnotes), name=column.name, title=title, lead=lead)


def _overview(result: TableResult, labels: list[Cell], footnotes: Footnotes) -> Table:
    """All columns side by side."""
    shown = [(index, q) for index in range(len(result.columns)) for q in overview_quantities(result, index)]
    published = [column for index, column in enumerate(result.columns) if has_published(result, index)]
    lead = _metrics(result.columns, "metric", shown[0][1].name)
    if published:
        lead += f"; {_metrics(published, 'published_metric', 'published')}"
    return replace(_table(result, shown, labels, footnotes), name="overview", title="All columns", lead=lead)


def _table(result: TableResult, shown: list[tuple[int, Quantity]], labels: list[Cell], footnotes: Footnotes) -> Table:
    """Quantities, each of a column of the paper, for every row."""
    rows = []
    for row, label in enumerate(labels):
        found = [(q, cell_of(result, row, index)) for index, q in shown]
        rows.append(Row(cells=(label, *(Cell(q.write(cell), footnotes.mark(q.note(cell))) for q, cell in found))))
    return Table(columns=(Column(name="", is_words=True), *(q.column for _, q in shown)), rows=tuple(rows))


def _metrics(shown: Sequence[table_result.Column], key: str, name: str) -> str:
    """`test in bits per character`, or which columns are in which metric."""
    columns: dict[str, list[str]] = {}
    for column in shown:
        columns.setdefault(getattr(column, key) or column.metric, []).append(column.name)
    if len(columns) == 1:
        return f"{name} in {next(iter(columns))}"
    return f"{name} in " + ", ".join(f"{metric} ({', '.join(names)})" for metric, names in columns.items())


def _general_notes(result: TableResult, blocks: tuple[Table, ...]) -> list[str]:
    trained, measured = trained_and_measured(result)
    dash, notes = formats.NOT_MEASURED, []
    if any(cell.text == dash and not cell.marks for block in blocks for row in block.rows for cell in row.cells[1:]):
        notes.append(f"{dash} without a letter: not in the paper, not measured, or without meaning for the row.")
    if measured:
        notes += _measured_notes(result)
    if trained and any(has_published(result, index) for index in range(len(result.columns))):
        other = " It is of other sizes and corpora: only the order of the rows can be compared."
        compare = "" if result.scale == "paper" else other
        notes.append(f"Published: what arXiv 2310.10837 prints, in the metric that the heading names.{compare}")
    notes.append(
        "FLOPs are those of the feedforward blocks in percent of the dense model's: K/N_E is the paper's convention, shown for "
        "the dense model and mixtures with the N_E G of the column; counted includes the selection."
    )
    notes.append("Residual: parameters of the whole model against those of the dense model of the column.")
    return notes


def _measured_notes(result: TableResult) -> list[str]:
    numbers = {cell.n for cell in result.cells if cell.status == "measured"}
    alone = (
        " Where n = 1 the spread is unknown; unless a note gives the scatter of all rows, the interval covers the choice of "
        "text alone, and decides nothing."
    )
    return [
        f"Test: mean and sample standard deviation over n seeds.{alone if 1 in numbers else ''}",
        f"Against another row: the row's loss less that of the other on the same seeds and evaluation windows; negative is "
        f"better. The 95% interval holds the scatter of seeds and that of blocks of neighbouring "
        f"windows; {DECIDED} marks those that exclude zero, and nothing else is a finding.",
        "At equal time: validation after the same training time for all rows of a column, from the training curve. It is of "
        "the first tokens of validation alone, so that it cannot be compared with the column of the whole split; slower "
        "rows are then before their end, with a learning rate that has still to decay.",
    ]


def _settings_report(result: SettingsResult) -> PaperReport:
    """Hyperparameters: each as it is here, with the published value behind it where the two differ."""
    names = list(result.rows[0].here)
    group = "as it is here [as published, where it differs]"
    block = Table(
        name="settings",
        title="Settings",
        columns=(Column(name="", is_words=True), *(Column(group=group, name=name) for name in names)),
        rows=tuple(Row(cells=(Cell(row.name), *(Cell(_here(row, name)) for name in names))) for row in result.rows),
    )
    return PaperReport(
        name=result.table,
        title=_numbered_title(result),
        summary=f"Scale {result.scale}, {result.settings} settings.",
        blocks=(block,),
        notes=(
            "A value in brackets is the published one, where it differs from the one here.",
            f"Made with: {formats.setting(result.environment)}",
        ),
        environment=result.environment,
    )


def _here(row: SettingsRow, name: str) -> str:
    here = _number(row.here.get(name))
    return f"{here} [{_number(row.published.get(name))}]" if name in row.differences else here


def _number(value: object) -> str:
    """Four digits of a fraction; millions of parameters are not published with more."""
    return f"{value:.4g}" if isinstance(value, float) else formats.setting(value)
