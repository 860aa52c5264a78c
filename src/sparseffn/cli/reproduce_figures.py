"""The paper's figures 1 to 11, drawn from finished runs or measured by the benchmark: `sparseffn reproduce figure`.

Beside each stand the paper's statement and, in words with numbers, what was measured here: in the terminal, in `figures.md`
and in `reproduced.json`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sparseffn.analysis.run import finished_run
from sparseffn.cli.analyze import analyzed
from sparseffn.cli.bench import measure_figures
from sparseffn.cli.bench_settings import BenchFigures
from sparseffn.cli.output import can_draw, check_out, print_json, use_machine
from sparseffn.cli.reproduce_settings import ReproduceFigure
from sparseffn.data import Split
from sparseffn.errors import UserError, unknown_name
from sparseffn.ffn import FFNConfig
from sparseffn.ops import requested_backend
from sparseffn.report.analysis_plots import active_channels_plot, pairs_plot
from sparseffn.report.bench_plots import figure_plots
from sparseffn.report.paper_plots import shares_panels, shares_plot
from sparseffn.report.plotting import Plot, write_plots
from sparseffn.report.statements import active_words, bench_words, markdown, pair_words, share_words, statements
from sparseffn.results.analysis_result import AnalysisResult
from sparseffn.results.bench_result import FiguresResult, LayerSettings
from sparseffn.storage import write_json, write_text
from sparseffn.training import RunSettings

FIGURE_NAMES: tuple[str, ...] = tuple(f"fig{number}" for number in range(1, 12))
"""What `run_figures` takes."""

FORMAT = 1
"""Layout of `reproduced.json`."""

# Runs by label, and what is drawn of them.
Runs = dict[str, AnalysisResult]
Drawn = tuple[list[str], Callable[[], list[Plot]]]


def figures(settings: ReproduceFigure) -> int:
    """Draw figures of the paper.

    Raises:
        UserError: no such figure; no run that any of the figures can be drawn from, which is found before anything is
            measured. A figure that lacks its run beside one that has it is listed as not drawn, with the reason.
    """
    device = use_machine(settings)
    for name in settings.names:
        if name not in FIGURE_NAMES:
            raise unknown_name("figure", name, FIGURE_NAMES)
    names = [name for name in FIGURE_NAMES if name in settings.names]
    check_out(settings.out)
    source = _Source(settings, device)
    chosen, lacking = source.choose(names)
    bench = _benchmarked(names, settings, device)
    out, draws, entries = Path(settings.out), can_draw(), []
    for name in names:
        measured, plots = [], []
        if name not in lacking:
            measured, draw = _run_figure(name, chosen[name], source) if name in chosen else _bench_figure(name, bench)
            plots = draw() if draws else []
        reason = lacking.get(name) or ("nothing was measured" if draws else "matplotlib is not installed")
        entries.append(
            {
                "name": name,
                "statement": statements()[name]["statement"],
                "measured": measured,
                "runs": chosen.get(name, []),
                "files": [path.name for path in write_plots(plots, out)],
                "captions": [plot.caption for plot in plots],
                "not_drawn": None if plots else reason,
            }
        )
    result = {"format": FORMAT, "kind": "paper-figures", "source": statements()["source"], "figures": entries}
    write_json(out / "reproduced.json", result)
    write_text(out / "figures.md", markdown(entries))
    _show(result, out, settings)
    return 0


def _show(result: Mapping[str, Any], out: Path, settings: ReproduceFigure) -> None:
    if settings.json:
        print_json(result)
        return
    for figure in result["figures"]:
        print(f"{figure['name']}\n  paper: {figure['statement']}")
        for words in figure["measured"]:
            print(f"  here:  {words}")
        for file in figure["files"]:
            if file.endswith(".png"):
                print(f"  png:   {(out / file).resolve().as_uri()}")
        if figure["not_drawn"]:
            print(f"  not drawn: {figure['not_drawn']}")
        print()
    print(f"md: {(out / 'figures.md').resolve().as_uri()}")


class _Source:
    """The runs of `--from`: read when first needed, once for each choice of splits."""

    def __init__(self, settings: ReproduceFigure, device: torch.device) -> None:
        folders = list(dict.fromkeys(settings.from_))
        self.given, self.device = settings, device
        runs = {folder: RunSettings.read(finished_run(folder)) for folder in folders}
        labels = _labels({folder: found.model.ffn.name for folder, found in runs.items()})
        self.folders = {labels[folder]: folder for folder in folders}
        self.settings = {labels[folder]: found for folder, found in runs.items()}
        self._done: dict[tuple[str, tuple[Split, ...]], AnalysisResult] = {}

    def choose(self, names: Sequence[str]) -> tuple[dict[str, list[str]], dict[str, str]]:
        """Labels of the runs that each figure is drawn from, and why there are none for the others; those of time need none.

        Raises:
            UserError: none of the figures has what it needs.
        """
        chosen, lacking = {}, {}
        for name in names:
            if statements()[name]["shows"] != "bench":
                try:
                    chosen[name] = self._choose(name)
                except UserError as error:
                    lacking[name] = str(error)
        if len(lacking) == len(names):
            raise UserError(lacking[names[0]])
        return chosen, lacking

    def _choose(self, name: str) -> list[str]:
        """Labels of the runs that a figure is drawn from.

        Raises:
            UserError: none of the runs is of the kind that it needs.
        """
        figure = statements()[name]
        if figure["shows"] == "active":
            dense = self._of(name, "of the dense block", "dense", lambda ffn: ffn.name == "dense")
            published = [label for label in dense if self._is_published(label, figure)]
            return published or dense
        if figure["shows"] == "cooccurrence":
            pairs = self._of(name, "of a mixture that selects several experts", "sigma-moe", _selects_several)
            ours = [label for label in pairs if self.settings[label].model.ffn.name == "sigma-moe"]
            return ours or pairs
        return self._of(name, "of a mixture of experts", "sigma-moe", lambda ffn: ffn.unit == "experts")

    def _of(self, name: str, kind: str, example: str, suits: Callable[[FFNConfig], bool]) -> list[str]:
        found = [label for label, settings in self.settings.items() if suits(settings.model.ffn)]
        if not found:
            raise UserError(
                f"`--from` must name a finished run {kind} for {name}; got {', '.join(self.settings) or 'no run'}; "
                f"fix: sparseffn train --method {example} --out RUN, then --from RUN"
            )
        return found

    def _is_published(self, label: str, figure: Mapping[str, Any]) -> bool:
        """Whether a run is of the figure's corpus and width."""
        settings = self.settings[label]
        return settings.corpus == figure["corpus"] and settings.model.d_model == figure["d_model"]

    def analyses(self, labels: Sequence[str], splits: tuple[Split, ...]) -> Runs:
        """Analyses by label."""
        for label in labels:
            if (label, splits) not in self._done:
                self._done[label, splits] = analyzed(
                    self.folders[label], self.given, splits, self.given.max_tokens, self.device
                )
        return {label: self._done[label, splits] for label in labels}


