"""Claims 29 to 32: by which power of a size time and memory of a layer grow, from what `sparseffn bench figures` measured.

The exponent is the slope of the logarithms by least squares, its interval Student's over the sizes: it is wide where
the growth is no power of the size, and says little of the clock's noise, as each time is a median already.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from sparseffn.report import formats
from sparseffn.report.table import Table
from sparseffn.results.bench_result import FigureLayer, FigurePoint, FiguresResult
from sparseffn.stats import student_quantile

Exponent = tuple[float, float, float]
"""With the ends of its 95% interval."""

_LAYERS = ("sigma-moe", "dense")
_QUANTITIES: dict[str, Callable[[FigureLayer], float]] = {
    "time": lambda layer: layer.training.median_s,
    "memory": lambda layer: float(layer.memory_bytes),
}


def exponent(sizes: Sequence[float], values: Sequence[float]) -> Exponent | None:
    """By which power values grow, with the ends of its 95% interval; None for fewer than three sizes."""
    if len(sizes) < 3:
        return None
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    slope, start = statistics.linear_regression(x, y)
    misses = sum((b - start - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    spread = sum((a - statistics.fmean(x)) ** 2 for a in x)
    freedom = len(x) - 2
    half = student_quantile(freedom) * math.sqrt(misses / freedom / spread)
    return slope, slope - half, slope + half


def growth_table(result: FiguresResult) -> Table:
    """A row for each figure: what varies, what is held, and the exponents of both blocks."""
    head = ("figure", "over", "held fixed", *(f"{name}, {quantity}" for quantity in _QUANTITIES for name in _LAYERS))
    rows: list[tuple[str, ...]] = []
    for number in result.figures:
        points = points_of(result, number)
        sweep = result.sweeps[str(number)]
        if points:
            span = f"{sweep.variable} {points[0].value:,} to {points[-1].value:,} ({len(points)})"
            rows.append((str(number), span, sweep.fixed, *map(_exponent, exponents(points).values())))
    machine = f"{result.environment.threads} cores of {result.environment.cpu}"
    notes = (
        f"Exponents: 1 is linear, 0 flat. Forward and backward of {result.settings.tokens:,} tokens, {result.settings.dtype}, "
        f"{machine}; memory is what backward keeps and the output. Intervals: 95% over the sizes, their number in brackets.",
    )
    return Table.of(head, rows, n_words=3, notes=notes)


def points_of(result: FiguresResult, figure: int) -> list[FigurePoint]:
    """What was measured for a figure, by size."""
    return sorted((point for point in result.points if point.figure == figure), key=lambda point: point.value)


def exponents(points: Sequence[FigurePoint]) -> dict[tuple[str, str], Exponent | None]:
    """By layer and quantity, in the order of the table."""
    sizes = [point.value for point in points]
    return {
        (name, word): exponent(sizes, [quantity(point.layers[name]) for point in points])
        for word, quantity in _QUANTITIES.items()
        for name in _LAYERS
    }


def _exponent(fit: Exponent | None) -> str:
    return formats.NOT_MEASURED if fit is None else f"{fit[0]:.2f} [{fit[1]:.2f}, {fit[2]:.2f}]"
