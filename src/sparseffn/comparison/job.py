"""`sparseffn compare`: parameter-equal models, one method each, on the same data; one table and one page.

Every run lives in `OUT/runs/LABEL/seed-N`, the shared decisions in `OUT/config.json` and `OUT/plan.json`, the outcome in
`OUT/comparison.json`, which the report reads. Calling it again with the same settings goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from sparseffn.bench.benchmark import time_layers
from sparseffn.comparison.matched import Contender, MethodChoice, contenders
from sparseffn.comparison.outcome import comparison
from sparseffn.comparison.runs import count_usage, run_path, train_config
from sparseffn.comparison.schedule import CURVE_TOKENS, Plan, make_plan
from sparseffn.data import Corpus, load_corpus
from sparseffn.errors import UserError
from sparseffn.models.presets import Preset, get_preset
from sparseffn.storage import Kind, read_fields, write_json
from sparseffn.training import NonFiniteLossError, RunFolder, load_run_model, train
from sparseffn.training.loop import OnStep


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
    """Training settings that differ from the preset's: lr, batch, context, warmup, clip."""

    def __post_init__(self) -> None:
        if not self.methods:
            raise UserError("`methods` must name at least one method; got none; fix: --methods dense sigma-moe")
        if self.steps is not None and self.budget_s is not None:
            raise UserError("`steps` and `budget` must not both be given; got both; fix: give one of them")
        if self.steps is not None and self.steps < 1:
            raise UserError(f"`steps` must be at least 1; got {self.steps}; fix: pass a positive number")
        if len(set(self.seeds)) < len(self.seeds) or not self.seeds:
            raise UserError(f"`seeds` must be different from one another; got {list(self.seeds)}; fix: --seeds N")


class Watcher(Protocol):
    """Told how a comparison goes on."""

    def say(self, text: str) -> None:
        """One line."""

    def run(self, label: str, seed: int, position: int, n_runs: int) -> OnStep:
        """A run begins; the result is told of its steps."""
        ...


class Silent:
    """A watcher that says nothing."""

    def say(self, text: str) -> None:
        """Nothing."""

    def run(self, label: str, seed: int, position: int, n_runs: int) -> OnStep:
        """Nothing."""
        return lambda report: None


def compare(settings: CompareSettings, out: Path | str, *, watcher: Watcher | None = None) -> dict[str, Any]:
    """Train and compare; returns what `comparison.json` holds.

    Args:
        settings: methods, corpus, preset, length.
        out: the folder of the comparison; goes on when it holds an unfinished one of the same settings.
        watcher: told of progress.

    Raises:
        UserError: a method cannot be matched, the folder is of another comparison, the budget is too small, or anything
            that `load_corpus` and `train` raise.
    """
    started = time.perf_counter()
    watcher = watcher or Silent()
    job = _Job.open(settings, Path(out), watcher)
    plan = job.plan(started)
    watcher.say(f"{plan.steps} steps of {job.tokens_per_step:,} tokens for every method")
    runs = [(contender, seed) for seed in settings.seeds for contender in job.field]
    failures = {}
    for position, (contender, seed) in enumerate(runs):
        on_step = watcher.run(contender.label, seed, position, len(runs))
        try:
            job.run(contender, seed, plan, on_step)
        except NonFiniteLossError as error:
            # One method that diverges must not cost the others' results; its row says so.
            failures[contender.label, seed] = str(error)
            watcher.say(f"{contender.label}, seed {seed}: {error}")
    watcher.say("timing one layer of each method, in turn")
    layers = job.layer_times()
    result = comparison(job.field, job.preset, job.corpus, plan, settings.seeds, layers, job.out, failures)
    write_json(job.out / "comparison.json", result)
    return result


def settings_json(settings: CompareSettings, preset: Preset) -> dict[str, Any]:
    """What identifies a comparison."""
    return {
        "methods": [choice.label for choice in settings.methods],
        "corpus": settings.corpus,
        "tokenizer": settings.tokenizer,
        "vocab_size": settings.vocab_size,
        "preset": preset.name,
        "seeds": list(settings.seeds),
        "steps": settings.steps,
        "budget_s": settings.budget_s,
        "overrides": dict(settings.overrides),
    }


