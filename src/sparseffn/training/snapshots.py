"""Routing snapshots: which experts some validation tokens select, at every point of the validation curve.

    routing/step-00000100.safetensors      one int16 tensor `[n_tokens, K]` a layer; -1 where nothing was selected

Checkpoints of earlier steps are removed, and with them the routing of that time. 4096 tokens cost 2 x K x 4096 bytes a layer
and show how load and entropy moved and how long a token stays with its experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sparseffn.data import Corpus, EvalWindow, unpadded
from sparseffn.errors import UserError
from sparseffn.evaluation import evaluate
from sparseffn.ffn import RoutingStats
from sparseffn.models import LanguageModel
from sparseffn.storage import digest_of, write_bytes
from sparseffn.training.checkpoint import is_of_step, step_name, step_of
from sparseffn.training.config import TrainConfig
from sparseffn.training.run_folder import RunFolder

SNAPSHOT_TOKENS = 4096
"""Tokens of a snapshot: with 16 experts and K = 4 an expert's load is then known to about 3%, as good as a line on paper."""


def routes_to_experts(model: LanguageModel) -> bool:
    """Whether a model's feedforward blocks select experts; channels and values are too many to keep by token."""
    return model.config.ffn.unit == "experts"


def by_layer(stats: Mapping[str, Sequence[RoutingStats]]) -> dict[str, RoutingStats]:
    """One window's statistics for each layer of the model.

    A block that several layers share runs once for each of them: the tokens of the window pass it again, and are not more
    tokens of one layer.
    """
    return {layer_name(name, place): call for name, calls in stats.items() for place, call in enumerate(calls)}


def layer_name(name: str, place: int) -> str:
    """A block's name, with the number of its run in a window where it is not the first."""
    return f"{name}[{place}]" if place else name


def snapshot(model: LanguageModel, corpus: Corpus, config: TrainConfig) -> list[Tensor]:
    """The experts that some validation tokens, always the same, select: int16 `[n_tokens, K]` a layer, -1 for nothing."""
    rows: dict[str, list[Tensor]] = {}

    def observe(stats: Mapping[str, Sequence[RoutingStats]], window: EvalWindow) -> None:
        for name, layer in by_layer(stats).items():
            chosen = layer.selection
            assert chosen is not None and chosen.k is not None, "a mixture selects K experts a token"
            experts = torch.where(chosen.weights != 0, chosen.indices, -1).to(torch.int16)
            rows.setdefault(name, []).append(experts.view(-1, chosen.k))

    tokens = unpadded(_spread(corpus.valid, config.eval_batch), batch=config.eval_batch)
    evaluate(model, tokens, observe=observe, **config.evaluation)
    return [torch.cat(parts).cpu() for parts in rows.values()]


def _spread(tokens: np.ndarray, n_pieces: int) -> np.ndarray:
    """Pieces from all over a split, one for each stream of the evaluation; the beginning alone may be one odd document."""
    length = SNAPSHOT_TOKENS // n_pieces
    if len(tokens) <= SNAPSHOT_TOKENS or length < 1:
        return tokens[: SNAPSHOT_TOKENS + 1]
    starts = np.linspace(0, len(tokens) - length - 1, n_pieces).astype(np.int64)
    pieces = [tokens[start : start + length] for start in starts]
    return np.concatenate([*pieces, tokens[starts[-1] + length :][:1]])


def save_snapshot(folder: Path, step: int, layers: Sequence[Tensor]) -> None:
    """Write a snapshot, with the digest of its run, step and tensors."""
    path = folder / "routing" / f"{step_name(step)}.safetensors"
    tensors = {str(layer): chosen for layer, chosen in enumerate(layers)}
    write_bytes(path, save(tensors, metadata={"digest": _digest(path, layers)}))


def _digest(path: Path, layers: Sequence[Tensor]) -> str:
    run = RunFolder(path.parents[1])
    whose = (run.digest() if run.config_path.exists() else "", path.stem)
    return digest_of(*whose, *(part for layer in layers for part in (str(list(layer.shape)), layer.numpy().tobytes())))


def list_snapshots(folder: Path) -> dict[int, Path]:
    """A run's snapshots by step, in order; none where it has none."""
    found = {step_of(path): path for path in (folder / "routing").glob("step-*.safetensors") if is_of_step(path)}
    return dict(sorted(found.items()))


def load_snapshot(path: Path) -> list[Tensor]:
    """Read a snapshot.

    Raises:
        UserError: the file is damaged.
    """
    try:
        # Anything but a regular file may block for ever.
        if not path.is_file():
            raise OSError("no regular file")
        with safe_open(path, "pt") as file:
            digest = (file.metadata() or {}).get("digest")
            layers = [file.get_tensor(name) for name in sorted(file.keys(), key=int)]
        # Version 0.1 wrote none.
        if digest not in (None, _digest(path, layers)):
            raise ValueError("not that of this run and step")
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"`{path}` must hold a routing snapshot; got a damaged file ({error}); fix: remove it, the others still serve"
        ) from None
    return layers
