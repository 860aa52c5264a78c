"""The short trainings of `sparseffn study`: which, at what size, and what is seen of them on the way.

A run is a `train` run like any other; at each of its checkpoints a probe is taken. Runs are shared by all studies of a folder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from sparseffn.comparison.experiment import run_path
from sparseffn.comparison.matched import MethodChoice
from sparseffn.data import Corpus
from sparseffn.errors import unknown_name
from sparseffn.ffn import BlockShape, FFNConfig, method_class, parse_options
from sparseffn.models import TransformerXL, TransformerXLConfig
from sparseffn.models.presets import Preset, get_preset
from sparseffn.paper.competition import probe
from sparseffn.paper.study_start import Grid
from sparseffn.results.study_result import SelectorProbe, StudyRun
from sparseffn.storage import read, write_json
from sparseffn.training import RunFolder, TrainResult, train
from sparseffn.training.checkpoint import list_checkpoints, load_checkpoint, step_of
from sparseffn.training.config import from_preset
from sparseffn.training.journal import StepReport
from sparseffn.training.restore import load_weights

# Tokens of validation that a probe reads.
PROBE_TOKENS = 8192

_DROPOUT = "0.05"

STUDIES: dict[str, dict[str, MethodChoice]] = {
    "init": {
        "shared, equal-norm": MethodChoice("sigma-moe"),
        "shared, free": MethodChoice("sigma-moe", {"selector_init": "free"}),
        "standard, equal-norm": MethodChoice("sigma-moe", {"init": "standard"}),
        "switch, equal-norm": MethodChoice("sigma-moe", {"init": "switch"}),
    },
    "competition": {
        "sigmoid": MethodChoice("sigma-moe"),
        "softmax before top-k": MethodChoice("softmax-moe"),
        "softmax after top-k": MethodChoice("softmax-renorm-moe"),
    },
    "balance": {
        "entropy loss": MethodChoice("sigma-moe"),
        "both": MethodChoice("sigma-moe", {"expert_dropout": _DROPOUT}),
        "neither": MethodChoice("sigma-moe", {"entropy_weight": "0"}),
        "expert dropout": MethodChoice("sigma-moe", {"entropy_weight": "0", "expert_dropout": _DROPOUT}),
    },
}
"""Variants by study; the first of each is sigma-MoE as the paper has it for small models, and one run serves all three."""


@dataclass(frozen=True, kw_only=True)
class StudyScale:
    """Sizes of a study."""

    grid: Grid
    preset: Preset
    eval_tokens: int
    """First tokens of validation and test that decide a run's final losses."""
    start_seeds: int
    """Seeds of the measurements at initialisation but for the load."""
    load_seeds: int = 0
    """Of the load, which costs less; 0: the same."""

    def to_json(self) -> dict[str, Any]:
        return msgspec.json.decode(msgspec.json.encode(self))


CPU = StudyScale(
    grid=Grid(),
    # lr is the tiny preset's, chosen there on the validation split with the dense model. 32 experts, so that the standard
    # initialisation's values are sqrt(32) = 5.7 times the shared one's; 12 seconds a run on 2 idle cores (measured).
    preset=dataclasses.replace(
        get_preset("tiny"),
        name="study-cpu",
        doc="2 layers of width 96, 32 experts of 32, K 4",
        shape=BlockShape(d_model=96, d_ff=1024, n_experts=32, expert_size=32, k=4, n_layers=2, entropy_weight=1e-3),
        d_head=24,
        context=64,
        steps=300,
    ),
    eval_tokens=32768,
    start_seeds=5,
    load_seeds=100,
)


def variants(study: str) -> dict[str, MethodChoice]:
    """By name.

    Raises:
        UserError: there is no such study.
    """
    if study not in STUDIES:
        raise unknown_name("study", study, STUDIES)
    return STUDIES[study]


def block_config(choice: MethodChoice, preset: Preset) -> FFNConfig:
    """A variant's block at a preset's sizes."""
    config_class = method_class(choice.method)
    return config_class.from_shape(preset.shape).replace(**parse_options(choice.method, config_class, choice.options))


@dataclass(frozen=True)
class Training:
    """One run: a variant with a seed."""

    choice: MethodChoice
    seed: int
    scale: StudyScale
    corpus: Corpus
    """Shortened."""
    out: Path

    @property
    def model(self) -> TransformerXLConfig:
        """The variant's model. Schemes have one parameter count, so that nothing is to be matched."""
        return self.scale.preset.transformer_xl(block_config(self.choice, self.scale.preset), self.corpus.tokenizer.vocab_size)

    @property
    def folder(self) -> RunFolder:
        return RunFolder(run_path(self.out, self.choice.label, self.seed))

    @property
    def probes_path(self) -> Path:
        return self.folder.path / "probes.json"

    def outcome(self) -> StudyRun | None:
        """Final losses and all probes; None for a run that is not finished."""
        if not self.folder.result_path.exists() or not self.probes_path.exists():
            return None
        result, probes = TrainResult.read(self.folder.result_path), self._probes()
        if str(self.scale.preset.steps) not in probes:
            return None
        rows = [msgspec.structs.replace(probes[step], step=int(step)) for step in sorted(probes, key=int)]
        return StudyRun(seed=self.seed, valid=result.valid, test=result.test, probes=rows)

    def run(self, device: torch.device, on_progress: Callable[[StepReport | None], None]) -> None:
        """Train, or go on, and take the probes that are missing.

        `on_progress` is called with every step, and with None after the probe of a checkpoint; what it raises ends the call.
        """
        config = from_preset(self.scale.preset, seed=self.seed)

        def on_step(report: StepReport) -> None:
            if self._catch_up(device):
                on_progress(None)
            on_progress(report)

        train(self.model, config, self.corpus, self.folder.path, device=device, on_step=on_step)
        if self._catch_up(device):
            on_progress(None)

    def _probes(self) -> dict[str, SelectorProbe]:
        if not self.probes_path.exists():
            return {}
        return read(self.probes_path, dict[str, SelectorProbe], fix="remove the run's folder and run the same command again")

    def _catch_up(self, device: torch.device) -> bool:
        """Probe the start and the checkpoints that are there; whether a checkpoint, from which a run goes on, was new."""
        found = self._probes()
        paths = {step_of(path): path for path in list_checkpoints(self.folder.checkpoints)}
        new = [step for step in (0, *paths) if str(step) not in found]
        for step in new:
            found[str(step)] = self._probe(paths.get(step), device)
        if new:
            write_json(self.probes_path, found, seal=True)
        return any(step > 0 for step in new)

    def _probe(self, path: Path | None, device: torch.device) -> SelectorProbe:
        preset = self.scale.preset
        # Nothing that is drawn here may move the run's own generator.
        with torch.random.fork_rng():
            model = TransformerXL(self.model)
            model.init_parameters(self.seed)
            if path is not None:
                load_weights(model, path, load_checkpoint(path, run=self.folder.digest()))
            tokens = self.corpus.valid[: PROBE_TOKENS + 1]
            seen = probe(model.to(device), tokens, batch=preset.eval_batch, context=preset.context)
        rounded = {name: float(f"{value:.5g}") for name, value in msgspec.structs.asdict(seen).items() if name != "step"}
        return msgspec.convert(rounded, SelectorProbe)
