"""The figures of a comparison: learning curves, use of experts, active channels, co-occurrence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from sparseffn.report import formats
from sparseffn.report.plotting import (
    FONT_SIZE,
    GREY,
    HEIGHT,
    PALETTE,
    WIDTH,
    Line,
    Plot,
    drawing,
    finished,
    label_ends,
    layer_style,
    log_heights,
    method_style,
    reference,
)
from sparseffn.report.result import Method, Result

DEAD = 0.01
"""Units used less than this share of the mean count as dead, as in the table."""


def curve_plots(result: Result) -> list[Plot]:
    """Validation loss over steps and over training time; empty when no method has a curve.

    Raises:
        UserError: matplotlib is not installed.
    """
    methods = [(method, method_style(index)) for index, method in enumerate(result["methods"])]
    curves = [(method["label"], _mean_curve(method), style) for method, style in methods]
    curves = [curve for curve in curves if curve[1]]
    if not curves:
        return []
    metric = result["metric"]
    many = any(len(method.get("curves") or ()) > 1 for method, _ in methods)
    seeds = " Each line is the mean over seeds, its band their range." if many else ""
    tokens = result.get("curve_tokens")
    part = f" on the first {formats.integer(tokens)} tokens of the validation split" if tokens else " on validation"
    equal_time = result.get("equal_time_s")
    mark = ""
    if equal_time is not None:
        unbroken = formats.seconds(equal_time).replace(" ", "\u00a0")
        mark = (
            f" The dashed vertical line marks {unbroken}, when the fastest method had finished: "
            "compare the heights there for quality at equal time."
        )
    plots = []
    for key, name, axis, reading in (
        (
            "step",
            "curves-steps",
            "training step",
            "Every method has seen the same tokens at the same step; a lower line learns more from each of them.",
        ),
        (
            "time_s",
            "curves-time",
            "training time in seconds",
            f"The same points over the seconds spent in training; a line that ends further right took longer.{mark}",
        ),
    ):
        title = f"{metric.capitalize()} over {'steps' if key == 'step' else 'training time'}"
        with drawing(WIDTH, HEIGHT) as (figure, axes):
            lines = []
            for label, points, style in curves:
                xs, ys = [p[key] for p in points], [p["mean"] for p in points]
                axes.plot(xs, ys, **style)
                if many:
                    lows, highs = [p["low"] for p in points], [p["high"] for p in points]
                    axes.fill_between(xs, lows, highs, color=style["color"], alpha=0.15, linewidth=0)
                lines.append(Line(label, xs, ys, style))
            low, high = _loss_range(lines)
            axes.set(xlabel=axis, ylabel=metric, ylim=(low, high), xlim=(0, max(line.x[-1] for line in lines) or 1))
            if key == "time_s" and equal_time is not None:
                axes.axvline(equal_time, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)))
            label_ends(axes, lines)
            caption = f"{metric.capitalize()}{part} (lower is better). {reading}{seeds} The steep beginning is cut off."
            description = "; ".join(f"{line.label} ends at {formats.loss(line.y[-1], metric)}" for line in lines)
            plots.append(finished(figure, name=name, title=title, caption=caption, description=description, pixels=False))
    return plots


def usage_plots(result: Result, *, pixels: bool = False) -> list[Plot]:
    """The use of units sorted per layer, a figure for every method that has it measured.

    Raises:
        UserError: matplotlib is not installed.
    """
    used = [(index, method) for index, method in enumerate(result["methods"]) if method.get("usage")]
    shares = [share / layer["uniform"] for _, method in used for layer in method["usage"] for share in layer["share"]]
    positive = [share for share in shares if share > 0]
    if not positive:
        return []
    # One range for all methods, so that their figures can be laid side by side.
    low = 10.0 ** max(-4, min(-3, math.floor(math.log10(min(positive)))))
    high = max(2.0, 1.6 * max(positive))
    return [_usage_plot(method, f"usage-{index}", (low, high), pixels) for index, method in used]


def active_plots(result: Result, *, pixels: bool = False) -> list[Plot]:
    """Active channels per layer, a figure for every method that has them measured (the dense model, as a rule).

    Raises:
        UserError: matplotlib is not installed.
    """
    measured = [(index, method) for index, method in enumerate(result["methods"]) if method.get("active")]
    return [_active_plot(method, f"active-{index}", pixels) for index, method in measured]


def cooccurrence_plots(result: Result, *, pixels: bool = False) -> list[Plot]:
    """Heat maps of experts selected together, a figure for every method that has them measured.

    Raises:
        UserError: matplotlib is not installed.
    """
    measured = [(index, method) for index, method in enumerate(result["methods"]) if method.get("cooccurrence")]
    return [_cooccurrence_plot(method, f"cooccurrence-{index}", pixels) for index, method in measured]


def _usage_plot(method: Method, name: str, limits: tuple[float, float], pixels: bool) -> Plot:
    unit, layers = method.get("unit") or "units", method["usage"]
    title = f"Use of {unit}, sorted: {method['label']}"
    with drawing(WIDTH, HEIGHT) as (figure, axes):
        n_units = max(round(1 / layer["uniform"]) for layer in layers)
        lines = []
        for index, layer in enumerate(layers):
            n, n_points = round(1 / layer["uniform"]), len(layer["share"])
            # Down-sampled shares still span the ranks from the first unit to the last.
            ranks = [1 + (n - 1) * i / max(n_points - 1, 1) for i in range(n_points)]
            # A logarithmic axis has no zero: the line stops there.
            heights = [share / layer["uniform"] if share > 0 else math.nan for share in layer["share"]]
            style = layer_style(index, len(layers), n_points)
            axes.plot(ranks, heights, **style)
            lines.append(Line(f"layer {layer['layer']}", ranks, heights, style))
        log_heights(axes)
        margin = 0.02 * n_units
        axes.set(xlim=(1 - margin, n_units + margin), ylim=limits)
        axes.set(xlabel=f"{unit} by rank, most used first ({n_units:,})", ylabel="use, uniform = 1")
        # Sorted shares end below 1 and begin above it, so these two corners are always free.
        reference(axes, 1.0, "uniform", x=0.99, rise=3)
        reference(axes, DEAD, "dead below", x=0.01, rise=-3)
        label_ends(axes, lines)
        peak = max(layers, key=lambda layer: layer["share"][0] / layer["uniform"])
        description = (
            f"The most used of the {unit} has {peak['share'][0] / peak['uniform']:.1f} times the uniform share, "
            f"in layer {peak['layer']}"
        )
        caption = f"Share of the selection weight over the uniform share, {unit} sorted within each layer. {description}."
        return finished(figure, name=name, title=title, caption=caption, description=description, pixels=pixels)


def _active_plot(method: Method, name: str, pixels: bool) -> Plot:
    from matplotlib.ticker import MaxNLocator

    layers, unit = method["active"], method.get("unit") or "channels"
    title = f"Active {unit} per layer: {method['label']}"
    x, means = [layer["layer"] for layer in layers], [layer["mean"] for layer in layers]
    with drawing(WIDTH, HEIGHT) as (figure, axes):
        axes.errorbar(
            x,
            means,
            yerr=[layer["std"] or 0.0 for layer in layers],
            color=PALETTE[1],
            linestyle="none",
            marker="o",
            markersize=5,
            capsize=4,
            elinewidth=1.2,
        )
        for layer in layers:
            axes.annotate(
                formats.integer(layer["mean"]),
                (layer["layer"], layer["mean"]),
                xytext=(7, 0),
                textcoords="offset points",
                va="center",
                fontsize=FONT_SIZE - 0.5,
            )
        top = max(layer["mean"] + (layer["std"] or 0.0) for layer in layers)
        axes.set(xlabel="layer", ylabel=f"active {unit} per token", ylim=(0, 1.08 * top or 1))
        axes.set_xlim(min(x) - 0.5, max(x) + 0.7)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(visible=False, axis="x")
        totals = sorted({layer["total"] for layer in layers})
        share = fmean(layer["mean"] / layer["total"] for layer in layers)
        description = (
            f"On average over the layers {formats.percent(share)} of the "
            f"{' or '.join(map(formats.integer, totals))} {unit} are active"
        )
        caption = (
            f"Number of {unit} with a non-zero coefficient per token: mean (point) and standard deviation over tokens "
            f"(bar). {description}; the rest of the block's work multiplies by zero, and a sparse method can save it."
        )
        return finished(figure, name=name, title=title, caption=caption, description=description, pixels=pixels)


def _cooccurrence_plot(method: Method, name: str, pixels: bool) -> Plot:
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    matrix, layer = method["cooccurrence"]["matrix"], method["cooccurrence"]["layer"]
    size, unit = len(matrix), method.get("unit") or "units"
    title = f"{unit.capitalize()} selected together: {method['label']}, layer {layer}"
    # A unit is always selected with itself; without the diagonal the rest keeps its contrast.
    rows = [[math.nan if i == j else value for j, value in enumerate(row)] for i, row in enumerate(matrix)]
    top = max((value for row in matrix for value in row), default=0.0) or 1.0
    with drawing(WIDTH, 0.86 * WIDTH) as (figure, axes):
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
        return finished(figure, name=name, title=title, caption=caption, description=description, pixels=pixels)


def _mean_curve(method: Method) -> list[dict[str, float]]:
    """The points that all seeds share: step, mean time, and mean, least and greatest loss."""
    by_step = [
        {p["step"]: p for p in curve.get("points") or () if p.get("valid") is not None and math.isfinite(p["valid"])}
        for curve in method.get("curves") or ()
    ]
    by_step = [points for points in by_step if points]
    if not by_step:
        return []
    curve = []
    for step in sorted(set.intersection(*(set(points) for points in by_step))):
        points = [points[step] for points in by_step]
        losses = [point["valid"] for point in points]
        time = fmean(point["time_s"] for point in points)
        curve.append(
            {"step": step, "time_s": time, "mean": fmean(losses), "low": min(losses), "high": max(losses)},
        )
    return curve


def _loss_range(lines: Sequence[Line]) -> tuple[float, float]:
    """Limits that spend the height on the part where methods differ: from a quarter of the training on."""
    low = min(min(line.y) for line in lines)
    highs = []
    for line in lines:
        late = [y for x, y in zip(line.x, line.y, strict=True) if x >= 0.25 * line.x[-1]]
        highs.append(max(late))
    high = max(highs)
    margin = 0.06 * (high - low) or 0.05 * abs(low) or 1.0
    return low - margin, high + margin
