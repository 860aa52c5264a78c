"""Checkpoints: every tensor in one safetensors file, everything else in JSON; written whole or not at all.

A checkpoint is a folder `step-N` with `state.safetensors` and `checkpoint.json`, which holds the digest of the former and of
itself. It is made beside its final place and renamed, so that a kill leaves the one before. The last two are kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparseffn.errors import UserError
from sparseffn.storage import Kind, file_digest, read_fields, write_json

FORMAT = 2
KEPT = 2

STATE, MANIFEST = "state.safetensors", "checkpoint.json"
MANIFEST_FIELDS = {
    "format": Kind.COUNT,
    "step": Kind.COUNT,
    "digest": Kind.TEXT,
    "manifest_digest": Kind.TEXT,
    "extra": {"seconds": Kind.NUMBER},
}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """State of a run after `step` steps."""

    step: int
    tensors: Mapping[str, Tensor]
    """`model.*`, `optimizer.*`, `memory.*`, `rng`."""
    extra: Mapping[str, Any]
    """JSON-able rest."""

    def group(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under a prefix, without it."""
        return {key.removeprefix(f"{prefix}."): value for key, value in self.tensors.items() if key.startswith(f"{prefix}.")}


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint and remove all but the last two."""
    final = folder / step_name(checkpoint.step)
    temporary = folder / f".writing-{os.getpid()}"
    _remove_unfinished(folder)
    temporary.mkdir(parents=True)
    tensors = {key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in checkpoint.tensors.items()}
    save_file(tensors, temporary / STATE)
    _sync(temporary / STATE)
    manifest = {
        "format": FORMAT,
        "step": checkpoint.step,
        "digest": file_digest(temporary / STATE),
        "extra": dict(checkpoint.extra),
    }
    write_json(temporary / MANIFEST, {**manifest, "manifest_digest": _manifest_digest(manifest)})
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    _sync(folder)
    for old in list_checkpoints(folder)[:-KEPT]:
        shutil.rmtree(old)
    return final


def _remove_unfinished(folder: Path) -> None:
    """Remove what a killed run left behind."""
    for leftover in folder.glob(".writing-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(folder.glob("step-*")) if folder.exists() else []


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        UserError: a file is missing, truncated or damaged, or of another format.
    """
    fix = f"remove {path} to go on from the checkpoint before it"
    manifest = read_fields(path / MANIFEST, {"format": Kind.COUNT}, fix=fix)
    if manifest["format"] != FORMAT:
        raise UserError(f"`{path / MANIFEST}` must have format {FORMAT}; got {manifest['format']}; fix: {fix}")
    manifest = read_fields(path / MANIFEST, MANIFEST_FIELDS, fix=fix)
    if _manifest_digest(manifest) != manifest["manifest_digest"]:
        raise UserError(f"`{path / MANIFEST}` must match its digest; got a changed file; fix: {fix}")
    if step_name(manifest["step"]) != path.name:
        raise UserError(f"`{path}` must be named after its step; got one of step {manifest['step']}; fix: {fix}")
    state = path / STATE
    if not state.exists() or file_digest(state) != manifest["digest"]:
        raise UserError(f"`{state}` must match its digest; got a missing, truncated or damaged file; fix: {fix}")
    try:
        tensors = load_file(state)
    except SafetensorError as error:
        raise UserError(f"`{state}` must be readable; got {error}; fix: {fix}") from None
    return Checkpoint(step=manifest["step"], tensors=tensors, extra=manifest["extra"])


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, Tensor]:
    """State of an optimiser by parameter name.

    Args:
        optimizer: Adam or AdamW.
        names: name of the parameter with each `id`.
    """
    return {
        f"optimizer.{names[id(parameter)]}::{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Tensor], names: Mapping[int, str]) -> None:
    """Put saved state back, tensor by tensor, without the casts of `load_state_dict`."""
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, value in saved.items():
        name, field = key.rsplit("::", 1)
        by_name.setdefault(name, {})[field] = value
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = by_name[names[id(parameter)]]


def step_name(step: int) -> str:
    """What is kept of a step goes by this name."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step that a checkpoint or a file is named after."""
    return int(path.stem.removeprefix("step-"))


def _manifest_digest(manifest: Mapping[str, Any]) -> str:
    """Digest of every other field of a manifest."""
    rest = {key: value for key, value in manifest.items() if key != "manifest_digest"}
    return hashlib.blake2b(json.dumps(rest, sort_keys=True).encode(), digest_size=16).hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
