"""A run folder read back: the settings that its config holds, the model of its last checkpoint, its corpus and tokeniser."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from sparseffn.data import Corpus, CorpusOrigin, Tokenizer, tokenizer_from_json
from sparseffn.devices import find_device
from sparseffn.errors import UserError
from sparseffn.models import Decoder, LanguageModel, ModelConfig, TransformerXL, build_model, model_config_from_json
from sparseffn.storage import file_digest, read
from sparseffn.training.checkpoint import (
    Checkpoint,
    best_checkpoint,
    list_checkpoints,
    load_checkpoint,
    step_of,
    tokenizer_digest,
)
from sparseffn.training.config import TrainConfig
from sparseffn.training.run_folder import RunFolder

SHORTENED = ", evaluated on the first "
"""Stands in a run's digest behind that of the corpus, before a number of tokens, where less than whole splits was evaluated."""


class _Corpus(msgspec.Struct):
    name: str
    digest: str


class _Config(msgspec.Struct):
    model: dict[str, Any]
    train: dict[str, Any]
    corpus: _Corpus


def shortened(corpus: Corpus, n_tokens: int) -> Corpus:
    """The corpus with the first tokens of validation and test alone, by which runs are evaluated; its digest says so."""
    # One more than predictions: the first token of a split is not predicted.
    n = n_tokens + 1
    digest = f"{corpus.digest}{SHORTENED}{n_tokens}"
    return dataclasses.replace(corpus, valid=corpus.valid[:n], test=corpus.test[:n], digest=digest)


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What a run folder's config says."""

    model: ModelConfig
    train: TrainConfig
    corpus: str
    """Its name."""
    digest: str
    """The corpus's."""
    run: str
    """Digest of the whole config, which the run's checkpoints are of."""
    evaluated: int | None
    """First tokens of a split that the run's own results are of; None: whole splits."""

    @classmethod
    def read(cls, folder: RunFolder) -> RunSettings:
        """The settings of a run folder.

        Raises:
            UserError: the folder holds no run, or its config is damaged.
        """
        path = folder.path / "config.json"
        fix = "restore the file or train again; of a comparison, name a run: OUT/runs/METHOD/seed-0"
        found = read(path, _Config, fix=fix)
        part = "model"
        try:
            model, part = model_config_from_json(found.model), "train"
            train_config = TrainConfig.from_json(found.train)
        except (AttributeError, TypeError, ValueError) as error:
            reason = str(error).partition("; fix:")[0]
            reason = f"`{part}.{reason[1:]}" if reason.startswith("`") else f"`{part}`: {reason}"
            raise UserError(f"`{path}` must hold a run's settings; got a damaged file: {reason}; fix: {fix}") from None
        digest, _, evaluated = found.corpus.digest.partition(SHORTENED)
        return cls(
            model=model,
            train=train_config,
            corpus=found.corpus.name,
            digest=digest,
            run=folder.digest(),
            evaluated=int(evaluated) if evaluated.isdecimal() else None,
        )


def load_run_model(
    path: Path | str, *, checkpoint: str = "last", device: str | torch.device = "cpu"
) -> tuple[TransformerXL | Decoder, RunFolder]:
    """The model of a run folder as of one of its checkpoints, in evaluation mode.

    Args:
        path: the run folder.
        checkpoint: `last`, `best` (the lowest loss on validation of those that are kept), or a step.
        device: a name for `find_device`.

    Raises:
        UserError: the folder holds no run or not that checkpoint, a file of it is damaged, or there is no such device.
    """
    folder = RunFolder(path)
    settings = RunSettings.read(folder)
    return load_model(settings, find_checkpoint(folder, checkpoint), device=device), folder


