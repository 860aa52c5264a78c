"""`sparseffn compare`: parameter-equal models, one method each, on the same data; one table and one page.

    OUT/config.json         the settings that the folder belongs to
    OUT/plan.json           steps of every run, times of a step
    OUT/runs/LABEL/seed-N   a run folder, with usage.json for the first seed
    OUT/layers.json         times of one layer of each method
    OUT/comparison.json     the outcome, which the report reads

Calling it again with the same settings goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from sparseffn.bench.benchmark import time_layers
from sparseffn.comparison.matched import MethodChoice, match_methods
from sparseffn.comparison.outcome import DENSE, LayerTimes, summarize
from sparseffn.comparison.runs import count_usage, run_path
from sparseffn.comparison.schedule import Plan, make_plan
from sparseffn.data import load_corpus
from sparseffn.devices import Precision, find_device
from sparseffn.errors import UserError, unknown_name
from sparseffn.models.presets import get_preset
from sparseffn.results.comparison_result import ComparisonResult
from sparseffn.storage import read, sole_writer, write_json
from sparseffn.training import NonFiniteLossError, RunFolder, TrainConfig, from_preset, load_run_model, train
from sparseffn.training.loop import OnStep

OVERRIDES = ("lr", "batch", "context", "warmup", "clip")
"""Settings of a preset that a user may change."""


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """What a user asks for."""

    methods: tuple[MethodChoice, ...]
    corpus: str = "stdlib"
    tokenizer: str | None = None
    vocab_size: int | None = None
    data_dir: str | None = None
    cache_dir: str | None = None
    preset: str = "tiny"
    seeds: tuple[int, ...] = (0,)
    steps: int | None = None
    """None: the preset's, or what the budget allows."""
    budget_s: float | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    """Training settings that differ from the preset's, of `OVERRIDES`."""
    precision: Precision = "float32"
    device: str = "auto"
    """Where models are trained, evaluated and timed; a comparison may go on on another one."""

    def __post_init__(self) -> None:
        if not self.methods:
            raise UserError("`methods` must name at least one method; got none; fix: --methods dense sigma-moe")
        if self.steps is not None and self.budget_s is not None:
            raise UserError("`steps` and `budget` must not both be given; got both; fix: give one of them")
        if self.steps is not None and self.steps < 1:
            raise UserError(f"`steps` must be at least 1; got {self.steps}; fix: pass a positive number")
        if len(set(self.seeds)) < len(self.seeds) or not self.seeds:
            raise UserError(f"`seeds` must be different from one another; got {list(self.seeds)}; fix: --seeds N")
        for name in self.overrides:
            if name not in OVERRIDES:
                raise unknown_name("setting", name, OVERRIDES)


class Progress(Protocol):
    """Is kept informed of how a comparison goes on."""

    def log(self, text: str) -> None:
        """One line."""

    def run(self, label: str, seed: int, position: int, n_runs: int) -> OnStep:
        """A run begins; what this returns is called after each of its steps."""
        ...


class NoProgress:
    """Informs nobody."""

    def log(self, text: str) -> None:
        """Nothing."""

    def run(self, label: str, seed: int, position: int, n_runs: int) -> OnStep:
        return lambda report: None


def compare(settings: CompareSettings, out: Path | str, *, progress: Progress | None = None) -> ComparisonResult:
    """Train and compare; returns what `comparison.json` holds.

    Args:
        settings: methods, corpus, preset, length, device.
        out: the folder of the comparison; goes on when it holds an unfinished one of the same settings.
        progress: is kept informed.

    Raises:
        UnmatchedError: a method cannot be brought to the dense model's number of parameters.
        UserError: the folder is of another comparison or in use, the budget is too small, or anything that `load_corpus` and
            `train` raise.
    """
    started = time.perf_counter()
    comparison = Comparison(settings, Path(out), progress or NoProgress())
    with sole_writer(comparison.out):
        plan = comparison.plan(started)
        failures = comparison.train(plan)
        layers = comparison.layer_times()
        result = comparison.result(plan, layers, failures)
        write_json(comparison.out / "comparison.json", result)
    return result


