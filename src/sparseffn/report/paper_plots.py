"""The paper's own figures: the use of experts by all variants (3 and 7), and sweeps over K, G or N_E, from results alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sparseffn.report import formats, plotting
from sparseffn.report.plotting import Line, Plot
from sparseffn.results.analysis_result import AnalysisResult
from sparseffn.results.table_result import Cell, Column, TableResult

# Panels beside each other in the figure of all layers, and the height in inches of a row of many and of the only one.
_COLUMNS, _ROW_HEIGHT, _ONE_ROW_HEIGHT = 4, 1.55, 2.4
# Of the logarithmic axis: what is used less is drawn at the bottom.
_LOWEST = 1e-3
_SHARE_LABEL = "selection weight, uniform = 1"
_CAPTION = (
    "Share of the selection weight over the uniform share, experts sorted within each {where}. A flat line is an even use, "
    f"a cliff a collapse; what lies below {_LOWEST:g} is drawn there."
)


def shares_plot(runs: Mapping[str, AnalysisResult], layer: int, *, name: str) -> Plot:
    """Sorted shares of one layer, a line for each run, which are analyses by label; a run with fewer layers shows its last."""
    lines = _lines(runs, layer)

    def adjust(axes: plotting.Axes) -> None:
        _set_heights(axes, lines)
        plotting.reference(axes, 1.0, "uniform", x=0.99, rise=3)

    return plotting.line_plot(
        lines,
        name=name,
        title=f"Use of experts, sorted, layer {layer}",
        caption=_CAPTION.format(where=f"run, layer {layer}"),
        axes_names=(_rank_label(runs), _SHARE_LABEL),
        adjust=adjust,
        description="; ".join(f"the most used of {line.label} has {line.y[0]:.1f} times the uniform share" for line in lines),
    )


def shares_panels(runs: Mapping[str, AnalysisResult], *, name: str) -> Plot:
    """The same for every layer, a panel each."""
    from matplotlib.lines import Line2D

    n_layers = max(len(analysis.usage) for analysis in runs.values())
    columns = min(_COLUMNS, n_layers)
    n_rows = -(-n_layers // columns)
    title = "Use of experts, sorted, all layers"
    width = plotting.TEXT_WIDTH if columns > 2 else plotting.WIDTH
    height = (_ROW_HEIGHT if n_rows > 1 else _ONE_ROW_HEIGHT) * n_rows + 0.8
    with plotting.panels(width, height, n_rows, columns) as (figure, frames):
        for layer, axes in enumerate(frames):
            if layer >= n_layers:
                axes.set_visible(False)
                continue
            lines = _lines(runs, layer, large=False)
            for line in lines:
                plotting.draw_line(axes, line)
            _set_heights(axes, lines)
            axes.axhline(1.0, color=plotting.GREY, linewidth=0.6, linestyle=(0, (4, 3)), zorder=1)
            axes.set_title(f"layer {layer}", fontsize=plotting.FONT_SIZE - 0.5, pad=3)
        figure.supxlabel(_rank_label(runs), fontsize=plotting.FONT_SIZE)
        figure.supylabel(_SHARE_LABEL, fontsize=plotting.FONT_SIZE)
        samples = [Line2D([], [], label=label, **_style(i, large=False)) for i, label in enumerate(runs)]
        figure.legend(handles=samples, loc="outside upper center", ncols=min(len(runs), 3), frameon=False, handlelength=3.5)
        caption, description = _CAPTION.format(where="run and layer"), f"{n_layers} layers of {', '.join(runs)}"
        return plotting.finished(figure, name=name, title=title, caption=caption, description=description)


def _lines(runs: Mapping[str, AnalysisResult], layer: int, *, large: bool = True) -> list[Line]:
    """A line for each run that has the layer, looking alike in every panel."""
    lines = []
    for index, (label, analysis) in enumerate(runs.items()):
        if large or layer < len(analysis.usage):
            usage = analysis.usage[min(layer, len(analysis.usage) - 1)]
            heights = [max(share / usage.uniform, _LOWEST) for share in usage.share]
            lines.append(Line(label=label, x=_ranks(runs, heights), y=heights, style=_style(index, large=large)))
    return lines


def _ranks(runs: Mapping[str, AnalysisResult], heights: Sequence[float]) -> list[float]:
    """Ranks from 1, or percent of the experts where runs have different numbers of them."""
    n = len(heights)
    return [float(i + 1) for i in range(n)] if len(_sizes(runs)) == 1 else [100 * (i + 0.5) / n for i in range(n)]


def _sizes(runs: Mapping[str, AnalysisResult]) -> set[int]:
    return {len(analysis.usage[0].share) for analysis in runs.values()}


def _rank_label(runs: Mapping[str, AnalysisResult]) -> str:
    sizes = _sizes(runs)
    one = f"experts by rank, most used first ({formats.integer(min(sizes))})"
    return one if len(sizes) == 1 else f"experts by rank, percent of {' or '.join(map(str, sorted(sizes)))}"


def _style(index: int, *, large: bool) -> dict[str, Any]:
    """A run's look; in small panels markers are small and few."""
    return plotting.method_style(index) | ({} if large else {"markersize": 2.8, "markeredgewidth": 0.0, "markevery": 0.2})


