"""Drawings of the benchmark's results, made from their JSON alone."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from sparseffn.report.plotting import GREY, Line, Plot, line_plot, pointed_style, size_axis
from sparseffn.results.bench_result import BenchResult, FigureLayer, FigurePoint, FiguresResult, LayerResult, LayerRow

# Characters of a line below a frame.
_LINE_LENGTH = 64

_MEASURES: dict[str, tuple[str, Callable[[FigureLayer], float]]] = {
    "time": ("forward + backward, ms", lambda layer: 1e3 * layer.training.median_s),
    "memory": ("saved for backward and output, MiB", lambda layer: layer.memory_bytes / 2**20),
}


def bench_plots(result: BenchResult) -> list[Plot]:
    """The drawings of a result; none for kinds that are tables."""
    if isinstance(result, FiguresResult):
        return [plot for number in result.figures for plot in figure_plots(result, number)]
    if isinstance(result, LayerResult):
        shapes = groupby(result.rows, key=lambda row: row.shape)
        return [plot for shape, rows in shapes for plot in _layer_plots(shape, list(rows))]
    return []


def figure_plots(result: FiguresResult, number: int) -> list[Plot]:
    """Time and memory of one of the paper's figures; a figure without a point is not drawn."""
    points = [point for point in result.points if point.figure == number]
    return [_figure_plot(result, number, points, measure) for measure in _MEASURES] if points else []


def _figure_plot(result: FiguresResult, number: int, points: Sequence[FigurePoint], measure: str) -> Plot:
    sweep, settings = result.sweeps[str(number)], result.settings
    what, value_of = _MEASURES[measure]
    missing = left_out_lines(result, number)
    x = [float(point.value) for point in points]
    lines = [
        Line(label, x, [value_of(point.layers[label]) for point in points], pointed_style(index))
        for index, label in enumerate(points[0].layers)
    ]
    caption = (
        f"{what.capitalize()} of one layer over {sweep.variable}; {sweep.fixed}; {settings.tokens:,} tokens, "
        f"{settings.dtype}, {result.environment.threads} threads."
    )
    return line_plot(
        lines,
        name=f"figure-{number}-{measure}",
        title=f"Figure {number} of the paper, {measure}",
        caption=" ".join([caption, *missing]),
        axes_names=(sweep.variable, what),
        adjust=lambda axes: size_axis(axes, sweep.values),
        below=missing,
    )


def left_out_lines(result: FiguresResult, number: int) -> list[str]:
    """The sentence that names a figure's points that were not measured, broken into lines."""
    left = sorted((e for e in result.left_out if e.figure == number), key=lambda e: (e.limit, e.value))
    if not left:
        return []
    groups = []
    for limit, entries in groupby(left, key=lambda entry: entry.limit):
        values = ", ".join(f"{entry.value:,}" for entry in entries)
        groups.append(f"{values} ({limit})")
    return textwrap.wrap(f"Not measured: {left[0].variable} {'; '.join(groups)}.", _LINE_LENGTH)


def _layer_plots(shape: str, rows: list[LayerRow]) -> list[Plot]:
    """Forward, and forward with backward, over tokens; nothing where one size was timed."""
    tokens = sorted({row.tokens for row in rows})
    if len(tokens) < 2:
        return []
    passes = {"forward": "forward", "training": "forward + backward"}
    return [
        line_plot(
            _layer_lines(rows, key),
            name=f"{shape}-{key}",
            title=f"{shape}, {what}",
            caption=f"Median time of one call over the tokens in it. The limit is that of {_limited(rows)}.",
            axes_names=("tokens", f"{what}, ms"),
            adjust=lambda axes: size_axis(axes, tokens),
        )
        for key, what in passes.items()
    ]


def _limited(rows: list[LayerRow]) -> str:
    """The layer whose limit is drawn: the first that is neither dense nor a peer, else the dense block."""
    return next((row.label for row in rows if not row.peer and row.label != "dense"), "dense")


def _layer_lines(rows: list[LayerRow], key: str) -> list[Line]:
    def line(name: str, label: str, quantity: str, style: dict[str, Any]) -> Line:
        own = [row for row in rows if row.label == label]
        y = [1e3 * getattr(getattr(row, key), quantity) for row in own]
        return Line(name, [float(row.tokens) for row in own], y, style)

    labels = dict.fromkeys(row.label for row in rows)
    lines = [line(label, label, "median_s", pointed_style(index)) for index, label in enumerate(labels)]
    style = {"color": GREY, "linestyle": (0, (1, 2)), "marker": ""}
    return [*lines, line("limit", _limited(rows), "limit_s", style)]
