"""The figures of a comparison: learning curves, use of experts, active channels, co-occurrence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from sparseffn.report import formats
from sparseffn.report.plotting import GREY, HEIGHT, WIDTH, Line, Plot, drawing, finished, label_ends, method_style
from sparseffn.report.usage_plots import Shown, active_plot, cooccurrence_plot, usage_limits, usage_plot
from sparseffn.results.comparison_result import ComparisonResult, MethodResult


def curve_plots(result: ComparisonResult) -> list[Plot]:
    """Validation loss over steps and over training time; empty when no method has a curve."""
    methods = [(method, method_style(index)) for index, method in enumerate(result.methods)]
    curves = [(method.label, _mean_curve(method), style) for method, style in methods]
    curves = [curve for curve in curves if curve[1]]
    if not curves:
        return []
    metric = result.metric
    many = any(len(method.curves) > 1 for method, _ in methods)
    seeds = " Each line is the mean over seeds, its band their range." if many else ""
    tokens = result.curve_tokens
    part = f" on the first {formats.integer(tokens)} tokens of the validation split" if tokens else " on validation"
    equal_time = result.equal_time_s
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


def usage_plots(result: ComparisonResult) -> list[Plot]:
    """The use of units sorted per layer, a figure for every method that has it measured."""
    used = [(f"usage-{i}", method, method.usage) for i, method in enumerate(result.methods) if method.usage]
    if not any(share > 0 for _, _, layers in used for layer in layers for share in layer.share):
        return []
    limits = usage_limits(layers for _, _, layers in used)
    return [usage_plot(layers, _shown(method, name), limits=limits, pixels=False) for name, method, layers in used]


def active_plots(result: ComparisonResult) -> list[Plot]:
    """Active channels per layer, a figure for every method that has them measured (the dense model, as a rule)."""
    return [
        active_plot(method.active, _shown(method, f"active-{i}"), pixels=False)
        for i, method in enumerate(result.methods)
        if method.active
    ]


def cooccurrence_plots(result: ComparisonResult) -> list[Plot]:
    """Heat maps of experts selected together, a figure for every method that has them measured."""
    return [
        cooccurrence_plot(method.cooccurrence, _shown(method, f"cooccurrence-{i}"), pixels=False)
        for i, method in enumerate(result.methods)
        if method.cooccurrence
    ]


PLOTS: Mapping[str, Callable[[ComparisonResult], list[Plot]]] = {
    "curves": curve_plots,
    "usage": usage_plots,
    "active": active_plots,
    "cooccurrence": cooccurrence_plots,
}
"""By what is measured of a method."""


def _shown(method: MethodResult, name: str) -> Shown:
    return Shown(method.label, method.unit or "units", name)


def _mean_curve(method: MethodResult) -> list[dict[str, float]]:
    """The points that all seeds share: step, mean time, and mean, least and greatest loss."""
    by_step = [{point.step: point for point in curve.points if point.valid is not None} for curve in method.curves]
    by_step = [points for points in by_step if points]
    if not by_step:
        return []
    curve = []
    for step in sorted(set.intersection(*(set(points) for points in by_step))):
        points = [points[step] for points in by_step]
        losses = [point.valid for point in points if point.valid is not None]
        time = fmean(point.time_s for point in points)
        curve.append({"step": step, "time_s": time, "mean": fmean(losses), "low": min(losses), "high": max(losses)})
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
