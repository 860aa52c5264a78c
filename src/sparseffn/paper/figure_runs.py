"""The paper's figures 1 to 11: which finished runs each is drawn from, what they show, in words beside the paper's statement.

    found = reproduce_figures(("fig3", "fig9"), analyses, lambda numbers: bench_figures(numbers, ...))

Figures 1 and 3 to 7 need finished runs, 2 and 8 to 11 are measured. A figure that lacks its run beside one that has it says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sparseffn.analysis.run import finished_run
from sparseffn.data import Split
from sparseffn.errors import UserError, unknown_name
from sparseffn.ffn import FFNConfig
from sparseffn.paper.statements import Statement, active_words, bench_words, pair_words, share_words, statements
from sparseffn.results.analysis_result import AnalysisResult
from sparseffn.results.bench_result import FiguresResult
from sparseffn.training import RunSettings

FIGURE_NAMES: tuple[str, ...] = tuple(f"fig{number}" for number in range(1, 12))

Analyze = Callable[[str, tuple[Split, ...]], AnalysisResult]
"""Analyses the run of a folder on some splits."""


@dataclass(frozen=True, kw_only=True)
class Reproduced:
    """A figure with what was measured for it."""

    name: str
    statement: Statement
    words: list[str] = field(default_factory=list)
    """What was measured; empty where it lacks its run."""
    runs: Mapping[str, AnalysisResult] = field(default_factory=dict)
    """By label."""
    layers: Mapping[str, int] = field(default_factory=dict)
    """The layer of each run that is shown; empty where all are."""
    bench: FiguresResult | None = None
    lacking: str | None = None
    """Which run is lacking."""


def reproduce_figures(
    names: Sequence[str],
    folders: Sequence[str],
    analyze: Analyze,
    measure: Callable[[list[int]], FiguresResult],
) -> list[Reproduced]:
    """Measure figures, in their order.

    Args:
        names: of `FIGURE_NAMES`.
        folders: of finished runs.
        analyze: called once for each run and choice of splits.
        measure: called once with the numbers of the figures of time and memory, as they share points and a time limit.

    Raises:
        UserError: no such figure; no run that any of the figures can be drawn from, which is found before anything is measured.
    """
    for name in names:
        if name not in FIGURE_NAMES:
            raise unknown_name("figure", name, FIGURE_NAMES)
    names = [name for name in FIGURE_NAMES if name in names]
    runs = _Runs(folders, analyze)
    chosen, lacking = runs.choose(names)
    numbers = [statements()[name].number for name in names if statements()[name].shows == "bench"]
    bench = measure(numbers) if numbers else None
    return [
        Reproduced(name=name, statement=statements()[name], lacking=lacking[name])
        if name in lacking
        else _reproduced(name, runs, chosen.get(name, []), bench)
        for name in names
    ]


class _Runs:
    """The runs that figures may be drawn from, analysed when first needed."""

    def __init__(self, folders: Sequence[str], analyze: Analyze) -> None:
        found = {folder: RunSettings.read(finished_run(folder)) for folder in dict.fromkeys(folders)}
        labels = _labels({folder: settings.model.ffn.name for folder, settings in found.items()})
        self.folders = {labels[folder]: folder for folder in found}
        self.settings = {labels[folder]: settings for folder, settings in found.items()}
        self.analyze = analyze
        self._done: dict[tuple[str, tuple[Split, ...]], AnalysisResult] = {}

    def choose(self, names: Sequence[str]) -> tuple[dict[str, list[str]], dict[str, str]]:
        """Labels of the runs that each figure is drawn from, and why there are none for the others; those of time need none.

        Raises:
            UserError: none of the figures has what it needs.
        """
        chosen, lacking = {}, {}
        for name in names:
            if statements()[name].shows != "bench":
                try:
                    chosen[name] = self._choose(name, statements()[name])
                except UserError as error:
                    lacking[name] = str(error)
        if len(lacking) == len(names):
            raise UserError(lacking[names[0]])
        return chosen, lacking

    def _choose(self, name: str, statement: Statement) -> list[str]:
        if statement.shows == "active":
            dense = self._of(name, "of the dense block", "dense", lambda ffn: ffn.name == "dense")
            settings = [(label, self.settings[label]) for label in dense]
            wanted = statement.corpus, statement.d_model
            return [label for label, found in settings if (found.corpus, found.model.d_model) == wanted] or dense
        if statement.shows == "cooccurrence":
            pairs = self._of(name, "of a mixture that selects several experts", "sigma-moe", _selects_several)
            return [label for label in pairs if self.settings[label].model.ffn.name == "sigma-moe"] or pairs
        return self._of(name, "of a mixture of experts", "sigma-moe", lambda ffn: ffn.unit == "experts")

    def _of(self, name: str, kind: str, example: str, suits: Callable[[FFNConfig], bool]) -> list[str]:
        found = [label for label, settings in self.settings.items() if suits(settings.model.ffn)]
        if not found:
            raise UserError(
                f"`--from` must name a finished run {kind} for {name}; got {', '.join(self.settings) or 'no run'}; "
                f"fix: sparseffn train --method {example} --out RUN, then --from RUN"
            )
        return found

    def analyses(self, labels: Sequence[str], splits: tuple[Split, ...]) -> dict[str, AnalysisResult]:
        for label in labels:
            if (label, splits) not in self._done:
                self._done[label, splits] = self.analyze(self.folders[label], splits)
        return {label: self._done[label, splits] for label in labels}


def _selects_several(ffn: FFNConfig) -> bool:
    return ffn.unit == "experts" and getattr(ffn, "n_selected", 1) > 1


def _labels(methods: Mapping[str, str]) -> dict[str, str]:
    """A label for each folder: its method where that tells it from the others, else with the folder's name or place."""
    labels = {}
    for folder, method in methods.items():
        label = method if list(methods.values()).count(method) == 1 else f"{method} {Path(folder).resolve().name}"
        while label in labels.values():
            label += "'"
        labels[folder] = label
    return labels


def _reproduced(name: str, source: _Runs, labels: Sequence[str], bench: FiguresResult | None) -> Reproduced:
    statement = statements()[name]
    # The paper counts active channels over validation and test, everything else on validation.
    splits: tuple[Split, ...] = ("valid", "test") if statement.shows == "active" else ("valid",)
    runs, layers = source.analyses(labels, splits), {}
    match statement.shows:
        case "bench":
            assert bench is not None, "measured, as a figure of time was asked for"
            words = bench_words(bench, statement.number)
        case "active":
            words = [active_words(statement, label, analysis) for label, analysis in runs.items()]
        case "cooccurrence":
            layers = {label: _layer(statement.layer, analysis) for label, analysis in runs.items()}
            words = [pair_words(label, analysis, layers[label]) for label, analysis in runs.items()]
        case "shares":
            layers = dict.fromkeys(runs, min(len(analysis.usage) for analysis in runs.values()) // 2)
            words = share_words(statement, runs, next(iter(layers.values())))
        case "shares-all":
            words = share_words(statement, runs, None)
    shown = bench if statement.shows == "bench" else None
    return Reproduced(name=name, statement=statement, words=words, runs=runs, layers=layers, bench=shown)


def _layer(wanted: int, analysis: AnalysisResult) -> int:
    """The paper's layer where the model has it, else the middle one."""
    n_layers = len(analysis.usage)
    return wanted if wanted < n_layers else n_layers // 2
