"""Checkpoints: every tensor in one safetensors file, everything else in JSON; written whole or not at all.

A checkpoint is a folder `step-N` with `state.safetensors` and `checkpoint.json`, which holds the digest of the former and of
itself. The last two are kept.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparseffn.errors import UserError
from sparseffn.storage import Count, file_digest, json_digest, read, remove_unfinished, write_folder, write_json

FORMAT = 2
KEPT = 2

STATE, MANIFEST = "state.safetensors", "checkpoint.json"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """State of a run after `step` steps."""

    step: int
    tensors: Mapping[str, Tensor]
    """`model.*`, `optimizer.*`, `memory.*`, `stream.*`, and states of generators: `rng` of the CPU, `rng.cuda`."""
    seconds: float
    """Time spent in training steps."""
    scaler: Mapping[str, float | int] = field(default_factory=dict)
    """State of the gradient scaler, where there is one."""

    def group(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under a prefix, without it."""
        return {key.removeprefix(f"{prefix}."): value for key, value in self.tensors.items() if key.startswith(f"{prefix}.")}


class _Format(msgspec.Struct):
    format: int


class _Extra(msgspec.Struct):
    seconds: float
    scaler: dict[str, float | int] = {}


class _Manifest(_Format):
    step: Count
    digest: str
    manifest_digest: str
    extra: _Extra


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint and remove all but the last two."""
    final = folder / step_name(checkpoint.step)
    remove_unfinished(folder)
    with write_folder(final, replace=True) as temporary:
        save_file({key: _on_host(value) for key, value in checkpoint.tensors.items()}, temporary / STATE)
        manifest = {
            "format": FORMAT,
            "step": checkpoint.step,
            "digest": file_digest(temporary / STATE),
            "extra": {"seconds": checkpoint.seconds, "scaler": dict(checkpoint.scaler)},
        }
        write_json(temporary / MANIFEST, {**manifest, "manifest_digest": json_digest(manifest)})
    for old in list_checkpoints(folder)[:-KEPT]:
        shutil.rmtree(old)
    return final


def _on_host(tensor: Tensor) -> Tensor:
    """A copy that shares its memory with no other."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(folder.glob("step-*")) if folder.exists() else []


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint; its tensors are on the CPU.

    Raises:
        UserError: a file is missing, truncated or damaged, or of another format.
    """
    fix, manifest_path, state = f"remove {path} to go on from the checkpoint before it", path / MANIFEST, path / STATE
    found = read(manifest_path, _Format, fix=fix).format
    if found != FORMAT:
        raise UserError(f"`{manifest_path}` must have format {FORMAT}; got {found}; fix: {fix}")
    manifest, fields = read(manifest_path, _Manifest, fix=fix), read(manifest_path, dict[str, Any], fix=fix)
    if json_digest({key: value for key, value in fields.items() if key != "manifest_digest"}) != manifest.manifest_digest:
        raise UserError(f"`{manifest_path}` must match its digest; got a changed file; fix: {fix}")
    if step_name(manifest.step) != path.name:
        raise UserError(f"`{path}` must be named after its step; got one of step {manifest.step}; fix: {fix}")
    if not state.exists() or file_digest(state) != manifest.digest:
        raise UserError(f"`{state}` must match its digest; got a missing, truncated or damaged file; fix: {fix}")
    try:
        tensors = load_file(state)
    except SafetensorError as error:
        raise UserError(f"`{state}` must be readable; got {error}; fix: {fix}") from None
    return Checkpoint(step=manifest.step, tensors=tensors, seconds=manifest.extra.seconds, scaler=manifest.extra.scaler)


def step_name(step: int) -> str:
    """What is kept of a step goes by this name."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step that a checkpoint or a file is named after."""
    return int(path.stem.removeprefix("step-"))
