"""Checkpoints: every tensor in one safetensors file, everything else in JSON; written whole or not at all.

A checkpoint is a folder `step-N` with `state.safetensors` and `checkpoint.json`, which holds size and digest of the former, the
digest of the run's config, and its own. The last ones are kept, and the best of those that validation looked at. Folders of
other names are somebody else's.
"""

from __future__ import annotations

import contextlib
import re
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
from sparseffn.storage import Count, cannot_write, file_digest, json_digest, read, remove_unfinished, write_folder, write_json

FORMAT = 2
KEPT = 2

STATE, MANIFEST = "state.safetensors", "checkpoint.json"
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """State of a run after `step` steps."""

    step: int
    tensors: Mapping[str, Tensor]
    """`model.*`, `optimizer.*`, `memory.*`, `stream.*`, and states of generators: `rng` of the CPU, `rng.cuda`."""
    seconds: float
    """Time spent in training steps."""
    saving_seconds: float = 0.0
    """Time spent in writing the checkpoints before this one."""
    scaler: Mapping[str, float | int] = field(default_factory=dict)
    """State of the gradient scaler, where there is one."""
    run: str | None = None
    """Digest of the run's config; None in version 0.1."""
    tokenizer: str | None = None
    """Digest of the run's `tokenizer.json`; None in version 0.1. That of the corpus is in the config."""
    valid: float | None = None
    """Loss of validation at this step, where that was a point of the curve."""

    def group(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under a prefix, without it."""
        return {key.removeprefix(f"{prefix}."): value for key, value in self.tensors.items() if key.startswith(f"{prefix}.")}


class _Format(msgspec.Struct):
    format: int


class _Extra(msgspec.Struct):
    seconds: float
    saving_seconds: float = 0.0
    scaler: dict[str, float | int] = {}
    run: str | None = None
    tokenizer: str | None = None
    valid: float | None = None


class _Manifest(_Format):
    step: Count
    digest: str
    manifest_digest: str
    extra: _Extra
    # Absent in version 0.1.
    bytes: Count | None = None


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, kept: int = KEPT) -> Path:
    """Write a checkpoint and remove all but the last `kept` and the best.

    Raises:
        UserError: the file system refuses; the checkpoints before it are as they were.
    """
    final = folder / step_name(checkpoint.step)
    remove_unfinished(folder)
    with write_folder(final, replace=True) as temporary:
        try:
            save_file({key: _on_host(value) for key, value in checkpoint.tensors.items()}, temporary / STATE)
        except SafetensorError as error:
            # Of the file system's errors it keeps the words alone.
            raise cannot_write(final, str(error)) from error
        manifest = {
            "format": FORMAT,
            "step": checkpoint.step,
            "bytes": (temporary / STATE).stat().st_size,
            "digest": file_digest(temporary / STATE),
            "extra": {
                "seconds": checkpoint.seconds,
                "saving_seconds": checkpoint.saving_seconds,
                "scaler": dict(checkpoint.scaler),
                "run": checkpoint.run,
                "tokenizer": checkpoint.tokenizer,
                "valid": checkpoint.valid,
            },
        }
        write_json(temporary / MANIFEST, {**manifest, "manifest_digest": json_digest(manifest)})
    best = best_checkpoint(folder)
    for old in list_checkpoints(folder)[:-kept]:
        if old != best:
            shutil.rmtree(old)
    return final


def _on_host(tensor: Tensor) -> Tensor:
    """A copy that shares its memory with no other."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first; whatever else is in the folder is left alone."""
    found = [path for path in folder.glob("step-*") if is_of_step(path) and not path.suffix] if folder.exists() else []
    return sorted(found, key=step_of)


def best_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the lowest loss of validation, the first of several; None where validation looked at none."""
    losses: dict[Path, float] = {}
    for path in list_checkpoints(folder):
        # A damaged one is reported where somebody asks for it.
        with contextlib.suppress(UserError):
            loss = _read_manifest(path).extra.valid
            losses |= {} if loss is None else {path: loss}
    return min(losses, key=losses.__getitem__, default=None)


def load_checkpoint(path: Path, *, run: str | None = None) -> Checkpoint:
    """Read a checkpoint; its tensors are on the CPU. Sizes and digests are verified before a tensor is read.

    Args:
        path: the checkpoint.
        run: digest of the run's config, which the checkpoint must be of; None where there is no config.

    Raises:
        UserError: a file is missing, truncated or damaged, of another format or of another run.
    """
    fix, state, manifest = _fix(path), path / STATE, _read_manifest(path)
    if run is not None and manifest.extra.run not in (None, run):
        raise UserError(
            f"`{path}` must be of the run whose config lies beside it; got one of another config; "
            "fix: restore config.json and the checkpoint together"
        )
    if not state.is_file() or manifest.bytes not in (None, state.stat().st_size) or file_digest(state) != manifest.digest:
        raise UserError(f"`{state}` must match its digest; got a missing, truncated or damaged file; fix: {fix}")
    try:
        tensors = load_file(state)
    except SafetensorError as error:
        raise UserError(f"`{state}` must be readable; got {error}; fix: {fix}") from None
    extra = manifest.extra
    return Checkpoint(
        step=manifest.step,
        tensors=tensors,
        seconds=extra.seconds,
        saving_seconds=extra.saving_seconds,
        scaler=extra.scaler,
        run=extra.run,
        tokenizer=extra.tokenizer,
        valid=extra.valid,
    )


def tokenizer_digest(path: Path) -> str | None:
    """Digest of the tokenizer that a checkpoint was made with; None in version 0.1.

    Raises:
        UserError: the checkpoint's manifest is damaged.
    """
    return _read_manifest(path).extra.tokenizer


def _fix(path: Path) -> str:
    return f"remove {path} to go on from the checkpoint before it"


def _read_manifest(path: Path) -> _Manifest:
    fix, manifest_path = _fix(path), path / MANIFEST
    found = read(manifest_path, _Format, fix=fix).format
    if found != FORMAT:
        raise UserError(f"`{manifest_path}` must have format {FORMAT}; got {found}; fix: {fix}")
    manifest, fields = read(manifest_path, _Manifest, fix=fix), read(manifest_path, dict[str, Any], fix=fix)
    if json_digest({key: value for key, value in fields.items() if key != "manifest_digest"}) != manifest.manifest_digest:
        raise UserError(f"`{manifest_path}` must match its digest; got a changed file; fix: {fix}")
    if step_name(manifest.step) != path.name:
        raise UserError(f"`{path}` must be named after its step; got one of step {manifest.step}; fix: {fix}")
    return manifest


def step_name(step: int) -> str:
    """What is kept of a step goes by this name."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step that a checkpoint or a file is named after; asks for a name of ours."""
    found = _NAME.fullmatch(path.stem)
    assert found is not None, f"{path} is none of ours"
    return int(found[1])


def is_of_step(path: Path) -> bool:
    """Whether a file or a folder is named after a step, as ours are."""
    return _NAME.fullmatch(path.stem) is not None
