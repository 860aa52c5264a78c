"""`sparseffn study init|competition|balance`: why this selector, why this initialisation; see docs/why-this-selector.md.

Measurements at initialisation go to `OUT/start/SIZE.json`, trainings to `OUT/runs/METHOD/seed-N`, the outcome to
`OUT/study-NAME.json`, which the report reads. A call works until its budget is used up; the same call goes on, and a result
that lacks runs names them.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from sparseffn.bench.machine import measured_on
from sparseffn.comparison.job import NoProgress, Progress
from sparseffn.comparison.matched import MethodChoice
from sparseffn.data import load_corpus
from sparseffn.devices import find_device
from sparseffn.errors import UserError
from sparseffn.ffn.mixture import TopKMixtureConfig
from sparseffn.models.presets import Preset
from sparseffn.paper.predictions import gate_square, interference_bounds
from sparseffn.paper.study_runs import CPU, StudyScale, Training, block_config, variants
from sparseffn.paper.study_start import Point, measure_point, rounded
from sparseffn.results import study_result as results
from sparseffn.results.bench_result import Environment
from sparseffn.stats import Difference, difference, mean_std
from sparseffn.storage import read, write_json
from sparseffn.training import NonFiniteLossError, RunFolder
from sparseffn.training.journal import StepReport
from sparseffn.training.restore import shortened


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """What a user asks for."""

    study: str
    """init, competition or balance."""
    scale: StudyScale = CPU
    corpus: str = "stdlib"
    data_dir: str | None = None
    cache_dir: str | None = None
    n_seeds: int = 3
    """Trainings of each variant."""
    budget_s: float | None = None
    """Seconds of this call; None until all is done."""
    device: str = "cpu"

    def __post_init__(self) -> None:
        variants(self.study)
        if self.n_seeds < 1:
            raise UserError(f"`seeds` must be at least 1; got {self.n_seeds}; fix: --seeds 3")


class _BudgetUsedError(Exception):
    """Nothing more may be begun."""


def study(settings: StudySettings, out: Path | str, *, progress: Progress | None = None) -> results.StudyResult:
    """Measure what is missing within the budget; returns what `study-NAME.json` holds.

    Raises:
        UserError: the folder is of another scale or corpus, or the budget does not suffice for one measurement.
    """
    job = _Study(settings, Path(out), progress or NoProgress())
    failures: dict[tuple[str, int], str] = {}
    try:
        if settings.study == "init":
            job.start()
        job.train(failures)
    except _BudgetUsedError:
        if not job.n_finished:
            raise UserError(
                f"`budget` must suffice for one measurement or a twelfth of a training; got {settings.budget_s:g}s, in which "
                "none was finished; fix: --budget 1m or more, or leave it out"
            ) from None
        job.progress.log("the budget is used up; the same command goes on")
    outcome = job.outcome(failures)
    write_json(job.out / f"study-{settings.study}.json", outcome)
    return outcome


class _Point(msgspec.Struct, frozen=True):
    """`OUT/start/SIZE.json`."""

    rows: list[results.StartRow]
    environment: Environment | None = None


class _Study:
    """An open study: its folder is claimed for the scale and the corpus; studies and numbers of seeds share it."""

    def __init__(self, settings: StudySettings, out: Path, progress: Progress) -> None:
        self.settings, self.out, self.progress = settings, out, progress
        self.end = time.perf_counter() + (math.inf if settings.budget_s is None else settings.budget_s)
        self.n_finished = 0
        self.device = find_device(settings.device)
        corpus = load_corpus(settings.corpus, data_dir=settings.data_dir, cache_dir=settings.cache_dir)
        RunFolder(out).open({"scale": settings.scale.to_json(), "corpus": corpus.name, "digest": corpus.digest})
        self.corpus = corpus

    def check_time(self, report: StepReport | None = None) -> None:
        """Stop when the budget is used up; a call without a report marks something as finished."""
        if report is None:
            self.n_finished += 1
        if time.perf_counter() >= self.end:
            raise _BudgetUsedError

    def start(self) -> None:
        """Measure every size at initialisation that is not there."""
        scale = self.settings.scale
        for point in scale.grid.points:
            path = self._point_path(point)
            if not path.exists():
                seeds, more = range(scale.start_seeds), range(scale.load_seeds)
                rows = measure_point(point, scale.grid, self.corpus, seeds, self.device, more)
                write_json(path, _Point(rows, measured_on(self.device)))
                self.progress.log(f"at initialisation: {point.name}")
                self.check_time()

    def train(self, failures: dict[tuple[str, int], str]) -> None:
        """Every training that is not there, all variants of a seed before the next seed."""
        runs = self._trainings()
        for position, (name, run) in enumerate(runs):
            if run.outcome() is None:
                show = self.progress.run(name, run.seed, position, len(runs))
                try:
                    run.run(self.device, functools.partial(self._on_progress, show))
                except NonFiniteLossError as error:
                    # A variant that diverges must not cost the others' results.
                    failures[name, run.seed] = str(error)
                self.check_time()

    def _on_progress(self, show: Callable[[StepReport], None], report: StepReport | None) -> None:
        if report is not None:
            show(report)
        self.check_time(report)

    def _trainings(self) -> list[tuple[str, Training]]:
        short = shortened(self.corpus, self.settings.scale.eval_tokens)
        chosen = variants(self.settings.study).items()
        seeds = range(self.settings.n_seeds)
        return [(name, Training(c, seed, self.settings.scale, short, self.out)) for seed in seeds for name, c in chosen]

    def _point_path(self, point: Point) -> Path:
        return self.out / "start" / f"{point.name}.json"

    def outcome(self, failures: Mapping[tuple[str, int], str]) -> results.StudyResult:
        """Everything that is finished, and what is missing."""
        settings, runs = self.settings, [(name, run.seed, run.outcome()) for name, run in self._trainings()]
        rows: list[results.Variant] = []
        for name, choice in variants(settings.study).items():
            own = [outcome for label, _, outcome in runs if label == name and outcome is not None]
            rows.append(_variant(name, choice, settings.scale.preset, own, first=rows[0] if rows else None))
        points = settings.scale.grid.points if settings.study == "init" else []
        fix = "remove the file and run the same command again"
        paths = [self._point_path(point) for point in points]
        measured = [read(path, _Point, fix=fix) for path in paths if path.exists()]
        corpus = ("corpus", "tokenizer", "unit", "vocab_size", "digest", "python_version")
        sizes = {"study": settings.study, "n_seeds": settings.n_seeds, **settings.scale.to_json()}
        return results.StudyResult(
            kind=f"study-{settings.study}",  # pyright: ignore[reportArgumentType]
            environment=measured_on(self.device),
            settings=msgspec.convert(sizes, results.StudySizes),
            variants=rows,
            missing=[
                results.MissingRun(label=name, seed=seed, reason=failures.get((name, seed), "not run yet"))
                for name, seed, outcome in runs
                if outcome is None
            ],
            corpus={key: self.corpus.info[key] for key in corpus if key in self.corpus.info},
            start=[row for point in measured for row in point.rows],
            start_environment=measured[-1].environment if measured else None,
            missing_sizes=[point.name for point in points if not self._point_path(point).exists()],
        )


_OF_A_PROBE = tuple(name for name in results.SelectorProbe.__struct_fields__ if name != "step")


def _variant(
    name: str, choice: MethodChoice, preset: Preset, runs: Sequence[results.StudyRun], *, first: results.Variant | None
) -> results.Variant:
    """A variant's finished runs, their means, and what sets them off from the study's first variant, None where this is it."""
    against = {} if first is None else differences(runs, first.runs)
    return results.Variant(
        name=name,
        method=choice.label,
        predicted=_predicted(choice, preset),
        runs=list(runs),
        valid=mean_std([run.valid for run in runs]),
        test=mean_std([run.test for run in runs]),
        start=_means([run.probes[0] for run in runs]),
        end=_means([run.probes[-1] for run in runs]),
        against_first=against,
    )


def _predicted(choice: MethodChoice, preset: Preset) -> results.Prediction:
    """What the framework says of a variant's gates before the first step; see `predictions`."""
    config = block_config(choice, preset)
    assert isinstance(config, TopKMixtureConfig) and config.gate is not None, "studies train mixtures"
    low, high = interference_bounds(config, config.gate)
    return results.Prediction(gate_square=rounded(gate_square(config, config.gate)), interference=(rounded(low), rounded(high)))


def differences(runs: Sequence[results.StudyRun], base: Sequence[results.StudyRun]) -> dict[str, Difference]:
    """Losses and selectors at the end, paired by seed; empty without a common seed."""
    if not {run.seed for run in runs} & {run.seed for run in base}:
        return {}
    quantities: dict[str, Callable[[results.StudyRun], float]] = {
        "valid": lambda run: run.valid,
        "test": lambda run: run.test,
        **{name: lambda run, name=name: getattr(run.probes[-1], name) for name in results.SELECTOR_QUANTITIES},
    }
    return {
        name: difference({run.seed: of(run) for run in runs}, {run.seed: of(run) for run in base})
        for name, of in quantities.items()
    }


def _means(probes: Sequence[results.SelectorProbe]) -> dict[str, float]:
    if not probes:
        return {}
    return {name: statistics.fmean(getattr(probe, name) for probe in probes) for name in _OF_A_PROBE}
