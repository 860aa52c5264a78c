"""Drawings of `sparseffn study`, made from its JSON alone: measured lines with markers, predictions dotted without."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sparseffn.report.figures import WIDTH, Plot
from sparseffn.report.lines import HEIGHT, Line, label_ends, method_style
from sparseffn.report.result import Result
from sparseffn.report.study_tables import AXES, INITS, SELECTORS, along, check_study, pick
from sparseffn.report.svg import drawing, png_bytes, svg_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# A prediction has its measurement's colour and no marker.
_PREDICTED = {"linestyle": (0, (1, 2)), "marker": "", "linewidth": 1.0}


def study_plots(result: Result) -> list[Plot]:
    """Every drawing of a study.

    Raises:
        UserError: it is not a study's result, or matplotlib is not installed.
    """
    check_study(result)
    plots = []
    if result.get("start"):
        plots += [
            _output_plot(result, "n_experts"),
            _output_plot(result, "n_layers"),
            _load_plot(result, "gaussian"),
            _load_plot(result, "text"),
            _correlation_plot(result),
        ]
    if any(variant["runs"] for variant in result["variants"]):
        plots += [_probe_plot(result, key) for key in _probed(result)]
    return plots


def _output_plot(result: Result, axis: str) -> Plot:
    rows = pick(along(result, axis), input="gaussian", selector="equal-norm")
    lines = []
    for index, init in enumerate(INITS):
        lines += _pair(pick(rows, init=init), axis, "output", init, index)
    return _drawn(
        result,
        lines,
        name=f"output-{axis.replace('_', '-')}",
        title=f"Output variance over {AXES[axis]}",
        caption=f"Variance of the block's output over the dense block's, at initialisation; dotted: predicted. {_fixed(axis)}",
        axes_names=(AXES[axis], "variance / dense"),
        ticks=sorted({row[axis] for row in rows}),
        log_y=True,
    )


def _load_plot(result: Result, source: str) -> Plot:
    rows = pick(along(result, "n_experts"), input=source, init="shared")
    lines = []
    for index, selector in enumerate(SELECTORS):
        lines += _pair(pick(rows, selector=selector), "n_experts", "variation", f"{selector} rows", index)
    what = {"gaussian": "isotropic tokens", "text": "text, last block of an untrained model"}[source]
    return _drawn(
        result,
        lines,
        name=f"load-{source}",
        title=f"Unevenness of the load, {what}",
        caption=f"Standard deviation over mean of the load, at initialisation; dotted: predicted. {_fixed('n_experts')}",
        axes_names=("N_E", "load, std / mean"),
        ticks=sorted({row["n_experts"] for row in rows}),
        log_y=True,
    )


def _correlation_plot(result: Result) -> Plot:
    rows = pick(along(result, "k"), init="shared", selector="free")
    lines = []
    for index, source in enumerate(("gaussian", "text")):
        lines += _pair(pick(rows, input=source), "k", "norm_correlation", source, index)
    return _drawn(
        result,
        lines,
        name="correlation-k",
        title="Do longer selector rows get more tokens?",
        caption="Correlation over experts of load and row norm, rows drawn freely; dotted: predicted. The sign is to change at "
        f"K = N_E / 2. {_fixed('k')}",
        axes_names=("K", "correlation"),
        ticks=sorted({row["k"] for row in rows}),
        log_y=False,
    )


def _pair(rows: Sequence[Mapping[str, Any]], axis: str, key: str, label: str, index: int) -> list[Line]:
    """The medians, and what was predicted, which shares the label."""
    style = _style(index)
    found = [(float(row[axis]), row["measured"][key][0]) for row in rows if row["measured"][key] is not None]
    wanted = [(float(row[axis]), row["predicted"][key]) for row in rows if row["predicted"][key] is not None]
    return [
        Line(label="", x=[x for x, _ in wanted], y=[y for _, y in wanted], style={**style, **_PREDICTED}),
        Line(label=label, x=[x for x, _ in found], y=[y for _, y in found], style=style),
    ]


def _fixed(axis: str) -> str:
    return f"Medians over seeds; only {AXES[axis]} varies."


_PROBES = {
    "load_entropy": ("Evenness of the load", "load entropy / log N_E"),
    "largest_over_mean": ("The busiest expert", "largest / mean load"),
    "norm": ("Growth of the selector's rows", "mean row norm"),
    "interference": ("Interference between experts", "share of squared gradient"),
}


def _probed(result: Result) -> list[str]:
    """Interference is 0 for every sigmoid; only the competition study draws it."""
    return [key for key in _PROBES if key != "interference" or result["kind"] == "study-competition"]


def _probe_plot(result: Result, key: str) -> Plot:
    title, name = _PROBES[key]
    lines = []
    for index, variant in enumerate(result["variants"]):
        if variant["runs"]:
            by_step: dict[int, list[float]] = {}
            for run in variant["runs"]:
                for probe in run["probes"]:
                    by_step.setdefault(probe["step"], []).append(probe[key])
            steps = sorted(by_step)
            y = [statistics.fmean(by_step[step]) for step in steps]
            lines.append(Line(label=variant["name"], x=[float(s) for s in steps], y=y, style=_style(index)))
    return _drawn(
        result,
        lines,
        name=key.replace("_", "-"),
        title=title,
        caption=f"{name} over training steps; means over layers and seeds.",
        axes_names=("step", name),
        ticks=None,
        log_y=False,
    )


def _style(index: int) -> dict[str, Any]:
    """A variant's look with a marker on every point, as there are few."""
    return {key: value for key, value in method_style(index).items() if key != "markevery"}


def _drawn(
    result: Result,
    lines: Sequence[Line],
    *,
    name: str,
    title: str,
    caption: str,
    axes_names: tuple[str, str],
    ticks: Sequence[int] | None,
    log_y: bool,
) -> Plot:
    """One drawing; the axis of sizes is logarithmic, that of steps is not."""
    name = f"{result['kind']}-{name}"
    with drawing(WIDTH, HEIGHT) as (figure, axes):
        for line in lines:
            axes.plot(line.x, line.y, **line.style)
        if ticks is not None:
            _size_axis(axes, ticks)
        if log_y:
            _log_axis(axes, [y for line in lines for y in line.y])
        axes.set_xlabel(axes_names[0])
        axes.set_ylabel(axes_names[1])
        label_ends(axes, [line for line in lines if line.label])
        svg = svg_text(figure, name=name, title=title, description=caption)
        png = png_bytes(figure)
    return Plot(name=name, title=title, caption=caption, svg=svg, png=png)


def _size_axis(axes: Axes, ticks: Sequence[int]) -> None:
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log")
    axes.set_xticks(list(ticks), [f"{tick:,}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())


def _log_axis(axes: Axes, values: Sequence[float]) -> None:
    """Ticks at 1, 2 and 5 where the values span less than two decades, else at powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    positive = [y for y in values if y > 0]
    narrow = bool(positive) and math.log10(max(positive) / min(positive)) < 2
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.10g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
