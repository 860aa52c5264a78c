"""What all figures share: their look, how lines differ and are labelled, and how a drawing becomes SVG and PNG.

Lines differ in colour (Okabe and Ito's palette, https://jfly.uni-koeln.de/color/), in line style and in marker, and are
labelled beside the frame at the height where they end, so that nothing rests on colour. Figures are legible in print at the
size they have. matplotlib is the extra `plot`; it is imported when a figure is drawn, not before, and every function that draws
raises a `UserError` where it is not installed.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from sparseffn.errors import UserError
from sparseffn.storage import write_bytes, write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, TEXT_WIDTH, HEIGHT = 4.8, 6.4, 3.2
"""Inches of a figure of lines, between the margins of a page, and of a figure's height: labels are set apart for it."""
INK = "#1a1a1a"
GREY = "#6b6b6b"
HAIRLINE = "#e3e3e3"

# Text is laid out in the font that matplotlib brings along, the same on every machine, and shown in the reader's:
# all of these are narrower, so no label grows into another.
LAYOUT_FONT = "DejaVu Sans"
SHOWN_FONTS = "'Helvetica Neue', Helvetica, Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif"

FONT_SIZE = 9.0

# Okabe and Ito without yellow, which does not carry a line on white; black, for the first method, is the baseline's.
PALETTE = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
LINE_STYLES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))
# Seven, four and nine have no common divisor: 252 methods look different.
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")

# Inches that a line of text below a frame adds to a figure's height.
_LINE_HEIGHT = 0.16
LABEL_LENGTH = 22
"""Characters of a label beside a figure; the table has it whole."""


SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sparseffn",
    "font.family": LAYOUT_FONT,
    # A label with a dollar sign is a label.
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": HAIRLINE,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.0,
    **dict.fromkeys(("font.size", "axes.labelsize"), FONT_SIZE),
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize"), FONT_SIZE - 0.5),
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), INK),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), GREY),
    **dict.fromkeys(("axes.linewidth", "grid.linewidth"), 0.6),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """A figure for the page, where its name is unique; with pixels where it is also to be a file."""

    name: str
    title: str
    caption: str
    svg: str
    png: bytes = b""


def finished(figure: Figure, *, name: str, title: str, caption: str, description: str = "", pixels: bool = True) -> Plot:
    """A complete drawing, still inside its context; `description` is for people who hear the page, by default the caption."""
    svg, png = _svg_text(figure, name=name, title=title, description=description or caption), io.BytesIO()
    if pixels:
        # On white, for slides and papers.
        figure.savefig(png, format="png", dpi=200, facecolor="white", metadata={"Software": None})
    return Plot(name=name, title=title, caption=caption, svg=svg, png=png.getvalue())


def standalone_svg(plot: Plot) -> str:
    """An SVG file: on white, and with what the page's style sheet says to its drawings."""
    start = plot.svg.index(">") + 1
    opening = plot.svg[:start].replace("<svg ", '<svg style="background: #fff; stroke-linejoin: round" ', 1)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{opening}{plot.svg[start:]}\n'


def write_plots(plots: Iterable[Plot], folder: Path) -> list[Path]:
    """Every drawing as PNG and as SVG; returns the files.

    Raises:
        UserError: a file cannot be written.
    """
    written = []
    for plot in plots:
        png, svg = folder / f"{plot.name}.png", folder / f"{plot.name}.svg"
        write_bytes(png, plot.png)
        write_text(svg, standalone_svg(plot))
        written += [png, svg]
    return written


@contextmanager
def drawing(width: float = WIDTH, height: float = HEIGHT) -> Iterator[tuple[Figure, Axes]]:
    """A figure of one frame in the style of the page, `width` x `height` inches on paper."""
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


@contextmanager
def panels(width: float, height: float, n_rows: int, n_columns: int) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure of several frames with common axes, row by row; see `drawing`."""
    with drawing(width, height) as (figure, axes):
        axes.remove()
        frames = figure.subplots(n_rows, n_columns, sharex=True, sharey=True, squeeze=False)
        yield figure, list(frames.flat)


def _svg_text(figure: Figure, *, name: str, title: str, description: str) -> str:
    """One `<svg>` element without prolog, metadata and outside references, whose ids all begin with `name`."""
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


@dataclass(frozen=True, slots=True)
class Line:
    """A curve with its label and look, and the range around it; of a prediction what was measured beside it."""

    label: str
    x: list[float]
    y: list[float]
    style: dict[str, Any]
    points: Sequence[tuple[float, float, float, float]] = ()
    """x, median, least and greatest."""
    band: tuple[list[float], list[float]] | None = None


def method_style(index: int) -> dict[str, Any]:
    """The look of a method by its place in the comparison, the same in every figure; some points have its marker."""
    return pointed_style(index) | {"markevery": 0.08}


def pointed_style(index: int, color: Any = None) -> dict[str, Any]:
    """A method's look with a marker on every point, for lines of few."""
    return {
        "color": color or PALETTE[index % len(PALETTE)],
        "linestyle": LINE_STYLES[index % len(LINE_STYLES)],
        "marker": MARKERS[index % len(MARKERS)],
        "markeredgecolor": "white",
        "markeredgewidth": 0.5,
    }


