"""`sparseffn study init|competition|balance`: why this selector, why this initialisation; see docs/why-this-selector.md.

Measurements at initialisation go to `OUT/start/SIZE.json`, trainings to `OUT/runs/METHOD/seed-N`, the outcome to
`OUT/study-NAME.json`, which the report reads. A call works until its budget is spent; the same call goes on, and a result that
lacks runs names them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from sparseffn.bench.machine import head
from sparseffn.comparison.job import Silent, Watcher
from sparseffn.comparison.matched import MethodChoice
from sparseffn.data import Corpus, load_corpus
from sparseffn.errors import UserError
from sparseffn.ffn.mixture import TopKMixtureConfig
from sparseffn.models.presets import Preset
from sparseffn.paper.predictions import gate_square, interference_bounds
from sparseffn.paper.study_runs import CPU, Deadline, Scale, Training, block_config, shortened, variants
from sparseffn.paper.study_start import Point, measure_point, rounded
from sparseffn.storage import Kind, read_fields, write_json
from sparseffn.training import NonFiniteLossError, RunFolder
from sparseffn.training.loop import StepReport


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """What a user asks for."""

    study: str
    """init, competition or balance."""
    scale: Scale = CPU
    corpus: str = "stdlib"
    data_dir: str | None = None
    cache_dir: str | None = None
    n_seeds: int = 3
    """Trainings of each variant."""
    budget_s: float | None = None
    """Seconds of this call; None until all is done."""

    def __post_init__(self) -> None:
        variants(self.study)
        if self.n_seeds < 1:
            raise UserError(f"`seeds` must be at least 1; got {self.n_seeds}; fix: --seeds 3")


class _Spent(Exception):
    """The budget is."""


def study(settings: StudySettings, out: Path | str, *, watcher: Watcher | None = None) -> dict[str, Any]:
    """Measure what is missing within the budget; returns what `study-NAME.json` holds.

    Raises:
        UserError: the folder is of another scale or corpus, or the budget does not suffice for one measurement.
    """
    job = _Job.open(settings, Path(out), watcher or Silent())
    failures: dict[tuple[str, int], str] = {}
    try:
        if settings.study == "init":
            job.start()
        job.train(failures)
    except _Spent:
        if not job.deadline.finished:
            raise UserError(
                f"`budget` must suffice for one measurement or a twelfth of a training; got {settings.budget_s:g}s, in which "
                "none was finished; fix: --budget 1m or more, or leave it out"
            ) from None
        job.watcher.say("the budget is spent; the same command goes on")
    outcome = job.outcome(failures)
    write_json(job.out / f"study-{settings.study}.json", outcome)
    return outcome


@dataclass(frozen=True)
class _Job:
    """An open study."""

    settings: StudySettings
    out: Path
    corpus: Corpus
    watcher: Watcher
    deadline: Deadline

    @classmethod
    def open(cls, settings: StudySettings, out: Path, watcher: Watcher) -> _Job:
        """Claim the folder for the scale and the corpus; studies and numbers of seeds share it."""
        deadline = Deadline(settings.budget_s)
        corpus = load_corpus(settings.corpus, data_dir=settings.data_dir, cache_dir=settings.cache_dir)
        RunFolder(out).open({"scale": settings.scale.to_json(), "corpus": corpus.name, "digest": corpus.digest})
        return cls(settings, out, corpus, watcher, deadline)

    def check_time(self, report: StepReport | None = None) -> None:
        """Stop when the budget is spent; a call without a report marks something as finished."""
        if report is None:
            self.deadline.finished += 1
        if self.deadline.passed:
            raise _Spent

    def start(self) -> None:
        """Every size at initialisation that is not there."""
        scale = self.settings.scale
        for point in scale.grid.points:
            path = self._point_path(point)
            if not path.exists():
                rows = measure_point(point, scale.grid, self.corpus, range(scale.start_seeds))
                write_json(path, {"rows": rows})
                self.watcher.say(f"at initialisation: {point.name}")
                self.check_time()

    def train(self, failures: dict[tuple[str, int], str]) -> None:
        """Every training that is not there, all variants of a seed before the next seed."""
        runs = self._trainings()
        for position, (name, run) in enumerate(runs):
            if run.outcome() is None:
                try:
                    run.run(self._watch(name, run.seed, position, len(runs)))
                except NonFiniteLossError as error:
                    # A variant that diverges must not cost the others' results.
                    failures[name, run.seed] = str(error)
                self.check_time()

    def _watch(self, name: str, seed: int, position: int, n_runs: int) -> Callable[[StepReport | None], None]:
        show = self.watcher.run(name, seed, position, n_runs)

        def on_progress(report: StepReport | None) -> None:
            if report is not None:
                show(report)
            self.check_time(report)

        return on_progress

    def _trainings(self) -> list[tuple[str, Training]]:
        short = shortened(self.corpus, self.settings.scale.eval_tokens)
        chosen = variants(self.settings.study).items()
        seeds = range(self.settings.n_seeds)
        return [(name, Training(c, seed, self.settings.scale, short, self.out)) for seed in seeds for name, c in chosen]

    def _point_path(self, point: Point) -> Path:
        return self.out / "start" / f"{point.name}.json"

    def outcome(self, failures: Mapping[tuple[str, int], str]) -> dict[str, Any]:
        """Everything that is finished, and what is missing."""
        settings, runs = self.settings, self._trainings()
        finished = [(name, outcome) for name, run in runs for outcome in [run.outcome()] if outcome is not None]
        rows = [self._variant(name, choice, finished) for name, choice in variants(settings.study).items()]
        missing = [
            {"label": name, "seed": run.seed, "reason": failures.get((name, run.seed), "not run yet")}
            for name, run in runs
            if run.outcome() is None
        ]
        content: dict[str, Any] = {"variants": rows, "missing": missing, "corpus": _corpus(self.corpus)}
        if settings.study == "init":
            points = settings.scale.grid.points
            paths = [path for path in map(self._point_path, points) if path.exists()]
            fix = "remove the file and run the same command again"
            content["start"] = [row for path in paths for row in read_fields(path, {"rows": Kind.LIST}, fix=fix)["rows"]]
            content["missing_sizes"] = [point.name for point in points if not self._point_path(point).exists()]
        shown = {"study": settings.study, "n_seeds": settings.n_seeds, **settings.scale.to_json()}
        return msgspec.to_builtins(
            {"kind": f"study-{settings.study}", **head(torch.device("cpu")), "settings": shown, **content}
        )

    def _variant(self, name: str, choice: MethodChoice, finished: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
        runs = [outcome for label, outcome in finished if label == name]
        return {"name": name, "method": choice.label, "predicted": predicted(choice, self.settings.scale.preset), "runs": runs}


def predicted(choice: MethodChoice, preset: Preset) -> dict[str, Any]:
    """What the framework says of a variant's gates before the first step; see `analysis.predictions`."""
    config = block_config(choice, preset)
    assert isinstance(config, TopKMixtureConfig) and config.gate is not None, "studies train mixtures that name their gate"
    low, high = interference_bounds(config, config.gate)
    return {"gate_square": rounded(gate_square(config, config.gate)), "interference": [rounded(low), rounded(high)]}


def _corpus(corpus: Corpus) -> dict[str, Any]:
    """What was read."""
    keys = ("corpus", "tokenizer", "unit", "vocab_size", "digest", "python_version")
    return {key: corpus.info[key] for key in keys if key in corpus.info}
