"""The files of the paper's tables: Markdown, LaTeX and HTML beside the JSON of each, and a page of all tables of a folder.

write_paper_table("results/table3.json")               # writes table3.md, table3.tex and table3.html beside it
print_paper_table(read_paper_table("results/table3.json"))
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from urllib.parse import quote

from rich.console import Console
from rich.text import Text

from sparseffn.errors import UserError
from sparseffn.report.latex import latex_head, latex_paragraph, latex_table
from sparseffn.report.markdown import footnote_texts, markdown_text, paragraphs, table_rows
from sparseffn.report.page import Page, Section, page_html, write_texts
from sparseffn.report.paper_cells import cell_counts
from sparseffn.report.paper_view import PaperReport, paper_report
from sparseffn.report.table import Cell, Table
from sparseffn.report.terminal import print_table
from sparseffn.results.figures_result import FiguresOfPaper
from sparseffn.results.table_result import PaperTable, SettingsResult, TableResult
from sparseffn.storage import read, read_json

# Not `index`, which a folder may have for something else.
INDEX = "tables"
_FIX = "run `sparseffn reproduce` again"
_KICKER = "Approximating two-layer feedforward networks: measured beside published"


def read_paper_table(path: str | Path) -> PaperTable:
    """Read the JSON file of a table, as `sparseffn reproduce` wrote it.

    Raises:
        UserError: the file is absent, is not JSON, is no table of the paper, or a field is absent or damaged.
    """
    return read(Path(path), PaperTable, fix=_FIX)  # pyright: ignore[reportArgumentType]


def write_paper_table(path: str | Path) -> list[Path]:
    """Write a table as Markdown, LaTeX and HTML beside its JSON file; the same JSON gives the same bytes.

    Raises:
        UserError: the file cannot be read or is damaged, or the others cannot be written.
    """
    path = Path(path)
    report = paper_report(read_paper_table(path))
    texts = {".md": paper_markdown(report), ".tex": paper_latex(report), ".html": paper_page(report, source=path.name)}
    return write_texts({path.with_suffix(suffix): text for suffix, text in texts.items()})


def print_paper_table(result: PaperTable, console: Console | None = None) -> None:
    """Print a table: all columns of the paper side by side, then a block each."""
    console = console or Console(highlight=False)
    report = paper_report(result)
    for line in filter(None, (report.title, report.summary, report.incomplete)):
        console.print(Text(line))
    for table in report.tables:
        console.print()
        print_table(table, console)
    for line in (*(f"({letter}) {text}" for letter, text in report.footnotes.items()), *report.notes):
        console.print(Text(line))


def paper_markdown(report: PaperReport) -> str:
    """A table as Markdown, ending in a newline."""
    texts = [f"# {markdown_text(report.title)}", markdown_text(report.summary), markdown_text(report.incomplete)]
    for table in report.tables:
        texts += [f"## {markdown_text(table.title)}", markdown_text(table.lead), table_rows(table)]
    return paragraphs(*filter(None, texts), *footnote_texts(report.footnotes), *map(markdown_text, report.notes))


def paper_latex(report: PaperReport) -> str:
    """A table as LaTeX: a float for the overview and for each block, and the notes as text after them."""
    # Beside the number that LaTeX gives the float.
    title = re.sub(r"^Table \d+", r"\g<0> of arXiv 2310.10837", report.title)
    incomplete = f" This table is {report.incomplete}." if report.incomplete else ""
    floats = []
    for table in report.tables:
        lead = f" {table.lead}." if table.lead else ""
        caption = f"{title}. {table.title}.{lead} {report.summary}{incomplete}"
        label = f"{report.name}-{table.name}"
        floats.append(latex_table(table, caption=caption, label=label, footnotes=report.footnotes_of(table)))
    return "\n".join([latex_head(report.name), *floats, "".join(map(latex_paragraph, report.notes))])


def paper_page(report: PaperReport, *, source: str) -> str:
    """The page as text; `source` names the file that the table was read from."""
    sections = [
        Section(
            name="overview" if table is report.overview else f"column-{index}",
            title=table.title,
            text=table.lead,
            tables=(dataclasses.replace(table, title="", lead="", name=table.title),),
        )
        for index, table in enumerate(report.tables, start=0 if report.overview else 1)
    ]
    # The last note is the machine, which has a list of its own.
    sections.append(Section(name="notes", title="Notes", notes=report.footnotes, remarks=report.notes[:-1]))
    facts = {"Machine and software": report.environment}
    sections.append(Section(name="details", title="Machine and software", facts=facts, folds=True))
    return page_html(
        Page(
            kicker=_KICKER,
            title=report.title,
            summary=report.summary,
            warnings=(report.incomplete,) if report.incomplete else (),
            sections=tuple(sections),
            source=source,
        )
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """A table of a folder, with the address of its page, or of its file where no page was made, and its line in the list."""

    link: str
    report: PaperReport
    facts: tuple[str, ...]

    @property
    def table(self) -> Table:
        """What the index shows of it: everything where there is one column."""
        table = self.report.tables[0]
        lead = f"{self.report.summary} {table.title}. {table.lead}".strip()
        return dataclasses.replace(table, title="", name=table.title, lead=lead, footnotes=self.report.footnotes_of(table))


def write_index(folder: str | Path) -> list[Path]:
    """Write `tables.html` and `tables.md` of the tables in a folder and in the folders in it.

    Files that are damaged or of another version are listed with the reason; other JSON files are passed over.

    Raises:
        UserError: the folder holds no table, or cannot be written to.
    """
    folder = Path(folder)
    entries, faults = _read(folder)
    if not entries and not faults:
        raise UserError(
            f"`folder` must hold tables of the paper; got {str(folder)!r}, where there is none; fix: run `sparseffn reproduce`"
        )
    page, text = _index_page(entries, faults), _index_markdown(entries, faults)
    return write_texts({folder / f"{INDEX}.html": page, folder / f"{INDEX}.md": text})


def _read(folder: Path) -> tuple[list[_Entry], list[str]]:
    """The tables in the order of their numbers, and why a file that should be one cannot be shown."""
    entries, faults = [], []
    for path in sorted([*folder.glob("*.json"), *folder.glob("*/*.json")], key=lambda path: _natural(str(path))):
        try:
            # What cannot be read may have been a table, and is named.
            found = read_json(path, fix=_FIX)
            if isinstance(found, dict) and found.get("kind") in _KINDS:
                result = read_paper_table(path)
                entries.append(_Entry(link=_link(path, folder), report=paper_report(result), facts=_facts(result)))
        except (UserError, OSError) as error:
            name = path.relative_to(folder).as_posix()
            faults.append(f"{name}: {str(error).replace(str(path), name)}")
    return entries, faults


def _natural(text: str) -> list[tuple[int, str]]:
    """Sorts table2 before table10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)]


