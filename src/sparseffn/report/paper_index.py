"""All tables of a folder on one page: what each holds, what it lacks, and its overview, with links to the whole."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from sparseffn.errors import UserError
from sparseffn.report.grid import markdown_footnote, markdown_line, markdown_text
from sparseffn.report.pages import fill_template
from sparseffn.report.paper_cells import cell_counts
from sparseffn.report.paper_result import SETTINGS_KIND, is_paper_table
from sparseffn.report.paper_settings import build_table
from sparseffn.report.paper_table import block_markdown
from sparseffn.report.paper_view import Block, PaperTable
from sparseffn.report.result import Result
from sparseffn.storage import read_json, write_text

# Not `index`, which a folder may have for something else.
NAME = "tables"
_HEAD = ("table", "scale", "settings", "measured", "counted", "missing", "failed", "better than dense", "worse", "undecided")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A table of the folder.

    Attributes:
        link: to its page, or to its file where no page was made; relative to the index, percent-encoded.
        table: what it holds.
        facts: a text for each heading of the list but the first.
    """

    link: str
    table: PaperTable
    facts: tuple[str, ...]

    @property
    def block(self) -> Block:
        """What the index shows of it: everything where there is one column."""
        return self.table.overview or self.table.blocks[0]

    @property
    def about(self) -> str:
        """Scale, settings and what is measured, then what the block is of."""
        return f"{self.table.summary} {self.block.title}."

    @property
    def footnotes(self) -> dict[str, str]:
        """Those that the block refers to."""
        return {letter: text for letter, text in self.table.footnotes.items() if letter in self.block.marks}


def write_index(folder: str | Path) -> list[Path]:
    """Write `tables.html` and `tables.md` of the tables in a folder and in the folders in it.

    Files that are damaged or of another version are listed with the reason; other JSON files are passed over.

    Args:
        folder: where the tables are.

    Returns:
        The two files.

    Raises:
        UserError: the folder holds no table, or cannot be written to.
    """
    folder = Path(folder)
    entries, faults = _read(folder)
    if not entries and not faults:
        raise UserError(
            f"`folder` must hold tables of the paper; got {str(folder)!r}, where there is none; fix: run `sparseffn reproduce`"
        )
    html = fill_template("paper_index.html.j2", head=_HEAD, entries=entries, faults=faults)
    texts = {".html": html, ".md": _markdown(entries, faults)}
    for suffix, text in texts.items():
        write_text(folder / f"{NAME}{suffix}", text)
    return [folder / f"{NAME}{suffix}" for suffix in texts]


def _read(folder: Path) -> tuple[list[Entry], list[str]]:
    """The tables in the order of their numbers, and why a file that should be one cannot be shown."""
    entries, faults = [], []
    for path in sorted([*folder.glob("*.json"), *folder.glob("*/*.json")], key=lambda path: _natural(str(path))):
        try:
            # What cannot be read may have been a table, and is told.
            result = read_json(path, fix="run `sparseffn reproduce` again")
            if is_paper_table(result):
                entries.append(Entry(link=_link(path, folder), table=build_table(result), facts=_facts(result)))
        except (UserError, OSError) as error:
            name = path.relative_to(folder).as_posix()
            faults.append(f"{name}: {str(error).replace(str(path), name)}")
    return entries, faults


def _natural(text: str) -> list[tuple[int, str]]:
    """Sorts table2 before table10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)]


def _link(path: Path, folder: Path) -> str:
    page = path.with_suffix(".html")
    return quote((page if page.exists() else path).relative_to(folder).as_posix())


def _facts(result: Result) -> tuple[str, ...]:
    if result["kind"] == SETTINGS_KIND:
        return (result["scale"], result["settings"], *("" for _ in _HEAD[3:]))
    counts = cell_counts(result)
    found = [cell["against_dense"] for cell in result["cells"] if cell["status"] == "measured" and cell.get("against_dense")]
    decided = [difference["difference"] for difference in found if difference["decided"]]
    # Every metric of the paper is better where it is lower.
    better = sum(difference < 0 for difference in decided)
    numbers = [counts[key] for key in ("measured", "counted", "missing", "failed")]
    numbers += [better, len(decided) - better, len(found) - len(decided)]
    return (result["scale"], result["settings"], *map(str, numbers))


def _markdown(entries: list[Entry], faults: list[str]) -> str:
    lines = ["# Tables, measured beside published", ""]
    lines += [f"Cannot be shown: {markdown_text(fault)}\n" for fault in faults]
    lines += [markdown_line(_HEAD), markdown_line([":--", ":--", ":--", *("--:" for _ in _HEAD[3:])])]
    for entry in entries:
        title = f"[{markdown_text(entry.table.title)}]({entry.link})"
        lines.append(markdown_line([title, *map(markdown_text, entry.facts)]))
    for entry in entries:
        about = markdown_text(f"{entry.about} {entry.block.facts}")
        lines += ["", f"## {markdown_text(entry.table.title)}", "", about, "", *block_markdown(entry.block)]
        for letter, text in entry.footnotes.items():
            lines += ["", markdown_footnote(letter, text)]
    return "\n".join(lines) + "\n"
