"""The paper's tables beside our measurements, in the terminal, as Markdown, LaTeX and HTML, made from their JSON alone.

render("results/table3.json")               # writes table3.md, table3.tex and table3.html beside it
print_paper_table(read_paper_table("results/table3.json"))
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.text import Text

from sparseffn.report import formats
from sparseffn.report.grid import (
    markdown_footnote,
    markdown_line,
    markdown_marked,
    markdown_text,
    terminal_marked,
    terminal_parts,
)
from sparseffn.report.paper_latex import latex_tables
from sparseffn.report.paper_page import paper_html
from sparseffn.report.paper_result import read_paper_table
from sparseffn.report.paper_settings import build_table
from sparseffn.report.paper_view import Block, PaperTable
from sparseffn.report.result import Result
from sparseffn.storage import write_text

# With labels this wide a block takes two parts of a terminal of 100 columns.
_LABEL_WIDTH = 26


def render(path: str | Path) -> list[Path]:
    """Write a table as Markdown, LaTeX and HTML beside its JSON file; the same JSON gives the same bytes.

    Args:
        path: the JSON file; the others have its name with another ending.

    Returns:
        The files written.

    Raises:
        UserError: the file cannot be read or is damaged, or the others cannot be written.
    """
    path = Path(path)
    table = build_table(read_paper_table(path))
    # All texts are made before the first is written.
    texts = {".md": paper_markdown(table), ".tex": latex_tables(table), ".html": paper_html(table, source=path.name)}
    for suffix, text in texts.items():
        write_text(path.with_suffix(suffix), text)
    return [path.with_suffix(suffix) for suffix in texts]


def print_paper_table(result: Result, console: Console | None = None) -> None:
    """Print a table: all columns of the paper side by side, then a block each, in parts where the terminal is narrow.

    Args:
        result: parsed JSON of a table.
        console: where to print; standard output by default.
    """
    console = console or Console()
    table = build_table(result)
    for line in filter(None, (table.title, table.summary, table.incomplete)):
        console.print(Text(line))
    for block in filter(None, (table.overview, *table.blocks)):
        console.print(Text(f"\n{block.title}" + (f"; {block.facts}" if block.facts else "")))
        rows = ([terminal_marked(cell.text, cell.marks) for cell in (label, *cells)] for label, cells in block.rows)
        lines = [(label, cells) for label, *cells in rows]
        for part in terminal_parts("", block.short_headings, lines, console, label_width=_LABEL_WIDTH):
            console.print(part)
    for letter, text in table.footnotes.items():
        console.print(Text(f"({letter}) {text}"))
    for note in (*table.notes, f"Made with: {formats.setting(table.environment)}"):
        console.print(Text(note))


def paper_markdown(table: PaperTable) -> str:
    """A table as Markdown, ending in a newline; every text is escaped."""
    lines = [f"# {markdown_text(table.title)}", "", markdown_text(table.summary)]
    if table.incomplete:
        lines += ["", markdown_text(table.incomplete)]
    for block in filter(None, (table.overview, *table.blocks)):
        lines += ["", f"## {markdown_text(block.title)}", ""]
        lines += [markdown_text(block.facts), ""] if block.facts else []
        lines += block_markdown(block)
    for letter, text in table.footnotes.items():
        lines += ["", markdown_footnote(letter, text)]
    for note in (*table.notes, f"Made with: {formats.setting(table.environment)}"):
        lines += ["", markdown_text(note)]
    return "\n".join(lines) + "\n"


def block_markdown(block: Block) -> list[str]:
    """A block as the lines of a Markdown table."""
    head = [
        markdown_line(["", *(markdown_text(header) for _, header in block.short_headings)]),
        markdown_line([":--", *("--:" for _ in block.headings)]),
    ]
    rows = ([markdown_marked(cell.text, cell.marks) for cell in (label, *cells)] for label, cells in block.rows)
    return head + [markdown_line(row) for row in rows]
