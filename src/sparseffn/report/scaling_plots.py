"""Loss over the size of the model and over its cost, a line for each method, from the record of an experiment on scaling.

Its candidates are named METHOD, WIDTH. Points are means over the seeds that all candidates have, bars the range of these seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import msgspec

from sparseffn.report import formats
from sparseffn.report.plotting import Line, Plot, pointed_style
from sparseffn.report.training_plots import plot_of_means
from sparseffn.results.experiment_result import ExperimentResult, PlannedCandidate

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class SizeCourse(msgspec.Struct, frozen=True, kw_only=True):
    """A method over sizes."""

    label: str
    points: list[tuple[float, float, float, float]]
    """Size, and mean, least and greatest test loss in bits."""
    n_seeds: int


def over_params(result: ExperimentResult) -> list[SizeCourse]:
    """Loss over parameters of the whole model."""
    return _courses(result, lambda candidate: float(candidate.params))


def over_flops(result: ExperimentResult) -> list[SizeCourse]:
    """Loss over FLOPs of training one token."""
    return _courses(result, lambda candidate: candidate.flops or 0.0)


def _courses(result: ExperimentResult, size: Callable[[PlannedCandidate], float]) -> list[SizeCourse]:
    """Of the widths that are finished; none before a seed is whole."""
    losses = {one.name: {run.seed: run.test for run in result.runs if run.candidate == one.name} for one in result.candidates}
    held = {name: by_seed for name, by_seed in losses.items() if by_seed}
    seeds = sorted(set.intersection(*map(set, held.values()))) if len(held) == len(losses) else []
    methods = dict.fromkeys(one.name.rpartition(", ")[0] for one in result.candidates)
    courses = []
    for method in methods if seeds else ():
        points = []
        for one in result.candidates:
            if one.name.rpartition(", ")[0] == method:
                bits = [losses[one.name][seed] / math.log(2) for seed in seeds]
                points.append((size(one), statistics.fmean(bits), min(bits), max(bits)))
        courses.append(SizeCourse(label=method, points=sorted(points), n_seeds=len(seeds)))
    return courses


def params_plot(courses: Sequence[SizeCourse], *, name: str, title: str, mark: str = "") -> Plot:
    return _plot(courses, name=name, title=title, mark=mark, width="parameters")


def flops_plot(courses: Sequence[SizeCourse], *, name: str, title: str, mark: str = "") -> Plot:
    return _plot(courses, name=name, title=title, mark=mark, width="FLOPs of training one token")


def _plot(courses: Sequence[SizeCourse], *, name: str, title: str, mark: str, width: str) -> Plot:
    lines = []
    for i, one in enumerate(courses):
        x, y, _, _ = (list(values) for values in zip(*one.points, strict=True))
        lines.append(Line(one.label, x, y, pointed_style(i), points=one.points))
    axes_names = (width, "test loss, bits")
    n_seeds = courses[0].n_seeds
    return plot_of_means(lines, n_seeds, name=name, title=title, mark=mark, axes_names=axes_names, adjust=_log_width)


def _log_width(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: formats.count(round(value))))
    axes.xaxis.set_minor_formatter(NullFormatter())
