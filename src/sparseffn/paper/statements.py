"""The paper's statements on its figures, and in words what was measured here; the source has no numbers to set beside."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Mapping
from functools import cache
from importlib import resources
from typing import Any, Literal

import msgspec

from sparseffn.results.analysis_result import AnalysisResult
from sparseffn.results.bench_result import FigureLayer, FiguresResult


class Statement(msgspec.Struct, frozen=True, kw_only=True):
    """What the paper says of a figure."""

    shows: Literal["active", "shares", "shares-all", "cooccurrence", "bench"]
    """How it is drawn here; all but `bench` from finished runs."""
    statement: str
    number: int = 0
    """Of a figure of time and memory."""
    corpus: str = ""
    d_model: int = 0
    """Corpus and width of the paper's model, where it shows one."""
    below: float = 1.0
    """The bound on active channels, as a fraction."""
    bound: str = ""
    """The same as the paper has it."""
    collapse: tuple[str, ...] = ()
    """Methods that are said to collapse."""
    layer: int = 0


@cache
def statements() -> Mapping[str, Statement]:
    """The eleven statements by figure, `fig1` to `fig11`."""
    return {name: msgspec.convert(found, Statement) for name, found in _file().items() if name != "source"}


def source() -> str:
    """Of the statements."""
    return _file()["source"]


@cache
def _file() -> Mapping[str, Any]:
    return tomllib.loads(resources.files("sparseffn.paper").joinpath("statements.toml").read_text(encoding="utf-8"))


def active_words(statement: Statement, label: str, analysis: AnalysisResult) -> str:
    """Active channels of one dense run against the statement's bound."""
    layers = analysis.active
    shares = [layer.mean / layer.total for layer in layers]
    top, low = shares.index(max(shares)), shares.index(min(shares))
    above = [i for i, share in enumerate(shares) if share >= statement.below]
    bound = statement.bound
    bound += "" if bound.endswith("%") else f", {statement.below:.1%}"
    verdict = (
        f"not below the paper's bound ({bound}) in {len(above)} of {len(layers)} layers"
        if above
        else f"below the paper's bound ({bound}) in every layer"
    )
    return (
        f"{_run(label, analysis)}: at most {layers[top].mean:,.0f} of {layers[top].total:,} channels active "
        f"({shares[top]:.1%}, layer {top}), at least {shares[low]:.1%} (layer {low}); {verdict}."
    )


def share_words(statement: Statement, runs: Mapping[str, AnalysisResult], layer: int | None) -> list[str]:
    """Evenness of each run's selection weight, in one layer or, for None, in the least even one."""
    words = []
    for label, analysis in runs.items():
        entropies = [load.weight_entropy for load in analysis.load]
        at = entropies.index(min(entropies)) if layer is None else min(layer, len(entropies) - 1)
        usage, load = analysis.usage[at], analysis.load[at]
        which = f"in its least even layer, {at}" if layer is None else f"in layer {at}"
        words.append(
            f"{_run(label, analysis)}: {which}, the most used expert takes {usage.share[0] / usage.uniform:.1f} times an "
            f"even share; dead (selected under 1% of the mean): {load.n_dead} of {load.n_units}; entropy of the "
            f"weight {load.weight_entropy:.3f} of 1."
        )
    methods = {analysis.run.method for analysis in runs.values()}
    absent = [method for method in statement.collapse if method not in methods]
    if absent:
        words.append(f"No run of {' or '.join(absent)} was given: nothing is said of its collapse.")
    return [*words, *_differences(runs)]


def _differences(runs: Mapping[str, AnalysisResult]) -> list[str]:
    """What makes runs in one picture unlike each other beside their method."""
    lines = []
    for key, what in (("corpus", "corpora"), ("steps", "numbers of steps"), ("d_model", "widths")):
        found = {getattr(analysis.run, key) for analysis in runs.values()}
        if len(found) > 1:
            lines.append(f"The runs are of different {what}: {', '.join(sorted(map(str, found)))}.")
    return lines


def pair_words(label: str, analysis: AnalysisResult, layer: int) -> str:
    """How richly a layer's experts are combined."""
    matrix = analysis.cooccurrence[layer]
    assert matrix is not None, "a run of a method that selects several experts"
    strongest, row, column = max((value, i, j) for i, line in enumerate(matrix) for j, value in enumerate(line))
    used = [line for line in matrix if sum(line) > 0]
    partners = [math.exp(-sum(v * math.log(v) for v in line if v > 0)) for line in used]
    mean = sum(partners) / max(len(partners), 1)
    return (
        f"{_run(label, analysis)}, N_E = {len(matrix)}, layer {layer}: the strongest pairing takes "
        f"{strongest:.1%} of its row (expert {row} with {column}; even would be {1 / max(len(matrix) - 1, 1):.1%}); an expert "
        f"goes with {mean:.1f} of {len(matrix) - 1} others (exponential of the row's entropy, mean over experts)."
    )


def bench_words(result: FiguresResult, number: int) -> list[str]:
    """Time and memory of one figure of the benchmark: the mixture against the dense block, and how both grow."""
    points = [point for point in result.points if point.figure == number]
    left = sum(entry.figure == number for entry in result.left_out)
    if not points:
        return [f"Nothing was measured: {left} points fit neither the time limit nor half of the memory."]
    first, last = points[0], points[-1]
    name = result.sweeps[str(number)].variable
    measures: Mapping[str, Callable[[FigureLayer], float]] = {
        "Time": lambda layer: layer.training.median_s,
        "Memory": lambda layer: layer.memory_bytes,
    }
    words = []
    for what, value in measures.items():
        dense, moe = ([value(point.layers[label]) for point in (first, last)] for label in ("dense", "sigma-moe"))
        text = f"{what} of sigma-MoE over the dense block: {_times(moe[0] / dense[0])}"
        if len(points) > 1:
            text += (
                f" to {_times(moe[1] / dense[1])} for {name} {first.value:,} to {last.value:,}; over these "
                f"{last.value / first.value:g} times the dense block's grows {dense[1] / dense[0]:.1f} times, sigma-MoE's "
                f"{moe[1] / moe[0]:.1f} times."
            )
        else:
            text += f" at {name} {first.value:,}."
        words.append(text)
    words.append(
        f"Measured with {result.settings.tokens:,} tokens, {result.settings.dtype}, {result.environment.threads} threads"
        + (f"; {left} point{'s' if left > 1 else ''} did not fit the time limit or the memory." if left else ".")
    )
    return words


def _times(ratio: float) -> str:
    return f"{ratio:.{2 if ratio >= 0.1 else 3}f}\u00d7"


def _run(label: str, analysis: AnalysisResult) -> str:
    """A run in words: what it is and how far from the paper's."""
    run = analysis.run
    size = f"{run.params / 1e6:.2f} M" if run.params >= 1e5 else f"{run.params / 1e3:.1f} k"
    return f"{label} ({size}, {run.corpus}, {run.steps:,} steps)"
