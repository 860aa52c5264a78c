"""Pages: one HTML file each, with tables, drawings and settings, that loads nothing from the network.

    text = page_html(Page(title="Time of one layer", sections=(Section(name="tables", title="Tables", tables=tables),), ...))

The same content gives the same bytes. Everything is escaped; only drawings, which `plotting` made, are markup.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sparseffn.report import formats
from sparseffn.report.plotting import Plot
from sparseffn.report.table import Table
from sparseffn.storage import write_text


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of a page under its heading, in this order: text, drawings, tables, lists of values, notes."""

    name: str
    """Unique on the page."""
    title: str
    link: str = ""
    """Address of the heading and of the footnotes that the tables refer to, where these stand on another page."""
    text: str = ""
    """How to read what follows."""
    absent: str = ""
    """What cannot be shown."""
    plots: tuple[Plot, ...] = ()
    tables: tuple[Table, ...] = ()
    facts: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    """Heading to names and values."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """Letter to text, where the footnotes of several tables stand together."""
    remarks: tuple[str, ...] = ()
    """Notes without a letter."""
    folds: bool = False
    """Whether a reader can fold it away."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    kicker: str = "Feedforward blocks at equal parameter count"
    """The line above the title."""
    title: str
    summary: str
    warnings: tuple[str, ...] = ()
    """What is incomplete, a frame for each sentence."""
    sections: tuple[Section, ...]
    made_by: str = ""
    """The command."""
    source: str
    """The file that all of it is from."""
    cites_paper: bool = True


def write_texts(texts: Mapping[Path, str]) -> list[Path]:
    """Write files, all of which are made before the first is written; returns their paths.

    Raises:
        UserError: a file cannot be written.
    """
    for path, text in texts.items():
        write_text(path, text)
    return list(texts)


def page_html(page: Page) -> str:
    """The page as text."""
    loader = PackageLoader("sparseffn.report")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("page.html.j2").render(page=page, setting=formats.setting, markup=Markup)