def find_checkpoint(folder: RunFolder, which: str = "last") -> Path:
    """A run's checkpoint: `last`, `best`, or a step.

    Raises:
        UserError: it has no such checkpoint.
    """
    found = list_checkpoints(folder.checkpoints)
    if not found:
        raise UserError(f"`{folder.path}` must hold a checkpoint; got none yet; fix: train it first")
    if which == "last":
        return found[-1]
    if which == "best":
        best = best_checkpoint(folder.checkpoints)
        if best is None:
            raise UserError(
                f"`{folder.path}` must hold a checkpoint of a point of the validation curve; got none; "
                "fix: choose last, or train with a --checkpoint-every that is a multiple of --eval-every"
            )
        return best
    steps = {str(step_of(path)): path for path in found}
    if which not in steps:
        raise UserError(f"`checkpoint` must be last, best or one of {', '.join(steps)}; got {which!r}; fix: choose one of them")
    return steps[which]


def load_model(settings: RunSettings, checkpoint: Path, *, device: str | torch.device = "cpu") -> TransformerXL | Decoder:
    """The model of one of a run's checkpoints, in evaluation mode.

    Raises:
        UserError: the checkpoint is damaged, or another run's; there is no such device.
    """
    device = find_device(device)
    # First, so that a config of absurd sizes asks for no memory.
    stored = load_checkpoint(checkpoint, run=settings.run)
    n_stored = sum(tensor.numel() for tensor in stored.group("model").values())
    if n_stored < settings.model.num_params():
        raise _another_model(checkpoint)
    model = build_model(settings.model)
    load_weights(model, checkpoint, stored)
    return model.to(device).eval()


def load_run_corpus(path: Path | str, *, data_dir: Path | str | None = None, cache_dir: Path | str | None = None) -> Corpus:
    """The corpus that a run was trained on, with the run's own tokeniser.

    Args:
        path: the run folder.
        data_dir: where the text is now; None for where it was in training. Runs of version 0.1 did not note that.
        cache_dir: where token files are kept; None for the folder of then while it is there, or the default.

    Raises:
        UserError: the folder holds no run, the corpus cannot be opened, or it is another text than the run's.
    """
    folder = RunFolder(path)
    run = RunSettings.read(folder)
    origin = CorpusOrigin(name=run.corpus)
    if folder.corpus_path.exists():
        fix = "remove the file and pass --data-dir where the corpus needs one"
        origin = read(folder.corpus_path, CorpusOrigin, fix=fix)
    corpus = origin.load(data_dir=data_dir, cache_dir=cache_dir, tokenizer=load_run_tokenizer(folder))
    if corpus.digest != run.digest:
        raise UserError(
            f"the corpus must be the run's, digest {run.digest}; got {corpus.digest}; "
            "fix: pass --data-dir with the text of then, or use the Python version that trained the run"
        )
    return corpus


def load_run_tokenizer(folder: RunFolder) -> Tokenizer:
    """The tokeniser that a run was trained with.

    Raises:
        UserError: its file is missing or damaged.
    """
    path = folder.tokenizer_path
    if not path.exists():
        raise UserError(f"`{path}` must exist; got no such file; fix: train the run again, or restore the file")
    found = list_checkpoints(folder.checkpoints)
    digest = tokenizer_digest(found[-1]) if found else None
    try:
        if not path.is_file():
            raise ValueError("no regular file")
        if digest not in (None, file_digest(path)):
            raise ValueError("not the one that the last checkpoint knows")
        return tokenizer_from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"`{path}` must hold the run's tokenizer; got a damaged file ({error}); fix: restore the file or train again"
        ) from None


def load_weights(
    model: LanguageModel, path: Path, checkpoint: Checkpoint, *, place: Callable[[Tensor, Tensor], Tensor] | None = None
) -> None:
    """Put a checkpoint's parameters into a model; `place` brings a whole tensor to where the model's is, in shards or not.

    Raises:
        UserError: they are another model's.
    """
    try:
        tensors = checkpoint.group("model")
        if place is not None:
            own = model.state_dict()
            tensors = {name: place(value, own[name]) if name in own else value for name, value in tensors.items()}
        model.load_state_dict(tensors)
    except RuntimeError:
        raise _another_model(path) from None


def _another_model(path: Path) -> UserError:
    return UserError(
        f"`{path}` must hold the parameters of the run's config; got another model's; "
        "fix: restore config.json and the checkpoint together"
    )
