"""A sweep as curves: the metric over K, G or N_E, from the table's JSON alone; the dense model is a dashed level.

for plot in sweep_plots(json.loads(Path("out/sweep-k.json").read_text())): ...
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparseffn.report.figures import WIDTH, Plot, finished
from sparseffn.report.lines import HEIGHT, PALETTE, reference
from sparseffn.report.result import Result
from sparseffn.report.svg import drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Points a curve needs: fewer show no course.
MIN_POINTS = 2


def sweep_plots(result: Result) -> list[Plot]:
    """One plot for each column of a sweep; empty where the table is none, or too few of its rows are measured.

    Args:
        result: parsed JSON of a table, with `sweep` where it is one: the axis and each row's place on it.

    Raises:
        UserError: matplotlib is not installed.
    """
    sweep = result.get("sweep")
    if not sweep:
        return []
    plots = []
    for index, column in enumerate(result["columns"]):
        cells = {cell["row"]: cell for cell in result["cells"] if cell["column"] == index and cell["status"] == "measured"}
        points = [(x, cells[row]) for row, x in enumerate(sweep["x"]) if x is not None and row in cells]
        if len(points) >= MIN_POINTS:
            level = next((cell["mean"] for row, cell in cells.items() if sweep["x"][row] is None), None)
            plots.append(_plot(result, column, sorted(points, key=lambda point: point[0]), level))
    return plots


def _plot(result: Result, column: Result, points: list[tuple[float, Any]], level: float | None) -> Plot:
    axis, title = result["sweep"]["axis"], f"{result['title']} ({column['name']})"
    n_seeds = sorted({cell["n"] for _, cell in points})
    seeds = f"{' or '.join(map(str, n_seeds))} seed{'' if n_seeds == [1] else 's'}"
    x, means = [x for x, _ in points], [cell["mean"] for _, cell in points]
    best = min(points, key=lambda point: point[1]["mean"])
    description = f"Of {len(points)} values of {axis} between {x[0]:g} and {x[-1]:g}, {best[0]:g} has the lowest mean"
    name = f"{result['table']}-{index_name(column['name'])}"
    with drawing(WIDTH, HEIGHT) as (figure, axes):
        spreads = [cell["spread"] or 0.0 for _, cell in points]
        axes.errorbar(x, means, yerr=spreads, color=PALETTE[1], marker="o", capsize=4, elinewidth=1.2)
        _axes(axes, axis, column["metric"], x)
        if level is not None:
            reference(axes, level, "dense", x=0.99, rise=3)
        caption = f"Test {column['metric']}, mean over {seeds}; bars are the standard deviation over seeds. {description}."
        return finished(figure, name=name, title=title, caption=caption, description=description)


def _axes(axes: Axes, axis: str, metric: str, x: list[float]) -> None:
    # Every sweep doubles.
    axes.set_xscale("log", base=2)
    axes.set_xticks(x, [f"{value:g}" for value in x])
    axes.set(xlabel=axis, ylabel=f"test {metric}")


def index_name(column: str) -> str:
    """A column's name as part of a file's: `WT-S*` is `wt-s-star`."""
    return column.lower().replace("*", "-star").replace(" ", "-")
