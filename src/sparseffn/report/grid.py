"""How a wide table is set: in the terminal, in as many parts as its width asks for, and as lines of Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TypeAlias, final

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

# The heading that a column shares with its neighbours, which are kept together, and one that stands without it.
Heading: TypeAlias = tuple[str, str]
# A row's label, and a text for each heading, or none at all where everything is missing.
Line: TypeAlias = tuple[str, Sequence[str]]


def letters(index: int) -> str:
    """The footnote letter of an index: a, b, ..., z, aa, ab, ..."""
    text = ""
    index += 1
    while index:
        index, digit = divmod(index - 1, 26)
        text = chr(ord("a") + digit) + text
    return text


@final
class Footnotes:
    """Letters in the order of first use; equal texts share one."""

    def __init__(self) -> None:
        self._letters: dict[str, str] = {}

    def mark(self, *texts: str | None) -> tuple[str, ...]:
        """The letters of texts in their order, None left out."""
        found = {self._letters.setdefault(text, letters(len(self._letters))) for text in texts if text}
        return tuple(sorted(found, key=lambda letter: (len(letter), letter)))

    def texts(self) -> dict[str, str]:
        """Letter to text."""
        return {letter: text for text, letter in self._letters.items()}


def terminal_marked(text: str, marks: Sequence[str]) -> str:
    """Text with the letters of its footnotes behind it."""
    return text + (f" ({','.join(marks)})" if marks else "")


def terminal_parts(
    corner: str, headings: Sequence[Heading], lines: Sequence[Line], console: Console, *, label_width: int | None = None
) -> list[RichTable]:
    """Whole groups of columns side by side while they fit, the rows' labels leading every part.

    Args:
        corner: the heading of the labels.
        headings: of the columns.
        lines: the rows.
        console: where the parts are to fit.
        label_width: wider labels are broken; None breaks them only where the terminal is too narrow for one part.
    """

    def part(indices: Sequence[int]) -> RichTable:
        return _rich_table(corner, headings, lines, indices, label_width)

    groups: dict[str, list[int]] = {}
    for index, (group, _) in enumerate(headings):
        groups.setdefault(group, []).append(index)
    parts: list[list[int]] = []
    for indices in groups.values():
        joined = [*parts[-1], *indices] if parts else indices
        if parts and _width(part(joined), console) <= console.width:
            parts[-1] = joined
        else:
            parts.append(list(indices))
    return [part(indices) for indices in parts]


def _width(table: RichTable, console: Console) -> int:
    # Unbounded: a measure within the console's width would never exceed it.
    return console.measure(table, options=console.options.update(width=10_000)).maximum


def _rich_table(
    corner: str, headings: Sequence[Heading], lines: Sequence[Line], indices: Sequence[int], label_width: int | None
) -> RichTable:
    part = RichTable(box=box.SIMPLE_HEAD, header_style="", pad_edge=False)
    part.add_column(corner, overflow="fold", vertical="bottom", max_width=label_width)
    for index in indices:
        cells = [texts[index] for _, texts in lines if texts]
        header = _wrapped(headings[index][1], max(9, *map(len, cells), 0))
        part.add_column(Text(header), justify="right", overflow="fold")
    for label, texts in lines:
        cells = [texts[index] for index in indices] if texts else ["missing", *("" for _ in indices[1:])]
        part.add_row(Text(label), *(Text(cell) for cell in cells))
    return part


def _wrapped(words: str, width: int) -> str:
    """Break a heading at its spaces so that it is no wider than the numbers below, where its words allow."""
    lines: list[str] = []
    for word in words.split(" "):
        if lines and len(lines[-1]) + 1 + len(word) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return "\n".join(lines)


def markdown_line(cells: Iterable[str]) -> str:
    """A row of a Markdown table; the cells are Markdown already."""
    return f"| {' | '.join(cells)} |"


def markdown_marked(text: str, marks: Sequence[str]) -> str:
    """Text with the letters of its footnotes behind it."""
    return markdown_text(text) + (f" <sup>{','.join(marks)}</sup>" if marks else "")


def markdown_footnote(letter: str, text: str) -> str:
    """A footnote below the table."""
    return f"<sup>{letter}</sup> {markdown_text(text)}"


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is: no markup, no HTML, no new line, no end of a cell."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", text)
