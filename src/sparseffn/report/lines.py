"""How lines look and are labelled in the figures.

Lines are told apart by colour (Okabe and Ito's palette, https://jfly.uni-koeln.de/color/), by line style and by marker,
and are labelled beside the frame at the height where they end, so that nothing rests on colour.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from sparseffn.report.svg import FONT_SIZE, GREY, INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito without yellow, which does not carry a line on white; black, for the first method, is the baseline's.
PALETTE = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
LINE_STYLES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))
# Seven, four and nine have no common divisor: 252 methods look different.
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")

HEIGHT = 3.2
"""Of a figure of lines, in inches: labels are set apart for it."""
LABEL_LENGTH = 22
"""Characters of a label beside a figure; the table has it whole."""


@dataclass(frozen=True, slots=True)
class Line:
    """A curve with its look and label."""

    label: str
    x: list[float]
    y: list[float]
    style: dict[str, Any]


def method_style(index: int) -> dict[str, Any]:
    """The look of a method by its place in the comparison, the same in every figure."""
    return {
        "color": PALETTE[index % len(PALETTE)],
        "linestyle": LINE_STYLES[index % len(LINE_STYLES)],
        "marker": MARKERS[index % len(MARKERS)],
        "markeredgecolor": "white",
        "markeredgewidth": 0.5,
        "markevery": 0.08,
    }


def pointed_style(index: int) -> dict[str, Any]:
    """A method's look with a marker on every point, for lines of few."""
    return {key: value for key, value in method_style(index).items() if key != "markevery"}


def layer_style(index: int, n_layers: int, n_points: int) -> dict[str, Any]:
    """Layers are in order, so their colours are: dark for the first, lighter for the last."""
    import matplotlib

    shade = 0.75 * index / max(n_layers - 1, 1)
    style: dict[str, Any] = {
        "color": matplotlib.colormaps["viridis"](shade),
        "linestyle": LINE_STYLES[index % len(LINE_STYLES)],
        "marker": MARKERS[index % len(MARKERS)],
        "markeredgecolor": "white",
        "markeredgewidth": 0.5,
    }
    # Few points each get their marker, a long line some, shifted so that markers of like lines do not hide each other.
    if n_points > 32:
        style["markevery"] = (index * n_points // (10 * n_layers), n_points // 10)
    return style


def size_axis(axes: Axes, ticks: Sequence[int]) -> None:
    """A logarithmic axis of sizes below the frame, with a tick at each of them and nowhere else."""
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log")
    axes.set_xticks(list(ticks), [f"{tick:,}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())


def log_heights(axes: Axes, *, form: str = "g", ticks: Sequence[int] | None = None) -> None:
    """A logarithmic axis of heights whose numbers are written as such.

    Args:
        axes: the frame.
        form: how a number is formatted.
        ticks: which multiples of a power of ten are labelled; None leaves that to matplotlib.
    """
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
        end = next((i for i in reversed(range(len(line.y))) if math.isfinite(line.y[i])), None)
        if end is None:
            continue
        # In the frame's own height, whatever the axis's scale.
        inside = axes.transData.transform((line.x[end], min(max(line.y[end], low), high)))
        ends.append((line, end))
        heights.append(float(axes.transAxes.inverted().transform(inside)[1]))
    # The frame is about four fifths of the figure's height.
    gap = 1.35 * FONT_SIZE / (0.8 * HEIGHT * 72)
    for (line, end), place in zip(ends, places_apart(heights, gap), strict=True):
        # A leader from the middle of the frame would cross other lines; there the sample of the line has to do.
        if line.x[end] >= 0.97 * axes.get_xlim()[1]:
            axes.annotate(
                "",
                xy=(line.x[end], min(max(line.y[end], low), high)),
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
