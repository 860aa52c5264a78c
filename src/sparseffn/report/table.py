"""The one model of a table: every report builds it, and a renderer each writes it for terminal, Markdown, HTML and LaTeX.

    table = Table.of(("layer", "ms"), [("dense", "1.2"), ("sigma-moe", "0.4")], title="Forward")
    print_table(table)                # terminal.py
    text = markdown_table(table)      # markdown.py; page.py and latex.py do the same

Cells, headings and notes are text, never markup: renderers escape what means something in their language.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from string import ascii_lowercase
from typing import Any, TypeVar, final

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column's headings, and whether it holds words, which are set left and may be broken, not numbers."""

    name: str
    """Below the group's heading, or alone where there is no group."""
    group: str = ""
    """Heading that the column shares with its neighbours; they are kept together."""
    standalone: str = ""
    """Heading that says everything without the group; empty where `name` does."""
    is_words: bool = False

    @property
    def heading(self) -> str:
        """For forms that have no line of groups."""
        return self.standalone or self.name


@dataclass(frozen=True, slots=True)
class Cell:
    """A text with the letters of its footnotes, and an address that it leads to, where the form has links."""

    text: str
    marks: tuple[str, ...] = ()
    link: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A cell for each column; a row without a result has its label cells alone and the reason why."""

    cells: tuple[Cell, ...]
    missing: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Everything that a table says."""

    title: str = ""
    """Empty where a heading above says it."""
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    n_labels: int = 1
    """Leading columns that name a row; each part of a table that is too wide repeats them."""
    name: str = ""
    """Unique among the tables of a document, for references to it."""
    lead: str = ""
    """What all numbers depend on, above the table."""
    incomplete: str = ""
    """What is lacking, a sentence."""
    footnotes: Mapping[str, str] = field(default_factory=dict)
    """Letter to text."""
    notes: tuple[str, ...] = ()
    facts: tuple[str, ...] = ()
    """Settings and data, below the notes."""

    def __post_init__(self) -> None:
        for row in self.rows:
            wanted = self.n_labels if row.missing else len(self.columns)
            assert len(row.cells) == wanted, f"{self.title}: {len(row.cells)} cells in place of {wanted}"

    @classmethod
    def of(
        cls,
        head: Sequence[str],
        rows: Iterable[Sequence[str | Cell]],
        *,
        n_words: int = 1,
        n_labels: int = 1,
        title: str = "",
        notes: Sequence[str] = (),
    ) -> Table:
        """A table without groups: a heading, and in each row a text or a cell, for each column, `n_words` of them words."""
        return cls(
            title=title,
            columns=tuple(Column(name=name, is_words=i < n_words) for i, name in enumerate(head)),
            rows=tuple(Row(cells=tuple(c if isinstance(c, Cell) else Cell(c) for c in row)) for row in rows),
            n_labels=n_labels,
            notes=tuple(notes),
        )

    @classmethod
    def by_column(cls, columns: Sequence[tuple[str, Callable[[T], str]]], items: Iterable[T], **others: Any) -> Table:
        """A table with a row for each item, from headings and what writes an item's cell; `others` as for `of`."""
        head = [name for name, _ in columns]
        return cls.of(head, [[write(item) for _, write in columns] for item in items], **others)

    @property
    def groups(self) -> list[tuple[str, int]]:
        """The headings of groups beyond the labels, and over how many columns each stands."""
        return [(name, len(list(members))) for name, members in groupby(self.columns[self.n_labels :], lambda c: c.group)]

    @property
    def has_groups(self) -> bool:
        return any(column.group for column in self.columns)

    @property
    def marks(self) -> set[str]:
        """The letters of all footnotes that cells refer to."""
        return {mark for row in self.rows for cell in row.cells for mark in cell.marks}


@final
class Footnotes:
    """Letters in the order of first use; equal texts share one."""

    def __init__(self) -> None:
        self._letters: dict[str, str] = {}

    def mark(self, *texts: str | None) -> tuple[str, ...]:
        """The letters of texts in their order, None left out."""
        found = {self._letters.setdefault(text, _letter(len(self._letters))) for text in texts if text}
        return tuple(sorted(found, key=lambda letter: (len(letter), letter)))

    def texts(self) -> dict[str, str]:
        """Letter to text."""
        return {letter: text for text, letter in self._letters.items()}


def _letter(index: int) -> str:
    """a, b, ..., z, aa, ab, ..."""
    tens, digit = divmod(index, 26)
    return (_letter(tens - 1) if tens else "") + ascii_lowercase[digit]
