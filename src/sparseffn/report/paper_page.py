"""The page of one of the paper's tables: one HTML file that loads nothing."""

from __future__ import annotations

from sparseffn.report import formats
from sparseffn.report.pages import fill_template
from sparseffn.report.paper_view import PaperTable


def paper_html(table: PaperTable, *, source: str) -> str:
    """The page as text.

    Args:
        table: what it shows.
        source: name of the file that the table was read from.
    """
    return fill_template("paper.html.j2", table=table, source=source, formats=formats)
