"""The figures of a comparison: learning curves, use of experts, active channels, co-occurrence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean

from sparseffn.report import formats, plotting
from sparseffn.report.plotting import Line, Plot
from sparseffn.report.usage_plots import Shown, active_plot, cooccurrence_plot, usage_limits, usage_plot
from sparseffn.results.comparison_result import ComparisonResult, MethodResult


def curve_plots(result: ComparisonResult) -> list[Plot]:
    """Validation loss over steps and over training time; empty when no method has a curve."""
    over_steps, over_time = _curves(result, "step"), _curves(result, "time_s")
    if not over_steps:
        return []
    mark = ""
    if result.equal_time_s is not None:
        mark = (
            f" The dashed vertical line marks {formats.seconds(result.equal_time_s)}, when the fastest method had finished: "
            "compare the heights there for quality at equal time."
        )
    return [
        _curve_plot(
            result,
            over_steps,
            name="curves-steps",
            over=("steps", "training step"),
            reading="Every method has seen the same tokens at the same step; a lower line learns more from each of them.",
        ),
        _curve_plot(
            result,
            over_time,
            name="curves-time",
            over=("training time", "training time in seconds"),
            reading=f"The same points over the seconds spent in training; a line that ends further right took longer.{mark}",
            mark=result.equal_time_s,
        ),
    ]


def _curve_plot(
    result: ComparisonResult, lines: list[Line], *, name: str, over: tuple[str, str], reading: str, mark: float | None = None
) -> Plot:
    """Curves `over` what the title and the axis name, with a vertical line at a `mark`."""
    metric, tokens = result.metric, result.curve_tokens
    part = f" on the first {formats.integer(tokens)} tokens of the validation split" if tokens else " on validation"
    seeds = " Each line is the mean over seeds, its band their range." if any(line.band for line in lines) else ""

    def adjust(axes: plotting.Axes) -> None:
        axes.set(ylim=_loss_range(lines), xlim=(0, max(line.x[-1] for line in lines) or 1))
        if mark is not None:
            axes.axvline(mark, color=plotting.GREY, linewidth=0.8, linestyle=(0, (4, 3)))

    return plotting.line_plot(
        lines,
        name=name,
        title=f"{metric.capitalize()} over {over[0]}",
        caption=f"{metric.capitalize()}{part} (lower is better). {reading}{seeds} The steep beginning is cut off.",
        axes_names=(over[1], metric),
        adjust=adjust,
        description="; ".join(f"{line.label} ends at {formats.loss(line.y[-1], metric)}" for line in lines),
        pixels=False,
    )


def usage_plots(result: ComparisonResult) -> list[Plot]:
    """The use of units sorted per layer, a figure for every method that has it measured."""
    used = [method.usage for method in result.methods if method.usage]
    if not any(share > 0 for layers in used for layer in layers for share in layer.share):
        return []
    return _plots(result, "usage", partial(usage_plot, limits=usage_limits(used)))


def active_plots(result: ComparisonResult) -> list[Plot]:
    """Active channels per layer, a figure for every method that has them measured (the dense model, as a rule).

    None where all of them always are, as with SiLU, which is hardly ever zero.
    """
    layers = [layer for method in result.methods for layer in method.active or ()]
    return _plots(result, "active", active_plot) if any(layer.mean < layer.total for layer in layers) else []


def cooccurrence_plots(result: ComparisonResult) -> list[Plot]:
    """Heat maps of experts selected together, a figure for every method that has them measured."""
    return _plots(result, "cooccurrence", cooccurrence_plot)


def _plots(result: ComparisonResult, field: str, draw: Callable[..., Plot]) -> list[Plot]:
    """A figure for every method that has a field measured."""
    return [
        draw(getattr(method, field), Shown(method.label, method.unit or "units", f"{field}-{index}"), pixels=False)
        for index, method in enumerate(result.methods)
        if getattr(method, field)
    ]


def _curves(result: ComparisonResult, key: str) -> list[Line]:
    """The mean over seeds of each method that has curves, and their range where a method has several."""
    many, lines = any(len(method.curves) > 1 for method in result.methods), []
    for index, method in enumerate(result.methods):
        if points := _mean_curve(method):
            x, mean, low, high = ([point[name] for point in points] for name in (key, "mean", "low", "high"))
            lines.append(Line(method.label, x, mean, plotting.method_style(index), band=(low, high) if many else None))
    return lines


def _mean_curve(method: MethodResult) -> list[dict[str, float]]:
    """The points that all seeds share: step, mean time, and mean, least and greatest loss."""
    by_seed = [{p.step: (p.time_s, p.valid) for p in curve.points if p.valid is not None} for curve in method.curves]
    by_seed = [points for points in by_seed if points]
    curve = []
    for step in sorted(set.intersection(*map(set, by_seed)) if by_seed else ()):
        times, losses = zip(*(points[step] for points in by_seed), strict=True)
        curve.append({"step": step, "time_s": fmean(times), "mean": fmean(losses), "low": min(losses), "high": max(losses)})
    return curve


def _loss_range(lines: Sequence[Line]) -> tuple[float, float]:
    """Limits that leave the height to the part where methods differ: from a quarter of the training on."""
    low = min(min(line.y) for line in lines)
    high = max(y for line in lines for x, y in zip(line.x, line.y, strict=True) if x >= 0.25 * line.x[-1])
    margin = 0.06 * (high - low) or 0.05 * abs(low) or 1.0
    return low - margin, high + margin