def _selects_several(ffn: FFNConfig) -> bool:
    """Whether a token has several experts, so that there are pairs."""
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


def _run_figure(name: str, labels: Sequence[str], source: _Source) -> Drawn:
    """Words and plots of a figure that is drawn from runs."""
    figure = statements()[name]
    # The paper counts active channels over validation and test, everything else on validation.
    splits: tuple[Split, ...] = ("valid", "test") if figure["shows"] == "active" else ("valid",)
    runs = source.analyses(labels, splits)
    match figure["shows"]:
        case "active":
            words = [active_words(figure, label, analysis) for label, analysis in runs.items()]
            return words, lambda: _each(name, runs, lambda label, a: active_channels_plot(a, label=label))
        case "cooccurrence":
            layers = {label: _layer(figure["layer"], analysis) for label, analysis in runs.items()}
            words = [pair_words(label, analysis, layers[label]) for label, analysis in runs.items()]
            return words, lambda: _each(name, runs, lambda label, a: pairs_plot(a, layers[label], label=label))
        case "shares":
            layer = min(len(analysis.usage) for analysis in runs.values()) // 2
            return share_words(figure, runs, layer), lambda: [shares_plot(runs, layer, name=name)]
    return share_words(figure, runs, None), lambda: [shares_panels(runs, name=name)]


def _layer(wanted: int, analysis: AnalysisResult) -> int:
    """The paper's layer where the model has it, else the middle one."""
    n_layers = len(analysis.usage)
    return wanted if wanted < n_layers else n_layers // 2


def _each(name: str, runs: Runs, draw: Callable[[str, AnalysisResult], Plot]) -> list[Plot]:
    """A drawing of each run, named after the figure and, where there are several, numbered."""
    plots = [draw(label, analysis) for label, analysis in runs.items()]
    names = [name] if len(plots) == 1 else [f"{name}-{number}" for number in range(1, len(plots) + 1)]
    return [
        dataclasses.replace(plot, name=new, caption=f"{plot.title}. {plot.caption}")
        for new, plot in zip(names, plots, strict=True)
    ]


def _benchmarked(names: Sequence[str], settings: ReproduceFigure, device: torch.device) -> FiguresResult | None:
    """The benchmark of all figures of time and memory at once, as they share points and the time limit; None without any."""
    numbers = [statements()[name]["number"] for name in names if statements()[name]["shows"] == "bench"]
    if not numbers:
        return None
    # As many rounds as in `sparseffn bench figures`, so that either goes on where the other ended.
    timed = LayerSettings(
        tokens=(settings.tokens,),
        rounds=BenchFigures.rounds,
        backends=(requested_backend(),),
        device=str(device),
    )
    return measure_figures(numbers, timed, Path(settings.out) / "figures.json", settings.time_limit)


def _bench_figure(name: str, result: FiguresResult | None) -> Drawn:
    assert result is not None, "a figure of time and memory was measured"
    number = statements()[name]["number"]
    return bench_words(result, number), lambda: figure_plots(result, number)