def with_overrides(preset: Preset, overrides: dict[str, Any]) -> Preset:
    """The preset with a user's training settings."""
    return dataclasses.replace(preset, **overrides)


@dataclass(frozen=True)
class _Job:
    """An open comparison."""

    settings: CompareSettings
    out: Path
    preset: Preset
    corpus: Corpus
    field: Sequence[Contender]

    @classmethod
    def open(cls, settings: CompareSettings, out: Path, watcher: Watcher) -> _Job:
        """Load and match everything before anything is written."""
        preset = with_overrides(get_preset(settings.preset), settings.overrides)
        for seed in settings.seeds:
            # Whatever a budget allows later, settings out of range are refused now.
            train_config(preset, settings.steps or preset.steps, seed)
        corpus = load_corpus(
            settings.corpus,
            tokenizer=settings.tokenizer,
            data_dir=settings.data_dir,
            cache_dir=settings.cache_dir,
            vocab_size=settings.vocab_size,
        )
        matched = contenders(settings.methods, preset, corpus.tokenizer.vocab_size)
        for contender in matched:
            m = contender.match
            watcher.say(f"{contender.label}: {m.model_params:,} parameters ({m.residual_percent:+.3f}% against dense)")
        job = cls(settings, out, preset, corpus, matched)
        RunFolder(out).check(job.identity)
        return job

    @property
    def identity(self) -> dict[str, Any]:
        """What the folder belongs to."""
        return {**settings_json(self.settings, self.preset), "digest": self.corpus.digest}

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step."""
        return self.preset.batch * self.preset.context

    def plan(self, started: float) -> Plan:
        """The stored plan, or a new one."""
        path = self.out / "plan.json"
        if path.exists():
            return Plan.read(path, [contender.label for contender in self.field])
        no_length = self.settings.steps is None and self.settings.budget_s is None
        plan = make_plan(
            self.field,
            self.preset,
            self.corpus,
            n_seeds=len(self.settings.seeds),
            curve_tokens=min(CURVE_TOKENS, len(self.corpus.valid)),
            steps=self.preset.steps if no_length else self.settings.steps,
            budget_s=self.settings.budget_s,
            spent_s=time.perf_counter() - started,
        )
        # Only now is the folder claimed: a budget that was refused may be raised with the same --out.
        RunFolder(self.out).open(self.identity)
        write_json(path, plan.to_json())
        return plan

    def run(self, contender: Contender, seed: int, plan: Plan, on_step: OnStep) -> None:
        """Train and evaluate one method with one seed; at once when that is done already."""
        folder = run_path(self.out, contender.label, seed)
        config = train_config(self.preset, plan.steps, seed)
        train(contender.model, config, self.corpus, folder, on_step=on_step)
        if seed == self.settings.seeds[0] and not (folder / "usage.json").exists():
            model, _ = load_run_model(folder)
            count_usage(model, config, self.corpus, folder)

    def layer_times(self) -> dict[str, dict[str, float]]:
        """Stored or new timings of one layer of each method, and of the dense block."""
        path = self.out / "layers.json"
        if not path.exists():
            dense = contenders([MethodChoice("dense")], self.preset, self.corpus.tokenizer.vocab_size)[0]
            configs = {"(dense)": dense.config} | {c.label: c.config for c in self.field}
            measured = time_layers(configs, n_tokens=self.tokens_per_step)
            write_json(path, {label: dataclasses.asdict(t) for label, t in measured.items()})
        times = {"forward_s": Kind.POSITIVE, "training_s": Kind.POSITIVE}
        fields = dict.fromkeys(["(dense)", *(c.label for c in self.field)], times)
        return read_fields(path, fields, fix="remove the file and run the same command again, which times the layers anew")
