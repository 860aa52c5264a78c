"""Pages: one HTML file each, with tables, drawings and settings, that loads nothing from the network.

    text = page_html(Page(title="Time of one layer", sections=(Section(name="tables", title="Tables", tables=tables),), ...))

The same content gives the same bytes. Everything is escaped; only drawings, which `plotting` made, are markup.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sparseffn.report import formats
from sparseffn.report.plotting import Plot
from sparseffn.report.table import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of a page under its heading, in this order: text, drawings, tables, lists of values, notes.

    Attributes:
        name: unique on the page.
        title: the heading.
        link: address of the heading and of the footnotes that the tables refer to, where these stand on another page.
        text: how to read what follows.
        absent: what cannot be shown.
        plots: drawings, two beside each other where the window allows.
        tables: with what belongs to them.
        facts: heading to names and values.
        notes: letter to text, where the footnotes of several tables stand together.
        remarks: notes without a letter.
        folds: whether a reader can fold it away.
    """

    name: str
    title: str
    link: str = ""
    text: str = ""
    absent: str = ""
    plots: tuple[Plot, ...] = ()
    tables: tuple[Table, ...] = ()
    facts: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    folds: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """What a page shows.

    Attributes:
        kicker: a line above the title.
        title: of the page.
        summary: below the title.
        warnings: sentences in frames of their own: what is incomplete.
        sections: in their order.
        made_by: the command.
        source: the file that all of it is from.
        cites_paper: whether the footer names the paper.
    """

    kicker: str = "Feedforward blocks at equal parameter count"
    title: str
    summary: str
    warnings: tuple[str, ...] = ()
    sections: tuple[Section, ...]
    made_by: str = ""
    source: str
    cites_paper: bool = True


def page_html(page: Page) -> str:
    """The page as text."""
    environment = Environment(
        loader=PackageLoader("sparseffn.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2").render(page=page, setting=formats.setting, markup=Markup)
