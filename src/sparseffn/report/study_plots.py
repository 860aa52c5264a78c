"""Drawings of `sparseffn study`, made from its JSON alone: predictions are lines, measurements markers with their range."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sparseffn.report.plotting import Line, Plot, line_plot, pointed_style, size_axis
from sparseffn.results.study_result import StartRow, StudyResult

AXES = {"n_experts": "N_E", "n_layers": "layers", "expert_size": "G", "k": "K"}


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Drawing:
    """A quantity at initialisation over one axis, a line for each scheme."""

    name: str
    title: str
    caption: str
    axis: str
    quantity: str
    height: str
    fixed: Mapping[str, str]
    """Fields that all its rows share."""
    scheme: str
    """The field that tells its lines apart."""
    labels: Mapping[str, str]
    """Values of that field, and how their lines are called."""
    is_log: bool = True


def _output(axis: str) -> _Drawing:
    return _Drawing(
        name=f"output-{axis.replace('_', '-')}",
        title=f"Output variance over {AXES[axis]}",
        caption="Variance of the block's output over the dense block's, at initialisation.",
        axis=axis,
        quantity="output",
        height="variance / dense",
        fixed={"input": "gaussian", "selector": "equal-norm"},
        scheme="init",
        labels={init: init for init in ("shared", "standard", "switch")},
    )


def _load(source: str, what: str) -> _Drawing:
    return _Drawing(
        name=f"load-{source}",
        title=f"Unevenness of the load, {what}",
        caption="Standard deviation over mean of the load, at initialisation.",
        axis="n_experts",
        quantity="variation",
        height="load, std / mean",
        fixed={"input": source, "init": "shared"},
        scheme="selector",
        labels={selector: f"{selector} rows" for selector in ("equal-norm", "free")},
    )


_AT_START = (
    _output("n_experts"),
    _output("n_layers"),
    _load("gaussian", "isotropic tokens"),
    _load("text", "text, last block of an untrained model"),
    _Drawing(
        name="correlation-k",
        title="Do longer selector rows get more tokens?",
        caption="Correlation over experts of load and row norm, rows drawn freely. The sign is to change at K = N_E / 2.",
        axis="k",
        quantity="norm_correlation",
        height="correlation",
        fixed={"init": "shared", "selector": "free"},
        scheme="input",
        labels={"gaussian": "isotropic", "text": "text"},
        is_log=False,
    ),
)
# By quantity of a probe: title, and what stands at the axis. Interference is 0 for every sigmoid, and drawn of softmaxes alone.
_OVER_STEPS = {
    "load_entropy": ("Evenness of the load", "load entropy / log N_E"),
    "largest_over_mean": ("The busiest expert", "largest / mean load"),
    "norm": ("Growth of the selector's rows", "mean row norm"),
    "interference": ("Interference between experts", "share of squared gradient"),
}


def study_plots(result: StudyResult) -> list[Plot]:
    """Every drawing of a study, but of what is not measured yet."""
    plots = [plot for drawn in _AT_START for plot in _start_plot(result, drawn)] if result.start else []
    over_steps = [key for key in _OVER_STEPS if key != "interference" or result.kind == "study-competition"]
    return plots + [plot for key in over_steps for plot in _probe_plot(result, key)]


def _start_plot(result: StudyResult, drawn: _Drawing) -> list[Plot]:
    rows = pick(along(result, drawn.axis), **drawn.fixed)
    lines = [
        _line(pick(rows, **{drawn.scheme: value}), drawn, label, index)
        for index, (value, label) in enumerate(drawn.labels.items())
    ]
    if not any(line.x or line.points for line in lines):
        return []
    sizes, heights = sorted({getattr(row, drawn.axis) for row in rows}), [y for line in lines for y in line.y if y > 0]
    # Labels at 1, 2 and 5 where the values span less than two decades, else at powers of ten.
    ticks = (1, 2, 5) if heights and max(heights) < 100 * min(heights) else (1,)
    return [
        line_plot(
            lines,
            name=f"{result.kind}-{drawn.name}",
            title=drawn.title,
            caption=f"{drawn.caption} Lines: predicted; markers: median and range over seeds. Only {AXES[drawn.axis]} varies.",
            axes_names=(AXES[drawn.axis], drawn.height),
            adjust=lambda axes: size_axis(axes, sizes, log_ticks=ticks if drawn.is_log else None),
        )
    ]


def _line(rows: Sequence[StartRow], drawn: _Drawing, label: str, index: int) -> Line:
    """The prediction, with what was measured of it."""
    x = [float(getattr(row, drawn.axis)) for row in rows]
    predicted = [(x, y) for x, row in zip(x, rows, strict=True) if (y := row.predicted.get(drawn.quantity)) is not None]
    points = [(x, *found) for x, row in zip(x, rows, strict=True) if (found := row.measured.get(drawn.quantity)) is not None]
    return Line(label, [x for x, _ in predicted], [y for _, y in predicted], pointed_style(index), points)


def _probe_plot(result: StudyResult, key: str) -> list[Plot]:
    title, name = _OVER_STEPS[key]
    lines = []
    for index, variant in enumerate(result.variants):
        by_step: dict[int, list[float]] = {}
        for probe in (probe for run in variant.runs for probe in run.probes):
            by_step.setdefault(probe.step, []).append(getattr(probe, key))
        steps = sorted(by_step)
        y = [statistics.fmean(by_step[step]) for step in steps]
        lines += [Line(variant.name, [float(s) for s in steps], y, pointed_style(index))] if steps else []
    if not lines:
        return []
    return [
        line_plot(
            lines,
            name=f"{result.kind}-{key.replace('_', '-')}",
            title=title,
            caption=f"{name} over training steps; means over layers and seeds.",
            axes_names=("step", name),
        )
    ]