def _set_heights(axes: plotting.Axes, lines: Sequence[Line]) -> None:
    plotting.log_heights(axes)
    heights = [y for line in lines for y in line.y]
    axes.set_ylim(0.7 * max(min([0.1, *heights]), _LOWEST), 1.6 * max([2.0, *heights]))


# Points a curve needs: fewer show no course.
MIN_POINTS = 2


def sweep_plots(result: TableResult) -> list[Plot]:
    """One plot for each column of a sweep; empty where the table is none, or too few of its rows are measured."""
    sweep = result.sweep
    if not sweep:
        return []
    plots = []
    for index, column in enumerate(result.columns):
        cells = {cell.row: cell for cell in result.cells if cell.column == index and cell.status == "measured"}
        points = [(x, cells[row]) for row, x in enumerate(sweep.x) if x is not None and row in cells]
        if len(points) >= MIN_POINTS:
            level = next((cell.mean for row, cell in cells.items() if sweep.x[row] is None), None)
            plots.append(_sweep_plot(result, column, sorted(points, key=lambda point: point[0]), level))
    return plots


def _sweep_plot(result: TableResult, column: Column, points: list[tuple[float, Cell]], level: float | None) -> Plot:
    assert result.sweep is not None, "a sweep is drawn"
    axis, title = result.sweep.axis, f"{result.title} ({column.name})"
    n_seeds = sorted({cell.n for _, cell in points})
    seeds = f"{' or '.join(map(str, n_seeds))} seed{'' if n_seeds == [1] else 's'}"
    x, means = [x for x, _ in points], [cell.mean or math.nan for _, cell in points]
    best = min(points, key=lambda point: point[1].mean or math.inf)
    description = f"Of {len(points)} values of {axis} between {x[0]:g} and {x[-1]:g}, {best[0]:g} has the lowest mean"
    name = f"{result.table}-{_file_name(column.name)}"
    with plotting.drawing() as (figure, axes):
        spreads = [cell.spread or 0.0 for _, cell in points]
        axes.errorbar(x, means, yerr=spreads, color=plotting.PALETTE[1], marker="o", capsize=4, elinewidth=1.2)
        # Every sweep doubles.
        axes.set_xscale("log", base=2)
        axes.set_xticks(x, [f"{value:g}" for value in x])
        axes.set(xlabel=axis, ylabel=f"test {column.metric}")
        if level is not None:
            plotting.reference(axes, level, "dense", x=0.99, rise=3)
        caption = f"Test {column.metric}, mean over {seeds}; bars are the standard deviation over seeds. {description}."
        return plotting.finished(figure, name=name, title=title, caption=caption, description=description)


def _file_name(column: str) -> str:
    """A column's name as part of a file's: `WT-S*` is `wt-s-star`."""
    return column.lower().replace("*", "-star").replace(" ", "-")