class Comparison:
    """An open comparison: its folder, its candidates, its plan, its runs and its outcome."""

    def __init__(self, settings: CompareSettings, out: Path, progress: Progress) -> None:
        """Load and match everything before anything is written."""
        self.settings, self.out, self.progress = settings, out, progress
        self.device = find_device(settings.device)
        self.preset = dataclasses.replace(get_preset(settings.preset), **settings.overrides)
        for seed in settings.seeds:
            # Whatever a budget allows later, settings out of range are refused now.
            self.train_config(settings.steps or self.preset.steps, seed)
        self.corpus = load_corpus(
            settings.corpus,
            tokenizer=settings.tokenizer,
            data_dir=settings.data_dir,
            cache_dir=settings.cache_dir,
            vocab_size=settings.vocab_size,
        )
        self.candidates = match_methods(settings.methods, self.preset, self.corpus.tokenizer.vocab_size)
        for candidate in self.candidates:
            found = candidate.match
            progress.log(f"{candidate.label}: {found.model_params:,} parameters ({found.residual_percent:+.3f}% against dense)")
        RunFolder(out).check(self.identity)

    @property
    def identity(self) -> dict[str, Any]:
        """What the folder belongs to."""
        wanted = self.settings
        precision = {} if wanted.precision == "float32" else {"precision": wanted.precision}
        return {
            "methods": [choice.label for choice in wanted.methods],
            "corpus": wanted.corpus,
            "tokenizer": wanted.tokenizer,
            "vocab_size": wanted.vocab_size,
            "preset": self.preset.name,
            "seeds": list(wanted.seeds),
            "steps": wanted.steps,
            "budget_s": wanted.budget_s,
            # Folders of version 0.1 know no precision.
            "overrides": {**wanted.overrides, **precision},
            "digest": self.corpus.digest,
        }

    def train_config(self, steps: int, seed: int) -> TrainConfig:
        """Hyperparameters of every run; those that `train` would take."""
        return from_preset(self.preset, steps=steps, seed=seed, precision=self.settings.precision)

    def plan(self, started: float) -> Plan:
        """The stored plan, or a new one.

        Args:
            started: when the comparison began, in seconds of `time.perf_counter`.
        """
        path = self.out / "plan.json"
        if path.exists():
            plan = read(path, Plan, fix="restore the file or choose another --out")
            self._need_labels(path, plan.step_s, "step_s.", "restore the file or choose another --out")
            self._need_labels(path, plan.eval_token_s, "eval_token_s.", "restore the file or choose another --out")
        else:
            no_length = self.settings.steps is None and self.settings.budget_s is None
            plan = make_plan(
                self.candidates,
                self.train_config(self.preset.steps, self.settings.seeds[0]),
                self.corpus,
                n_seeds=len(self.settings.seeds),
                steps=self.preset.steps if no_length else self.settings.steps,
                budget_s=self.settings.budget_s,
                device=self.device,
                spent_s=lambda: time.perf_counter() - started,
            )
            # Only now is the folder claimed: a budget that was refused may be raised with the same --out.
            RunFolder(self.out).open(self.identity, device=str(self.device))
            write_json(path, plan)
        tokens = self.preset.batch * self.preset.context
        self.progress.log(f"{plan.steps} steps of {tokens:,} tokens for every method")
        return plan

    def train(self, plan: Plan) -> dict[tuple[str, int], str]:
        """Train and evaluate every method with every seed; what is finished is left as it is.

        Returns:
            Why a run, by label and seed, has no result.
        """
        failures = {}
        runs = [(candidate, seed) for seed in self.settings.seeds for candidate in self.candidates]
        for position, (candidate, seed) in enumerate(runs):
            on_step = self.progress.run(candidate.label, seed, position, len(runs))
            folder, config = run_path(self.out, candidate.label, seed), self.train_config(plan.steps, seed)
            try:
                train(candidate.model, config, self.corpus, folder, device=self.device, on_step=on_step)
                if seed == self.settings.seeds[0] and not (folder / "usage.json").exists():
                    model, _ = load_run_model(folder, device=self.device)
                    count_usage(model, config, self.corpus, folder)
            except NonFiniteLossError as error:
                # One method that diverges must not cost the others' results; its row says so.
                failures[candidate.label, seed] = str(error)
                self.progress.log(f"{candidate.label}, seed {seed}: {error}")
        return failures

    def layer_times(self) -> LayerTimes:
        """Stored or new timings of one layer of each method, and of the dense block."""
        path, labels = self.out / "layers.json", {candidate.label: candidate.config for candidate in self.candidates}
        if not path.exists():
            self.progress.log("timing one layer of each method, in turn")
            (dense,) = match_methods([MethodChoice("dense")], self.preset, self.corpus.tokenizer.vocab_size)
            n_tokens = self.preset.batch * self.preset.context
            write_json(path, time_layers({DENSE: dense.config, **labels}, n_tokens=n_tokens, device=self.device))
        fix = "remove the file and run the same command again, which times the layers anew"
        times = read(path, LayerTimes, fix=fix)
        self._need_labels(path, times, "", fix, DENSE)
        return times

    def _need_labels(self, path: Path, found: dict[str, Any], prefix: str, fix: str, *further: str) -> None:
        for label in (*further, *(candidate.label for candidate in self.candidates)):
            if label not in found:
                raise UserError(f"`{path}` must hold `{prefix}{label}`; got nothing; fix: {fix}")

    def result(self, plan: Plan, layers: LayerTimes, failures: dict[tuple[str, int], str]) -> ComparisonResult:
        """The outcome, from the files of the runs."""
        config = self.train_config(plan.steps, self.settings.seeds[0])
        runs = {(c.label, s): RunFolder(run_path(self.out, c.label, s)) for c in self.candidates for s in self.settings.seeds}
        return summarize(
            self.candidates,
            self.preset,
            config,
            self.corpus,
            plan=plan,
            layers=layers,
            runs=runs,
            failures=failures,
            device=self.device,
        )
