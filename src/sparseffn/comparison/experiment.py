"""What a comparison is: its settings, and, once it is open, its folder, its corpus and its candidates.

OUT/config.json         the settings that the folder belongs to
OUT/plan.json           steps of every run, times of a step
OUT/runs/LABEL/seed-N   a run folder, with usage.json for the first seed
OUT/layers.json         times of one layer of each method
OUT/comparison.json     the outcome, which the report reads
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sparseffn.comparison.matched import MatchedMethod, MethodChoice, match_methods
from sparseffn.data import Corpus, load_corpus
from sparseffn.devices import Precision, find_device
from sparseffn.distribution import World
from sparseffn.errors import UserError, unknown_name
from sparseffn.models.backbones import BACKBONES, Backbone
from sparseffn.models.presets import Preset, get_preset
from sparseffn.training import RunFolder, TrainConfig, from_preset
from sparseffn.training.layout import Layout, Strategy
from sparseffn.training.restore import shortened

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
    backbone: Backbone = "transformer-xl"
    """The model around the feedforward blocks."""
    seeds: tuple[int, ...] = (0,)
    steps: int | None = None
    """None: the preset's, or what the budget allows."""
    budget_s: float | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    """Training settings that differ from the preset's, of `OVERRIDES`."""
    precision: Precision = "float32"
    device: str = "auto"
    """Where models are trained, evaluated and timed; a comparison may go on on another one."""
    strategy: Strategy = "ddp"
    """Of several processes, whose number may change as well."""

    def __post_init__(self) -> None:
        if not self.methods:
            raise UserError("`methods` must name at least one method; got none; fix: --methods dense sigma-moe")
        if self.steps is not None and self.budget_s is not None:
            raise UserError("`steps` and `budget` must not both be given; got both; fix: give one of them")
        if self.steps is not None and self.steps < 1:
            raise UserError(f"`steps` must be at least 1; got {self.steps}; fix: pass a positive number")
        if len(set(self.seeds)) < len(self.seeds) or not self.seeds:
            raise UserError(f"`seeds` must be different from one another; got {list(self.seeds)}; fix: --seeds N")
        if self.backbone not in BACKBONES:
            raise unknown_name("backbone", self.backbone, BACKBONES)
        for name in self.overrides:
            if name not in OVERRIDES:
                raise unknown_name("setting", name, OVERRIDES)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """An open comparison."""

    settings: CompareSettings
    out: Path
    device: torch.device
    preset: Preset
    """With the user's settings."""
    corpus: Corpus
    candidates: Sequence[MatchedMethod]

    @classmethod
    def open(cls, settings: CompareSettings, out: Path) -> Comparison:
        """Load and match everything, and check that the folder is free or this comparison's; nothing is written."""
        device = find_device(settings.device)
        preset = dataclasses.replace(get_preset(settings.preset), backbone=settings.backbone, **settings.overrides)
        for seed in settings.seeds:
            # Whatever a budget allows later, settings out of range are refused now.
            from_preset(preset, steps=settings.steps, seed=seed, precision=settings.precision)
        options = {name: getattr(settings, name) for name in ("tokenizer", "vocab_size", "data_dir", "cache_dir")}
        corpus = load_corpus(settings.corpus, **options)
        candidates = match_methods(settings.methods, preset, corpus.tokenizer.vocab_size)
        opened = cls(settings=settings, out=out, device=device, preset=preset, corpus=corpus, candidates=candidates)
        layout = Layout.of(World.here().size, settings.strategy, device.type)
        for candidate in candidates:
            # The last method too, before the first one is trained.
            layout.check(candidate.model, opened.train_config(settings.steps, settings.seeds[0]))
        RunFolder(out).check(opened.identity)
        return opened

    def evaluated_on(self, n_tokens: int | None) -> Comparison:
        """With the first tokens of validation and test alone; None: as it is."""
        return self if n_tokens is None else dataclasses.replace(self, corpus=shortened(self.corpus, n_tokens))

    def run_folder(self, label: str, seed: int) -> RunFolder:
        return RunFolder(run_path(self.out, label, seed))

    @property
    def identity(self) -> dict[str, Any]:
        """What the folder belongs to."""
        wanted = self.settings
        # Folders of version 0.1 know neither.
        later = {} if wanted.precision == "float32" else {"precision": wanted.precision}
        later |= {} if wanted.backbone == "transformer-xl" else {"backbone": wanted.backbone}
        return {
            "methods": [choice.label for choice in wanted.methods],
            "corpus": wanted.corpus,
            "tokenizer": wanted.tokenizer,
            "vocab_size": wanted.vocab_size,
            "preset": self.preset.name,
            "seeds": list(wanted.seeds),
            "steps": wanted.steps,
            "budget_s": wanted.budget_s,
            "overrides": {**wanted.overrides, **later},
            "digest": self.corpus.digest,
        }

    def train_config(self, steps: int | None, seed: int) -> TrainConfig:
        """Hyperparameters of a run: those of `train`; None: the preset's steps."""
        return from_preset(self.preset, steps=steps, seed=seed, precision=self.settings.precision)

    def check_labels(self, path: Path, found: Mapping[str, object], prefix: str = "", *, fix: str) -> None:
        """Refuse a file that lacks a candidate."""
        for candidate in self.candidates:
            if candidate.label not in found:
                raise UserError(f"`{path}` must hold `{prefix}{candidate.label}`; got nothing; fix: {fix}")


def run_path(out: Path, label: str, seed: int) -> Path:
    """Folder of one run."""
    return out / "runs" / re.sub(r"[^A-Za-z0-9=.,_-]+", "_", label) / f"seed-{seed}"