def _link(path: Path, folder: Path) -> str:
    """Relative to the index, percent-encoded."""
    page = path.with_suffix(".html")
    return quote((page if page.exists() else path).relative_to(folder).as_posix())


_KINDS = tuple(kind.__struct_config__.tag for kind in (TableResult, SettingsResult))
_HEAD = ("table", "scale", "settings", "measured", "counted", "missing", "failed", "better than dense", "worse", "undecided")


def _facts(result: PaperTable) -> tuple[str, ...]:
    """A text for each heading of the list but the first."""
    if isinstance(result, SettingsResult):
        return (result.scale, result.settings, *("" for _ in _HEAD[3:]))
    counts = cell_counts(result)
    found = [cell.against_dense for cell in result.cells if cell.status == "measured" and cell.against_dense is not None]
    decided = [each.difference for each in found if each.decided]
    # Every metric of the paper is better where it is lower.
    better = sum(difference < 0 for difference in decided)
    numbers = [counts[key] for key in ("measured", "counted", "missing", "failed")]
    numbers += [better, len(decided) - better, len(found) - len(decided)]
    return (result.scale, result.settings, *map(str, numbers))


def _list(entries: list[_Entry]) -> Table:
    rows = ([Cell(entry.report.title, link=entry.link), *entry.facts] for entry in entries)
    return dataclasses.replace(Table.of(_HEAD, rows, n_words=3), name="Tables")


def _index_page(entries: list[_Entry], faults: list[str]) -> str:
    sections = [Section(name="list", title="All tables", tables=(_list(entries),))] if entries else []
    for n, entry in enumerate(entries, start=1):
        sections.append(Section(name=f"table-{n}", title=entry.report.title, link=entry.link, tables=(entry.table,)))
    return page_html(
        Page(
            kicker=_KICKER,
            title="Tables, measured beside published",
            summary="Cells by what they hold, and those measured by their difference from the dense model: better or worse "
            "where the 95% interval excludes zero, which a star marks, else undecided. A dash without a letter: the paper has "
            "no such value, or it has no meaning for the row.",
            warnings=tuple(f"cannot be shown: {fault}" for fault in faults),
            sections=tuple(sections),
            source="*.json",
        )
    )


def _index_markdown(entries: list[_Entry], faults: list[str]) -> str:
    texts = ["# Tables, measured beside published", *(f"Cannot be shown: {markdown_text(fault)}" for fault in faults)]
    texts.append(table_rows(_list(entries)))
    for entry in entries:
        table = entry.table
        texts += [f"## {markdown_text(entry.report.title)}", markdown_text(table.lead), table_rows(table)]
        texts += footnote_texts(table.footnotes)
    return paragraphs(*texts)


def figures_markdown(result: FiguresOfPaper) -> str:
    """Every figure with the paper's statement and what was measured beside it."""
    lines = ["# The paper's figures, measured here", "", f"Source of the statements: {result.source}.", ""]
    for figure in result.figures:
        pictures = [f"![{figure.name}]({name})" for name in figure.files if name.endswith(".png")]
        lines += [f"## {figure.name}", "", *(pictures or [f"Not drawn: {figure.not_drawn}."])]
        lines += ["", f"**Paper:** {figure.statement}", ""]
        if figure.measured:
            lines += ["**Here:**", "", *(f"- {words}" for words in figure.measured)]
        lines += ["", *[f"*{caption}*" for caption in figure.captions], ""]
    return "\n".join(lines)
