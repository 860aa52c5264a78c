"""Drawings of `sparseffn study`, made from its JSON alone: predictions are lines, measurements markers with their range."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparseffn.report.plotting import (
    HEIGHT,
    WIDTH,
    Line,
    Plot,
    drawing,
    finished,
    label_ends,
    log_heights,
    pointed_style,
    size_axis,
)
from sparseffn.results.study_result import StartRow, StudyResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes


AXES = {"n_experts": "N_E", "n_layers": "layers", "expert_size": "G", "k": "K"}
INITS = ("shared", "standard", "switch")
SELECTORS = ("equal-norm", "free")


def base_sizes(result: StudyResult) -> dict[str, int]:
    """The value of each axis where it does not vary."""
    return dict(zip(("n_layers", "n_experts", "expert_size", "k"), result.settings.grid.base, strict=True))


def along(result: StudyResult, axis: str) -> list[StartRow]:
    """Rows of the sizes that differ from the base in one axis at most, in its order."""
    others = {key: value for key, value in base_sizes(result).items() if key != axis}
    return sorted(pick(result.start, **others), key=lambda row: getattr(row, axis))


def pick(rows: Sequence[StartRow], **wanted: object) -> list[StartRow]:
    """The rows with these values."""
    return [row for row in rows if all(getattr(row, key) == value for key, value in wanted.items())]


@dataclass(frozen=True, slots=True)
class _Series:
    """What was predicted and what was measured of one scheme."""

    line: Line
    """The prediction; its label and look are those of both."""
    points: list[tuple[float, float, float, float]]
    """x, median, least, greatest."""


def study_plots(result: StudyResult) -> list[Plot]:
    """Every drawing of a study."""
    plots = []
    if result.start:
        plots += [
            *_output_plot(result, "n_experts"),
            *_output_plot(result, "n_layers"),
            *_load_plot(result, "gaussian"),
            *_load_plot(result, "text"),
            *_correlation_plot(result),
        ]
    return plots + [plot for key in _probed(result) for plot in _probe_plot(result, key)]


def _output_plot(result: StudyResult, axis: str) -> list[Plot]:
    rows = pick(along(result, axis), input="gaussian", selector="equal-norm")
    return _drawn(
        result,
        [_series(pick(rows, init=init), axis, "output", init, index) for index, init in enumerate(INITS)],
        name=f"output-{axis.replace('_', '-')}",
        title=f"Output variance over {AXES[axis]}",
        caption=f"Variance of the block's output over the dense block's, at initialisation. {_fixed(axis)}",
        axes_names=(AXES[axis], "variance / dense"),
        ticks=sorted({getattr(row, axis) for row in rows}),
        log_y=True,
    )


def _load_plot(result: StudyResult, source: str) -> list[Plot]:
    rows = pick(along(result, "n_experts"), input=source, init="shared")
    schemes = [
        _series(pick(rows, selector=selector), "n_experts", "variation", f"{selector} rows", index)
        for index, selector in enumerate(SELECTORS)
    ]
    what = {"gaussian": "isotropic tokens", "text": "text, last block of an untrained model"}[source]
    return _drawn(
        result,
        schemes,
        name=f"load-{source}",
        title=f"Unevenness of the load, {what}",
        caption=f"Standard deviation over mean of the load, at initialisation. {_fixed('n_experts')}",
        axes_names=("N_E", "load, std / mean"),
        ticks=sorted({row.n_experts for row in rows}),
        log_y=True,
    )


def _correlation_plot(result: StudyResult) -> list[Plot]:
    rows = pick(along(result, "k"), init="shared", selector="free")
    sources = {"gaussian": "isotropic", "text": "text"}
    return _drawn(
        result,
        [_series(pick(rows, input=s), "k", "norm_correlation", sources[s], index) for index, s in enumerate(sources)],
        name="correlation-k",
        title="Do longer selector rows get more tokens?",
        caption="Correlation over experts of load and row norm, rows drawn freely. The sign is to change at "
        f"K = N_E / 2. {_fixed('k')}",
        axes_names=("K", "correlation"),
        ticks=sorted({row.k for row in rows}),
        log_y=False,
    )


def _series(rows: Sequence[StartRow], axis: str, key: str, label: str, index: int) -> _Series:
    points = ((float(getattr(row, axis)), row.predicted.get(key)) for row in rows)
    wanted = [(x, y) for x, y in points if y is not None]
    line = Line(label=label, x=[x for x, _ in wanted], y=[y for _, y in wanted], style=pointed_style(index))
    ranges = ((float(getattr(row, axis)), row.measured.get(key)) for row in rows)
    measured = [(x, *found) for x, found in ranges if found is not None]
    return _Series(line, measured)


def _fixed(axis: str) -> str:
    return f"Lines: predicted; markers: median and range over seeds. Only {AXES[axis]} varies."


_PROBES = {
    "load_entropy": ("Evenness of the load", "load entropy / log N_E"),
    "largest_over_mean": ("The busiest expert", "largest / mean load"),
    "norm": ("Growth of the selector's rows", "mean row norm"),
    "interference": ("Interference between experts", "share of squared gradient"),
}


def _probed(result: StudyResult) -> list[str]:
    """Interference is 0 for every sigmoid; only the competition study draws it."""
    return [key for key in _PROBES if key != "interference" or result.kind == "study-competition"]


def _probe_plot(result: StudyResult, key: str) -> list[Plot]:
    title, name = _PROBES[key]
    entries = []
    for index, variant in enumerate(result.variants):
        if variant.runs:
            by_step: dict[int, list[float]] = {}
            for run in variant.runs:
                for probe in run.probes:
                    by_step.setdefault(probe.step, []).append(getattr(probe, key))
            steps = sorted(by_step)
            y = [statistics.fmean(by_step[step]) for step in steps]
            line = Line(label=variant.name, x=[float(s) for s in steps], y=y, style=pointed_style(index))
            entries.append(_Series(line, []))
    return _drawn(
        result,
        entries,
        name=key.replace("_", "-"),
        title=title,
        caption=f"{name} over training steps; means over layers and seeds.",
        axes_names=("step", name),
        ticks=None,
        log_y=False,
    )


def _drawn(
    result: StudyResult,
    series: Sequence[_Series],
    *,
    name: str,
    title: str,
    caption: str,
    axes_names: tuple[str, str],
    ticks: Sequence[int] | None,
    log_y: bool,
) -> list[Plot]:
    """One drawing, none while nothing of it is measured; the axis of sizes is logarithmic, that of steps is not."""
    if not any(entry.line.x or entry.points for entry in series):
        return []
    name = f"{result.kind}-{name}"
    with drawing(WIDTH, HEIGHT) as (figure, axes):
        for entry in series:
            _draw(axes, entry)
        if ticks is not None:
            size_axis(axes, ticks)
        if log_y:
            _log_axis(axes, [y for entry in series for y in entry.line.y])
        axes.set_xlabel(axes_names[0])
        axes.set_ylabel(axes_names[1])
        label_ends(axes, [entry.line for entry in series])
        return [finished(figure, name=name, title=title, caption=caption)]


def _draw(axes: Axes, series: _Series) -> None:
    """A line alone has markers; a prediction leaves them to the measurements."""
    line, style = series.line, series.line.style
    if not series.points:
        axes.plot(line.x, line.y, **style)
        return
    axes.plot(line.x, line.y, color=style["color"], linestyle=style["linestyle"], linewidth=1.0)
    x, middle, low, high = (list(values) for values in zip(*series.points, strict=True))
    spread = [[m - v for m, v in zip(middle, low, strict=True)], [v - m for m, v in zip(middle, high, strict=True)]]
    axes.errorbar(x, middle, yerr=spread, color=style["color"], marker=style["marker"], linestyle="none", elinewidth=1.0)


def _log_axis(axes: Axes, values: Sequence[float]) -> None:
    """Ticks at 1, 2 and 5 where the values span less than two decades, else at powers of ten."""
    positive = [y for y in values if y > 0]
    narrow = bool(positive) and math.log10(max(positive) / min(positive)) < 2
    log_heights(axes, form=".10g", ticks=(1, 2, 5) if narrow else (1,))
