"""What a table of the paper says, as text: the same cells, footnotes and notes in every form that it is written in.

A block holds all quantities of one column of the paper; the overview sets the main one of all columns side by side, as the
paper does. A dash never stands alone: it has a footnote, or the notes say what it means.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from sparseffn.report import formats
from sparseffn.report.grid import Footnotes, Heading
from sparseffn.report.paper_cells import (
    DECIDED,
    Cell,
    cell_counts,
    cell_of,
    has_published,
    measured_text,
    percent_text,
    published_text,
    quantities,
    reason,
    trained_and_measured,
)
from sparseffn.report.paper_result import check_paper_table
from sparseffn.report.result import Result


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A table of a paper's table.

    Attributes:
        name: short, unique in the table.
        title: what the block is about.
        facts: what its numbers depend on, for the overview the metrics.
        headings: of the columns: group, name within the group, and a heading that needs no group.
        rows: a label for each row, whose marks are those of the row, and a cell for each heading.
    """

    name: str
    title: str
    facts: str
    headings: tuple[tuple[str, str, str], ...]
    rows: tuple[tuple[Cell, tuple[Cell, ...]], ...]

    @property
    def short_headings(self) -> list[Heading]:
        """Group and heading, as `grid` takes them."""
        return [(group, header) for group, _, header in self.headings]

    @property
    def groups(self) -> list[tuple[str, int]]:
        """Each group and over how many columns it stands."""
        return [(name, len(list(members))) for name, members in groupby(self.headings, key=lambda heading: heading[0])]

    @property
    def marks(self) -> set[str]:
        """The letters of all footnotes that the block refers to."""
        return {mark for label, cells in self.rows for cell in (label, *cells) for mark in cell.marks}


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperTable:
    """A whole table.

    Attributes:
        name: as the file says, "table3".
        title: of the table.
        summary: scale, settings, and how many cells were measured.
        incomplete: what is lacking, or None.
        overview: None where the table has one column, which says it all.
        blocks: one for each column of the paper.
        footnotes: letter to text, in the order of the letters.
        notes: to the whole table.
        environment: the machine and the libraries.
    """

    name: str
    title: str
    summary: str
    incomplete: str | None
    overview: Block | None
    blocks: tuple[Block, ...]
    footnotes: Mapping[str, str]
    notes: tuple[str, ...]
    environment: Mapping[str, Any]


def build_paper_table(result: Result) -> PaperTable:
    """Arrange a table's parsed JSON.

    Raises:
        UserError: see `check_paper_table`.
    """
    check_paper_table(result)
    footnotes = Footnotes()
    labels = [Cell(text=row["label"], marks=footnotes.mark(*_row_notes(row, result))) for row in result["rows"]]
    columns = range(len(result["columns"]))
    overview = _overview(result, labels, footnotes) if len(columns) > 1 else None
    blocks = tuple(_block(result, column, labels, footnotes) for column in columns)
    return PaperTable(
        name=result["table"],
        title=numbered_title(result),
        summary=_summary(result),
        incomplete=_incomplete(result),
        overview=overview,
        blocks=blocks,
        footnotes=footnotes.texts(),
        notes=(*_general_notes(result, blocks), *result["notes"]),
        environment=result["environment"],
    )


def numbered_title(result: Result) -> str:
    """The title after the number of the paper's table, which a title may have already."""
    number = re.fullmatch(r"table(\d+)", result["table"])
    if number is None or result["title"].startswith(f"Table {number[1]}"):
        return result["title"]
    return f"Table {number[1]}: {result['title']}"


def _row_notes(row: Result, result: Result) -> list[str]:
    published, settings = row.get("published_label"), row.get("settings")
    notes = list(row["marks"])
    if published and published != row["label"] and not any(_names_both(mark, row["label"], published) for mark in notes):
        notes.append(f"the paper's row {published!r}")
    if settings and settings != result["settings"]:
        notes.append(f"{settings} settings")
    return notes


def _names_both(mark: str, label: str, published: str) -> bool:
    """Whether a mark says already of which row of the paper this one is."""
    here, _, there = mark.partition(" stands for ")
    return there == published or (there != "" and here.startswith(label))


def _block(result: Result, index: int, labels: list[Cell], footnotes: Footnotes) -> Block:
    column = result["columns"][index]
    shown = quantities(result, index)
    rows = []
    for row, label in enumerate(labels):
        cell = cell_of(result, row, index)
        cells = [Cell(text=q.write(cell), marks=footnotes.mark(q.note(cell))) for q in shown]
        rows.append((label, tuple(cells)))
    return Block(
        name=column["name"],
        title=_column_title(column),
        facts=_facts(column),
        headings=tuple((q.group, q.name, q.header) for q in shown),
        rows=tuple(rows),
    )


