"""What changes while the runs of the evidence train: losses of an experiment's candidates, loads of the studies' variants."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import msgspec

from sparseffn.report.plotting import Line, Plot, line_plot, pointed_style
from sparseffn.results.experiment_result import ExperimentResult
from sparseffn.results.study_result import StudyResult, Variant
from sparseffn.stats import paired

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Course(msgspec.Struct, frozen=True, kw_only=True):
    """A quantity over steps, a mean over seeds."""

    label: str
    steps: list[int]
    values: list[float]
    n_seeds: int


def loss_courses(result: ExperimentResult) -> list[Course]:
    """Validation loss in bits, over the seeds that every candidate with a run has; none without such a seed."""
    curves = {
        one.name: {run.seed: run.curve for run in result.runs if run.candidate == one.name and run.curve}
        for one in result.candidates
    }
    curves = {name: by_seed for name, by_seed in curves.items() if by_seed}
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in curves.values()))) if curves else []
    courses = []
    for name, by_seed in curves.items():
        if seeds:
            steps = [step for step, _ in by_seed[seeds[0]]]
            values = [statistics.fmean(by_seed[seed][i][1] for seed in seeds) / math.log(2) for i in range(len(steps))]
            courses.append(Course(label=name, steps=steps, values=values, n_seeds=len(seeds)))
    return courses


def load_courses(results: Sequence[StudyResult]) -> list[Course]:
    """Load entropy less that of the first variant of the study, paired by seed."""
    courses = []
    for result in results:
        first, *others = result.variants
        for variant in others:
            steps = sorted({probe.step for run in variant.runs for probe in run.probes})
            gaps = [paired(_entropies(variant, step), _entropies(first, step)) for step in steps]
            if gaps and gaps[0]:
                means = [statistics.fmean(gap) for gap in gaps]
                courses.append(Course(label=variant.name, steps=steps, values=means, n_seeds=len(gaps[0])))
    return courses


def collapse_courses(result: ExperimentResult) -> list[Course]:
    """Load entropy of the most uneven layer, over the seeds that every candidate has; none without such a seed."""
    loads = {
        one.name: {run.seed: run.loads for run in result.runs if run.candidate == one.name and run.loads}
        for one in result.candidates
    }
    seeds = sorted(set.intersection(*map(set, loads.values()))) if loads else []
    courses = []
    for name, by_seed in loads.items() if seeds else ():
        lowest = [[min(values) for values in zip(*(one.entropy for one in by_seed[seed]), strict=True)] for seed in seeds]
        means = [statistics.fmean(values) for values in zip(*lowest, strict=True)]
        courses.append(Course(label=name, steps=by_seed[seeds[0]][0].steps, values=means, n_seeds=len(seeds)))
    return courses


def _entropies(variant: Variant, step: int) -> dict[int, float]:
    """By seed."""
    return {run.seed: probe.load_entropy for run in variant.runs for probe in run.probes if probe.step == step}


def loss_plot(courses: Sequence[Course], *, name: str, title: str, mark: str = "") -> Plot:
    """Learning curves, from the first point on that is not the start."""
    return _plot(courses, name=name, title=title, mark=mark, height="validation loss, bits", start=1)


def load_plot(courses: Sequence[Course], *, name: str, title: str, mark: str = "") -> Plot:
    """Below 0 is less even than the baseline."""
    return _plot(courses, name=name, title=title, mark=mark, height="load entropy / log N_E, difference", start=0)


def evenness_plot(courses: Sequence[Course], *, name: str, title: str, mark: str = "") -> Plot:
    """1 is even; a run whose line falls below a half has collapsed."""
    return _plot(courses, name=name, title=title, mark=mark, height="load entropy / log N_E, worst layer", start=0)


def _plot(courses: Sequence[Course], *, name: str, title: str, mark: str, height: str, start: int) -> Plot:
    lines = [
        Line(one.label, [float(step) for step in one.steps[start:]], one.values[start:], pointed_style(i))
        for i, one in enumerate(courses)
    ]
    return plot_of_means(lines, courses[0].n_seeds, name=name, title=title, mark=mark, axes_names=("training step", height))


def plot_of_means(
    lines: Sequence[Line],
    n_seeds: int,
    *,
    name: str,
    title: str,
    mark: str,
    axes_names: tuple[str, str],
    adjust: Callable[[Axes], object] = lambda axes: None,
) -> Plot:
    """Lines through means over seeds; ranges, where lines have points, are from the least to the greatest seed."""
    ranges = ", bars from the least to the greatest" if lines[0].points else ""
    caption = f"{title}. Means over {n_seeds} seed{'s' if n_seeds > 1 else ''}{ranges}."
    return line_plot(
        lines,
        name=name,
        title=title,
        caption=caption,
        axes_names=axes_names,
        adjust=adjust,
        description=f"{caption} {mark}",
        pixels=False,
    )
