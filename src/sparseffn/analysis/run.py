"""Everything that is asked of a finished run, in one pass over a split: `analyze_run(folder, corpus, splits=("valid",))`.

Windows stream through the model as in evaluation and leave running sums alone, so that memory does not grow with the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import final

import numpy as np
import torch

from sparseffn.analysis.over_training import over_training
from sparseffn.analysis.tokens import ServedTokens
from sparseffn.analysis.usage import ChannelCounter, UsageCounter
from sparseffn.data import Corpus, EvalWindow, Split, unpadded
from sparseffn.devices import find_device
from sparseffn.errors import UserError
from sparseffn.evaluation import OnProgress, evaluate
from sparseffn.ffn import CollectedStats
from sparseffn.models import LanguageModel
from sparseffn.results.analysis_result import AnalysisResult, RoutingOverTraining, RunFacts
from sparseffn.training import RunFolder, RunSettings, TrainConfig, TrainResult, load_run_model
from sparseffn.training.checkpoint import list_checkpoints, step_of
from sparseffn.training.restore import load_model
from sparseffn.training.snapshots import by_layer, list_snapshots, load_snapshot, routes_to_experts, snapshot


@final
class RunCounts:
    """The running sums of an analysis."""

    def __init__(self, model: LanguageModel, tokens: Sequence[np.ndarray]) -> None:
        self.usage = UsageCounter()
        mixture = routes_to_experts(model)
        # Channels and values are units themselves, and too many for a table of tokens.
        self.channels = ChannelCounter() if mixture else None
        self.served = ServedTokens(tokens, model.config.vocab_size) if mixture else None

    def read(self, model: LanguageModel, tokens: np.ndarray, config: TrainConfig, on_progress: OnProgress | None) -> float:
        """Count what a model does on a text; returns its loss in nats a token."""
        with nullcontext() if self.channels is None else self.channels.counting(model):
            found = evaluate(model, tokens, on_progress=on_progress, observe=self._observe, **config.evaluation)
        return found.nats_per_token

    def _observe(self, stats: CollectedStats, window: EvalWindow) -> None:
        """Add a window that `evaluate` has read, layer by layer also where layers share a block."""
        self.usage.observe({name: [layer] for name, layer in by_layer(stats).items()})
        if self.served is not None:
            self.served.observe(stats, window.inputs)


def analyze_run(
    path: Path | str,
    corpus: Corpus,
    *,
    splits: Sequence[Split] = ("valid",),
    max_tokens: int | None = None,
    device: str | torch.device = "auto",
    on_progress: OnProgress | None = None,
) -> AnalysisResult:
    """What the feedforward blocks of a finished run's model do.

    Args:
        path: the run folder.
        corpus: the run's, see `load_run_corpus`.
        splits: what is read, one after the other; all of it counts together.
        max_tokens: of each split use only the first so many; None for all.
        device: a name for `find_device`.
        on_progress: called after every window.

    Raises:
        UserError: the folder holds no finished run, or a file of it is damaged; `max_tokens` is too small; there is no such
            device.
    """
    folder, device = finished_run(path), find_device(device)
    settings = RunSettings.read(folder)
    model, _ = load_run_model(path, device=device)
    config = settings.train
    if max_tokens is not None and max_tokens < 2:
        raise UserError(f"`max_tokens` must be at least 2; got {max_tokens}; fix: leave it out to read the whole split")
    texts = [unpadded(corpus.tokens(split)[:max_tokens], batch=config.eval_batch) for split in splits]
    counts = RunCounts(model, texts)
    for text in texts:
        counts.read(model, text, config, on_progress)
    usage, layers = counts.usage.result(), list(counts.usage.layers.values())
    return AnalysisResult(
        run=_run_facts(folder, settings),
        splits=list(splits),
        n_tokens=sum(len(text) - 1 for text in texts),
        unit=settings.model.ffn.unit,
        usage=usage.usage,
        active=usage.active if counts.channels is None else counts.channels.result(),
        load=[layer.load(i) for i, layer in enumerate(layers)],
        cooccurrence=[layer.cooccurrence() for layer in layers],
        tokens=None if counts.served is None else counts.served.result(corpus.tokenizer),
        training=None if counts.served is None else _over_training(folder, settings, corpus, counts, device),
    )


def finished_run(path: Path | str) -> RunFolder:
    """The folder of a finished run, checked; loads nothing.

    Raises:
        UserError: the folder holds no run, or one that is not finished.
    """
    folder = RunFolder(path)
    settings = RunSettings.read(folder)
    found = list_checkpoints(folder.checkpoints)
    done = step_of(found[-1]) if found else 0
    if not folder.result_path.exists() or done != settings.train.steps:
        what = "result" if done == settings.train.steps else f"checkpoint of step {settings.train.steps}"
        raise UserError(
            f"`{folder.path}` must hold a finished run; got one without its {what} (last checkpoint: step {done}); "
            "fix: run the command that trains it again, which goes on where it stands"
        )
    return folder


def _run_facts(folder: RunFolder, settings: RunSettings) -> RunFacts:
    ffn = settings.model.ffn
    return RunFacts(
        name=folder.path.resolve().name,
        method=ffn.name,
        config=ffn.to_json(),
        params=settings.model.num_params(),
        d_model=settings.model.d_model,
        n_layers=settings.model.n_layers,
        n_channels=ffn.n_channels,
        active_channels=ffn.active_channels,
        corpus=settings.corpus,
        digest=settings.digest,
        steps=settings.train.steps,
        valid_nats=TrainResult.read(folder.result_path).valid,
    )


def _over_training(
    folder: RunFolder, settings: RunSettings, corpus: Corpus, counts: RunCounts, device: torch.device
) -> RoutingOverTraining:
    """Routing over training: from the run's snapshots, or else from the checkpoints that it kept."""
    n_experts = len(next(iter(counts.usage.layers.values())).counts)
    if stored := list_snapshots(folder.path):
        return over_training({step: load_snapshot(path) for step, path in stored.items()}, n_experts, "snapshots")
    kept = {step_of(path): path for path in list_checkpoints(folder.checkpoints)}
    found = {step: snapshot(load_model(settings, path, device=device), corpus, settings.train) for step, path in kept.items()}
    return over_training(found, n_experts, "checkpoints")