def _overview(result: Result, labels: list[Cell], footnotes: Footnotes) -> Block:
    """All columns side by side: what was measured, or counted where nothing is trained, and what was published."""
    trained, _ = trained_and_measured(result)
    ours = "test" if trained else "K/N_E"
    columns = list(enumerate(result["columns"]))
    published = {index for index, _ in columns if has_published(result, index)}
    rows = []
    for row, label in enumerate(labels):
        cells: list[Cell] = []
        for index, column in columns:
            cell = cell_of(result, row, index)
            text = measured_text(cell, column["metric"]) if trained else percent_text(cell.get("flops_percent"))
            decided = cell["status"] == "measured" and (cell.get("against_dense") or {}).get("decided")
            marks = footnotes.mark(reason(cell)) if trained else ()
            cells.append(Cell(text=f"{text} {DECIDED}" if decided else text, marks=marks))
            if index in published:
                cells.append(Cell(text=published_text(cell.get("published"), column.get("published_metric"))))
        rows.append((label, tuple(cells)))
    headings = [
        (column["name"], name, f"{column['name']} {name}")
        for index, column in columns
        for name in (ours, *(("published",) if index in published else ()))
    ]
    theirs = [_metrics([result["columns"][index] for index in sorted(published)], "published_metric", "published")]
    return Block(
        name="overview",
        title="All columns",
        facts="; ".join([_metrics(result["columns"], "metric", ours), *(theirs if published else [])]),
        headings=tuple(headings),
        rows=tuple(rows),
    )


def _metrics(shown: Sequence[Result], key: str, name: str) -> str:
    """`test in bits per character`, or which columns are in which metric."""
    columns: dict[str, list[str]] = {}
    for column in shown:
        columns.setdefault(column.get(key) or column["metric"], []).append(column["name"])
    if len(columns) == 1:
        return f"{name} in {next(iter(columns))}"
    return f"{name} in " + ", ".join(f"{metric} ({', '.join(names)})" for metric, names in columns.items())


def _column_title(column: Result) -> str:
    published = column.get("published_name")
    other = f" (the paper's {published})" if published and published != column["name"] else ""
    return f"{column['name']}{other}: {column['corpus']}, {column['metric']}"


def _facts(column: Result) -> str:
    steps, digest = column.get("steps"), column.get("digest")
    facts = [
        column.get("sizes") or "",
        f"{formats.integer(steps)} steps" if steps else "",
        f"digest {digest[:12]}" if digest else "",
    ]
    return "; ".join(filter(None, facts))


def _summary(result: Result) -> str:
    counts = {status: number for status, number in cell_counts(result).items() if number}
    cells = ", ".join(f"{number} {status}" for status, number in counts.items())
    return f"Scale {result['scale']}, {result['settings']} settings; cells: {cells}."


def _incomplete(result: Result) -> str | None:
    counts = cell_counts(result)
    lacks = [f"{counts[status]} {status}" for status in ("missing", "failed") if counts[status]]
    return f"incomplete: of {sum(counts.values())} cells {' and '.join(lacks)}; the footnotes say why" if lacks else None


def _general_notes(result: Result, blocks: tuple[Block, ...]) -> list[str]:
    trained, measured = trained_and_measured(result)
    texts = {cell.text for block in blocks for _, cells in block.rows for cell in cells if not cell.marks}
    notes = []
    if formats.NOT_MEASURED in texts:
        notes.append(
            f"{formats.NOT_MEASURED} without a letter: not in the paper, not measured, or without meaning for the row."
        )
    if measured:
        notes += _measured_notes(result)
    if trained and any(has_published(result, index) for index in range(len(result["columns"]))):
        same = result["scale"] == "paper"
        compare = "" if same else " It is of other sizes and corpora: only the order of the rows can be compared."
        notes.append(f"Published: what arXiv 2310.10837 prints, in the metric that the heading names.{compare}")
    notes.append(
        "FLOPs are those of the feedforward blocks in percent of the dense model's: K/N_E is the paper's convention, shown for "
        "the dense model and mixtures with the N_E G of the column; counted includes the selection."
    )
    notes.append("Residual: parameters of the whole model against those of the dense model of the column.")
    return notes


def _measured_notes(result: Result) -> list[str]:
    numbers = {cell["n"] for cell in result["cells"] if cell["status"] == "measured"}
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
