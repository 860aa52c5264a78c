"""The paper's figures 1 to 11, drawn from finished runs or measured by the benchmark: `sparseffn reproduce figure`.

Beside each stand the paper's statement and, in words with numbers, what was measured here: in the terminal, in `figures.md`
and in `reproduced.json`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from sparseffn.cli.analyze import analyzed
from sparseffn.cli.bench import measure_figures
from sparseffn.cli.bench_settings import BenchFigures
from sparseffn.cli.launched import led
from sparseffn.cli.output import can_draw, check_out, print_files, print_json, use_machine
from sparseffn.cli.reproduce_settings import ReproduceFigure
from sparseffn.ops import requested_backend
from sparseffn.paper.figure_runs import Reproduced, reproduce_figures
from sparseffn.paper.statements import source
from sparseffn.report.analysis_plots import active_channels_plot, pairs_plot
from sparseffn.report.bench_plots import figure_plots
from sparseffn.report.paper_plots import shares_panels, shares_plot
from sparseffn.report.paper_report import figures_markdown
from sparseffn.report.plotting import Plot, write_plots
from sparseffn.results.bench_result import LayerSettings
from sparseffn.results.figures_result import FiguresOfPaper, ReproducedFigure
from sparseffn.storage import write_json, write_text


@led
def figures(settings: ReproduceFigure) -> int:
    """Draw figures of the paper; one that lacks its run beside one that has it is listed as not drawn, with the reason.

    Raises:
        UserError: no such figure; no run that any of the figures can be drawn from, which is found before anything is
            measured.
    """
    device = use_machine(settings)
    check_out(settings.out)
    out, draws = Path(settings.out), can_draw()
    # As many rounds as in `sparseffn bench figures`, so that either goes on where the other ended.
    timed = LayerSettings(
        tokens=(settings.tokens,), rounds=BenchFigures.rounds, backends=(requested_backend(),), device=str(device)
    )
    reproduced = reproduce_figures(
        settings.names,
        settings.from_,
        lambda folder, splits: analyzed(folder, settings, splits, settings.max_tokens, device),
        lambda numbers: measure_figures(numbers, timed, out / "figures.json", settings.time_limit),
    )
    result = FiguresOfPaper(source=source(), figures=[_written(figure, out, draws=draws) for figure in reproduced])
    write_json(out / "reproduced.json", result)
    write_text(out / "figures.md", figures_markdown(result))
    if settings.json:
        print_json(result)
        return 0
    for figure in result.figures:
        print(f"{figure.name}\n  paper: {figure.statement}")
        for words in figure.measured:
            print(f"  here:  {words}")
        for file in figure.files:
            if file.endswith(".png"):
                print(f"  png:   {(out / file).resolve().as_uri()}")
        if figure.not_drawn:
            print(f"  not drawn: {figure.not_drawn}")
        print()
    print_files([out / "figures.md"])
    return 0


def _written(figure: Reproduced, out: Path, *, draws: bool) -> ReproducedFigure:
    """A figure with its drawings in the folder."""
    plots = _plots(figure) if figure.lacking is None and draws else []
    reason = figure.lacking or ("nothing was measured" if draws else "matplotlib is not installed")
    return ReproducedFigure(
        name=figure.name,
        statement=figure.statement.statement,
        measured=figure.words,
        runs=list(figure.runs),
        files=[path.name for path in write_plots(plots, out)],
        captions=[plot.caption for plot in plots],
        not_drawn=None if plots else reason,
    )


def _plots(figure: Reproduced) -> list[Plot]:
    match figure.statement.shows:
        case "bench":
            assert figure.bench is not None, "a figure of time and memory was measured"
            return figure_plots(figure.bench, figure.statement.number)
        case "active":
            return _named(figure.name, [active_channels_plot(a, label=label) for label, a in figure.runs.items()])
        case "cooccurrence":
            drawn = [pairs_plot(a, figure.layers[label], label=label) for label, a in figure.runs.items()]
            return _named(figure.name, drawn)
        case "shares":
            return [shares_plot(figure.runs, next(iter(figure.layers.values())), name=figure.name)]
        case "shares-all":
            return [shares_panels(figure.runs, name=figure.name)]


def _named(name: str, plots: list[Plot]) -> list[Plot]:
    """A drawing of each run, named after the figure and, where there are several, numbered."""
    names = [name] if len(plots) == 1 else [f"{name}-{number}" for number in range(1, len(plots) + 1)]
    return [
        dataclasses.replace(plot, name=new, caption=f"{plot.title}. {plot.caption}")
        for new, plot in zip(names, plots, strict=True)
    ]
