"""`analyze`: what a finished run's feedforward blocks do; `study`: why this selector and this initialisation."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from sparseffn.analysis import analyze_run
from sparseffn.analysis.run import finished_run
from sparseffn.cli.launched import led
from sparseffn.cli.output import Progress, can_draw, check_out, check_seeds, log, parse_duration, show, use_machine
from sparseffn.cli.run_settings import Analyze, Study
from sparseffn.cli.settings import Places
from sparseffn.data import Split
from sparseffn.paper.study import StudySettings, study
from sparseffn.report.analysis_plots import analysis_plots
from sparseffn.report.analysis_report import analysis_tables, facts_line
from sparseffn.report.bench_report import machine_line
from sparseffn.report.plotting import write_plots
from sparseffn.report.study_report import study_tables, write_study
from sparseffn.results.analysis_result import AnalysisResult
from sparseffn.storage import write_json
from sparseffn.training import load_run_corpus

# Seconds between lines of progress.
_LOG_EVERY = 15.0


def analyze(settings: Analyze) -> int:
    """Analyse a run, write everything, print the tables."""
    device = use_machine(settings)
    out = Path(settings.run) / "analysis" if settings.out is None else Path(settings.out)
    finished_run(settings.run)
    check_out(out)
    splits: Sequence[Split] = ("valid", "test") if settings.split == "both" else (settings.split,)
    analysis = analyzed(settings.run, settings, splits, settings.max_tokens, device)
    written = [out / "analysis.json"]
    write_json(written[0], analysis)
    if can_draw():
        written += write_plots(analysis_plots(analysis), out)
    drawn_once = [path for path in written if path.suffix != ".svg"]
    return show(analysis, settings, analysis_tables(analysis), facts_line(analysis), drawn_once)


def analyzed(
    folder: str, places: Places, splits: Sequence[Split], max_tokens: int | None, device: torch.device
) -> AnalysisResult:
    """The analysis of a run folder; reports its progress. `places` say where its corpus may be."""
    corpus = load_run_corpus(finished_run(folder).path, data_dir=places.data_dir, cache_dir=places.cache_dir)
    logged = [time.monotonic()]

    def on_progress(n_done: int, n_tokens: int) -> None:
        if time.monotonic() - logged[0] >= _LOG_EVERY:
            logged[0] = time.monotonic()
            log(f"{folder}: {n_done:,} of {n_tokens:,} tokens")

    return analyze_run(folder, corpus, device=device, splits=splits, max_tokens=max_tokens, on_progress=on_progress)


@led
def study_selectors(settings: Study) -> int:
    """Measure what is missing, write the tables, the page and the figures, print the tables."""
    device = use_machine(settings)
    check_out(settings.out)
    check_seeds(settings.seeds)
    wanted = StudySettings(
        study=settings.study,
        corpus=settings.corpus,
        data_dir=settings.data_dir,
        cache_dir=settings.cache_dir,
        n_seeds=settings.seeds,
        budget_s=None if settings.budget is None else parse_duration(settings.budget),
        device=str(device),
    )
    with Progress() as progress:
        result = study(wanted, settings.out, progress=progress)
    written = write_study(result, Path(settings.out), drawn=can_draw())
    return show(result, settings, study_tables(result).values(), machine_line(result.environment, timed=False), written)
