"""From a matplotlib figure to SVG text that can stand inside a page beside others.

matplotlib is the extra `plot`; it is imported when a figure is drawn, not before.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

from sparseffn.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#1a1a1a"
GREY = "#6b6b6b"
HAIRLINE = "#e3e3e3"

# Text is laid out in the font that matplotlib brings along, the same on every machine, and shown in the reader's:
# all of these are narrower, so no label grows into another.
LAYOUT_FONT = "DejaVu Sans"
SHOWN_FONTS = "'Helvetica Neue', Helvetica, Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif"

FONT_SIZE = 9.0

SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sparseffn",
    "font.family": LAYOUT_FONT,
    "font.size": FONT_SIZE,
    "text.color": INK,
    # A label with a dollar sign is a label.
    "text.parse_math": False,
    "axes.labelsize": FONT_SIZE,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": HAIRLINE,
    "grid.linewidth": 0.6,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": FONT_SIZE - 0.5,
    "ytick.labelsize": FONT_SIZE - 0.5,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.0,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


@contextmanager
def drawing(width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    """A figure of one frame in the style of the page.

    Args:
        width: inches on paper.
        height: inches on paper.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("the page's figures need matplotlib; fix: pip install 'sparseffn[plot]'") from error
    with matplotlib.rc_context(), warnings.catch_warnings():
        # The reader's browser has the glyphs that the layout font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        # Not the reader's own matplotlibrc: the same file gives the same page everywhere.
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(SETTINGS)
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.add_subplot()


def svg_text(figure: Figure, *, name: str, title: str, description: str) -> str:
    """Write a figure as one `<svg>` element.

    Args:
        figure: what `drawing` gave, still inside its context.
        name: unique on the page; it leads every id of the element.
        title: the figure's name for people who hear the page and for the pointer.
        description: one sentence that says what is drawn.

    Returns:
        The element: no prolog, no metadata, no outside reference, the same bytes for the same figure.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    # This style sheet would act on the whole page; the page's own sets the same for its figures.
    text = re.sub(r"<defs>\s*<style type=\"text/css\">.*?</style>\s*</defs>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = text.replace("url(#", f"url(#{name}-").replace('xlink:href="#', f'href="#{name}-')
    text = text.replace(f"'{LAYOUT_FONT}'", SHOWN_FONTS)
    view_box = re.search(r'viewBox="[^"]*"', text)
    assert view_box, "matplotlib writes a viewBox"
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {view_box[0]} '
        f'role="img" aria-label="{escape(f"{title}. {description}")}">\n <title>{escape(title)}</title>'
    )
    return opening + text[text.index(">") + 1 :].rstrip()


def png_bytes(figure: Figure) -> bytes:
    """The same drawing as pixels, on white, for slides and papers."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()
