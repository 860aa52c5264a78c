"""Drawings of what a model's blocks select: use of units, active channels, experts selected together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from sparseffn.report import formats, plotting
from sparseffn.report.plotting import Line, Plot
from sparseffn.results.comparison_result import ActiveChannels, Cooccurrence, LayerShares

DEAD = 0.01
"""Units used less than this share of the mean count as dead, as in the table."""


@dataclass(frozen=True, slots=True)
class Shown:
    """Whose units are drawn, what they are ("experts", "values", "channels"), and the drawing's name."""

    label: str
    unit: str
    name: str


def usage_limits(methods: Iterable[Sequence[LayerShares]]) -> tuple[float, float]:
    """One range of heights for the layers of several methods, so that their figures can be laid side by side."""
    shares = [share / layer.uniform for layers in methods for layer in layers for share in layer.share if share > 0]
    low = 10.0 ** max(-4, min(-3, math.floor(math.log10(min(shares)))))
    return low, max(2.0, 1.6 * max(shares))


def usage_plot(
    layers: Sequence[LayerShares], shown: Shown, *, limits: tuple[float, float] | None = None, pixels: bool = True
) -> Plot:
    """The use of units sorted in each layer, a line a layer; `limits` of heights, by default those of these layers alone."""
    unit, n_units = shown.unit, max(round(1 / layer.uniform) for layer in layers)
    peak = max(layers, key=lambda layer: layer.share[0] / layer.uniform)
    description = (
        f"The most used of the {unit} has {peak.share[0] / peak.uniform:.1f} times the uniform share, in layer {peak.layer}"
    )

    def adjust(axes: plotting.Axes) -> None:
        plotting.log_heights(axes)
        margin = 0.02 * n_units
        axes.set(xlim=(1 - margin, n_units + margin), ylim=limits or usage_limits([layers]))
        # Sorted shares end below 1 and begin above it, so these two corners are always free.
        plotting.reference(axes, 1.0, "uniform", x=0.99, rise=3)
        plotting.reference(axes, DEAD, "dead below", x=0.01, rise=-3)

    return plotting.line_plot(
        [_usage_line(layer, plotting.layer_style(index, len(layers), len(layer.share))) for index, layer in enumerate(layers)],
        name=shown.name,
        title=f"Use of {unit}, sorted: {shown.label}",
        caption=f"Share of the selection weight over the uniform share, {unit} sorted within each layer. {description}.",
        axes_names=(f"{unit} by rank, most used first ({n_units:,})", "use, uniform = 1"),
        adjust=adjust,
        description=description,
        pixels=pixels,
    )


def _usage_line(layer: LayerShares, style: dict[str, Any]) -> Line:
    # Down-sampled shares still span the ranks from the first unit to the last.
    step = (round(1 / layer.uniform) - 1) / max(len(layer.share) - 1, 1)
    # A logarithmic axis has no zero: the line stops there.
    heights = [share / layer.uniform if share > 0 else math.nan for share in layer.share]
    return Line(f"layer {layer.layer}", [1 + step * i for i in range(len(heights))], heights, style)


def active_plot(layers: Sequence[ActiveChannels], shown: Shown, *, pixels: bool = True) -> Plot:
    """How many units are active for a token, mean and standard deviation in each layer."""
    from matplotlib.ticker import MaxNLocator

    unit = shown.unit
    title = f"Active {unit} per layer: {shown.label}"
    x, means, stds = zip(*((layer.layer, layer.mean, layer.std or 0.0) for layer in layers), strict=True)
    points = {"linestyle": "none", "marker": "o", "markersize": 5, "capsize": 4, "elinewidth": 1.2}
    with plotting.drawing() as (figure, axes):
        axes.errorbar(x, means, yerr=stds, color=plotting.PALETTE[1], **points)
        beside = {"xytext": (7, 0), "textcoords": "offset points", "va": "center", "fontsize": plotting.FONT_SIZE - 0.5}
        for place in zip(x, means, strict=True):
            axes.annotate(formats.integer(place[1]), place, **beside)
        top = max(mean + std for mean, std in zip(means, stds, strict=True))
        axes.set(xlabel="layer", ylabel=f"active {unit} per token", ylim=(0, 1.08 * top or 1))
        axes.set_xlim(min(x) - 0.5, max(x) + 0.7)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(visible=False, axis="x")
        totals = " or ".join(map(formats.integer, sorted({layer.total for layer in layers})))
        share = fmean(layer.mean / layer.total for layer in layers)
        description = f"On average over the layers {formats.percent(share)} of the {totals} {unit} are active"
        saved = "; the rest of the block's work multiplies by zero, and a sparse method can save it" if share < 1 else ""
        caption = (
            f"Number of {unit} with a non-zero coefficient per token: mean (point) and standard deviation over tokens "
            f"(bar). {description}{saved}."
        )
        return plotting.finished(figure, name=shown.name, title=title, caption=caption, description=description, pixels=pixels)


def cooccurrence_plot(found: Cooccurrence, shown: Shown, *, pixels: bool = True) -> Plot:
    """Heat map of the units of one layer that are selected together."""
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    matrix, size, unit = found.matrix, len(found.matrix), shown.unit
    title = f"{unit.capitalize()} selected together: {shown.label}, layer {found.layer}"
    # A unit is always selected with itself; without the diagonal the rest keeps its contrast.
    rows = [[math.nan if i == j else value for j, value in enumerate(row)] for i, row in enumerate(matrix)]
    top = max((value for row in matrix for value in row), default=0.0) or 1.0
    with plotting.drawing(plotting.WIDTH, 0.86 * plotting.WIDTH) as (figure, axes):
        axes.set_facecolor("#d9d9d9")
        # Square cells would take the room of the axis labels: the layout does not reckon with a fixed aspect.
        image = axes.imshow(rows, cmap="Blues", norm=Normalize(0, top), interpolation="none", aspect="auto")
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.set(xlabel=f"selected with ({unit})", ylabel=unit)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(nbins=9, integer=True))
        bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.03, format=PercentFormatter(1, decimals=0))
        bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
        bar.set_label("share of the row")
        even = 1 / max(size - 1, 1)
        description = (
            f"The strongest pairing takes {formats.percent(top)} of its row; "
            f"even pairing would give each {formats.percent(even)}"
        )
        caption = f"How often the column's unit is selected for the same token as the row's; each row sums to 1. {description}."
        return plotting.finished(figure, name=shown.name, title=title, caption=caption, description=description, pixels=pixels)