def layer_style(index: int, n_layers: int, n_points: int) -> dict[str, Any]:
    """Layers are in order, so their colours are: dark for the first, lighter for the last."""
    import matplotlib

    style = pointed_style(index, matplotlib.colormaps["viridis"](0.75 * index / max(n_layers - 1, 1)))
    # Few points each get their marker, a long line some, shifted so that markers of like lines do not hide each other.
    if n_points > 32:
        style["markevery"] = (index * n_points // (10 * n_layers), n_points // 10)
    return style


def line_plot(
    lines: Sequence[Line],
    *,
    name: str,
    title: str,
    caption: str,
    axes_names: tuple[str, str],
    adjust: Callable[[Axes], object] = lambda axes: None,
    below: Sequence[str] = (),
    description: str = "",
    pixels: bool = True,
) -> Plot:
    """Lines in one frame, with their labels at its right, as `finished` hands them out.

    Args:
        axes_names: below the frame and to its left.
        adjust: sets scales and limits, and draws levels.
        below: lines of text below the frame.
    """
    with drawing(height=HEIGHT + _LINE_HEIGHT * len(below)) as (figure, axes):
        for line in lines:
            draw_line(axes, line)
        axes.set(xlabel=axes_names[0], ylabel=axes_names[1])
        adjust(axes)
        label_ends(axes, lines)
        if below:
            figure.supxlabel("\n".join(below), x=0.01, ha="left", fontsize=FONT_SIZE - 1, color=GREY)
        return finished(figure, name=name, title=title, caption=caption, description=description, pixels=pixels)


def draw_line(axes: Axes, line: Line) -> None:
    """A line alone has markers; a prediction leaves them to the measurements."""
    if not line.points:
        axes.plot(line.x, line.y, **line.style)
        if line.band:
            axes.fill_between(line.x, *line.band, color=line.style["color"], alpha=0.15, linewidth=0)
        return
    color = line.style["color"]
    axes.plot(line.x, line.y, color=color, linestyle=line.style["linestyle"], linewidth=1.0)
    x, middle, low, high = (list(values) for values in zip(*line.points, strict=True))
    spread = [[m - v for m, v in zip(middle, low, strict=True)], [v - m for m, v in zip(middle, high, strict=True)]]
    axes.errorbar(x, middle, yerr=spread, color=color, marker=line.style["marker"], linestyle="none", elinewidth=1.0)


def size_axis(axes: Axes, sizes: Sequence[int], *, log_ticks: Sequence[int] | None = (1, 2, 5)) -> None:
    """A logarithmic axis below the frame, with a tick at each size and nowhere else; with `log_ticks` heights are so, too.

    On two logarithmic axes a power law is straight, and what does not grow is flat.
    """
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log")
    axes.set_xticks(list(sizes), [f"{size:,}" for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    if log_ticks:
        log_heights(axes, form=",.10g", ticks=log_ticks)


def log_heights(axes: Axes, *, form: str = "g", ticks: Sequence[int] | None = None) -> None:
    """A logarithmic axis of heights; `ticks`: the multiples of a power of ten with a label, None as matplotlib likes."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    if ticks is not None:
        axes.yaxis.set_major_locator(LogLocator(subs=ticks))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:{form}}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def reference(axes: Axes, level: float, words: str, *, x: float, rise: float) -> None:
    """A dashed level with its name above or below, at the left or right end of the frame."""
    axes.axhline(level, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    axes.annotate(
        words,
        (x, level),
        xycoords=axes.get_yaxis_transform(),
        xytext=(0, rise),
        textcoords="offset points",
        ha="right" if x > 0.5 else "left",
        va="bottom" if rise > 0 else "top",
        color=GREY,
        fontsize=FONT_SIZE - 1,
    )


def label_ends(axes: Axes, lines: Sequence[Line]) -> None:
    """Write every line's label to the right of the frame, level with its end, as far as labels leave room."""
    from matplotlib.lines import Line2D

    low, high = axes.get_ylim()
    ends, heights = [], []
    for line in lines:
        finite = [(x, min(max(y, low), high)) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)]
        if finite:
            ends.append((line, finite[-1]))
            # In the frame's own height, whatever the axis's scale.
            heights.append(float(axes.transAxes.inverted().transform(axes.transData.transform(finite[-1]))[1]))
    # The frame is about four fifths of the figure's height.
    gap = 1.35 * FONT_SIZE / (0.8 * HEIGHT * 72)
    for (line, end), place in zip(ends, places_apart(heights, gap), strict=True):
        # A leader from the middle of the frame would cross other lines; there the sample of the line has to do.
        if end[0] >= 0.97 * axes.get_xlim()[1]:
            axes.annotate(
                "",
                xy=end,
                xytext=(1.035, place),
                textcoords="axes fraction",
                arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2},
                annotation_clip=False,
            )
        sample = {key: value for key, value in line.style.items() if key != "markevery"}
        axes.add_line(Line2D([1.04, 1.07, 1.1], [place] * 3, transform=axes.transAxes, clip_on=False, markevery=[1], **sample))
        axes.text(1.12, place, _shortened(line.label), transform=axes.transAxes, va="center", color=INK)


def places_apart(heights: Sequence[float], gap: float) -> list[float]:
    """The places nearest to the wanted heights (least squares) that keep a gap, moved into the frame where they fit.

    Pool adjacent violators: labels that would touch form a block around the mean of what they want.
    """
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    blocks: list[list[float]] = []
    for rank, i in enumerate(order):
        blocks.append([heights[i] - rank * gap])
        while len(blocks) > 1 and fmean(blocks[-2]) > fmean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    shifted = [fmean(block) for block in blocks for _ in block]
    places = [0.0] * len(heights)
    highest = 1 - gap * (len(heights) - 1)
    for rank, i in enumerate(order):
        places[i] = max(min(shifted[rank], highest), min(0.0, highest)) + rank * gap
    return places


def _shortened(label: str) -> str:
    """A long label without its middle: its beginning names the method, its end what sets variants apart."""
    half = LABEL_LENGTH // 2
    return label if len(label) <= LABEL_LENGTH else f"{label[: half - 1]}…{label[-half:]}"
