"""A run folder read back: the settings that its config holds, and the model of its last checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparseffn.errors import UserError
from sparseffn.models import TransformerXL, TransformerXLConfig
from sparseffn.storage import Kind, read_fields
from sparseffn.training.checkpoint import Checkpoint, list_checkpoints, load_checkpoint
from sparseffn.training.config import TrainConfig
from sparseffn.training.run_folder import RunFolder

SHORTENED = ", evaluated on the first "
"""Stands in a run's digest behind that of the corpus, before a number of tokens, where less than whole splits was evaluated."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What a run folder's config says."""

    model: TransformerXLConfig
    train: TrainConfig
    corpus: str
    """The corpus's name."""
    digest: str
    """The corpus's digest."""
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
        corpus = {"name": Kind.TEXT, "digest": Kind.TEXT}
        found = read_fields(path, {"model": {"ffn": Kind.OBJECT}, "train": Kind.OBJECT, "corpus": corpus}, fix=fix)
        try:
            model, train_config = TransformerXLConfig.from_json(found["model"]), TrainConfig.from_json(found["train"])
        except (TypeError, ValueError) as error:
            raise UserError(f"`{path}` must hold a run's settings; got a damaged file: {error}; fix: {fix}") from None
        digest, _, evaluated = found["corpus"]["digest"].partition(SHORTENED)
        return cls(
            model=model,
            train=train_config,
            corpus=found["corpus"]["name"],
            digest=digest,
            evaluated=int(evaluated) if evaluated.isdecimal() else None,
        )


def load_run_model(path: Path | str) -> tuple[TransformerXL, RunFolder]:
    """The model of a run folder as of its last checkpoint, in evaluation mode.

    Raises:
        UserError: the folder holds no run or no checkpoint yet, or a file of it is damaged.
    """
    folder = RunFolder(path)
    settings = RunSettings.read(folder)
    found = list_checkpoints(folder.checkpoints)
    if not found:
        raise UserError(f"`{folder.path}` must hold a checkpoint; got none yet; fix: train it first")
    return load_model(settings, found[-1]), folder


def load_model(settings: RunSettings, checkpoint: Path) -> TransformerXL:
    """The model of one of a run's checkpoints, in evaluation mode.

    Raises:
        UserError: the checkpoint is damaged, or another model's.
    """
    model = TransformerXL(settings.model)
    load_weights(model, checkpoint, load_checkpoint(checkpoint))
    return model.eval()


def load_weights(model: TransformerXL, path: Path, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's parameters into a model.

    Raises:
        UserError: they are another model's.
    """
    try:
        model.load_state_dict(checkpoint.group("model"))
    except RuntimeError:
        raise UserError(
            f"`{path}` must hold the parameters of the run's config; got another model's; "
            "fix: restore config.json and the checkpoint together"
        ) from None
