"""Runs by the digest of their config: `POOL/runs/DIGEST/` is a run folder, and every table is a view on the pool.

A run is its model, its training settings and its corpus's digest; the package's version and the pool's format are written
beside the result, and a result of another version or format is never used: it is shown as missing, with the reason.

    POOL/runs/DIGEST/...          the run folder of `train`, and `paper.json` once everything of it is there
    POOL/runs/DIGEST.lock         held while a process works on the run
    POOL/failures/DIGEST.json     why a run gave no result
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock, Timeout

from sparseffn import __version__
from sparseffn.data import Corpus
from sparseffn.errors import UserError
from sparseffn.models import TransformerXLConfig
from sparseffn.storage import Kind, environment, read_fields, read_json, write_json
from sparseffn.training import RunFolder, TrainConfig, TrainResult
from sparseffn.training.loop import run_config

FORMAT = 1
"""Layout of `paper.json` and of the files beside it."""

_FIX = "remove the run's folder and run the same command again"


@dataclass(frozen=True, kw_only=True, eq=False)
class RunSpec:
    """One run: everything its losses depend on."""

    model: TransformerXLConfig
    train: TrainConfig
    corpus: Corpus

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What `config.json` of the run folder holds."""
        return json.loads(json.dumps(run_config(self.model, self.train, self.corpus)))

    @cached_property
    def digest(self) -> str:
        """The name of the run's folder: 32 hexadecimal digits."""
        text = json.dumps(self.identity, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What a finished run says of itself."""

    result: TrainResult
    wall_s: float
    """Training, evaluation and counting."""
    load: Mapping[str, float] | None
    """Largest over mean load of the experts by mode; None where nothing is routed."""
    environment: Mapping[str, Any]
    """What made it; nothing where it did not write that down."""
    folder: RunFolder


@dataclass(frozen=True, kw_only=True)
class Status:
    """How a run stands."""

    kind: Literal["finished", "missing", "failed"]
    reason: str | None
    """Why there is no result."""
    finished: Finished | None = None
    permanent: bool = False
    """Of a failure: it would only repeat."""
    stale: bool = False
    """Files of another version or format lie in its place."""

    @property
    def wanted(self) -> bool:
        """Whether running it may give a result."""
        return self.kind == "missing" or (self.kind == "failed" and not self.permanent)


class Pool:
    """A folder of runs."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def folder(self, spec: RunSpec) -> RunFolder:
        """The run's folder, whether or not it is there."""
        return RunFolder(self.path / "runs" / spec.digest)

    def failure_path(self, spec: RunSpec) -> Path:
        """Why a run gave no result."""
        return self.path / "failures" / f"{spec.digest}.json"

    def status(self, spec: RunSpec) -> Status:
        """How a run stands; damaged files are a reason, not an error."""
        try:
            return self._status(spec)
        except UserError as error:
            return Status(kind="failed", reason=str(error))

    def _status(self, spec: RunSpec) -> Status:
        folder = self.folder(spec)
        if foreign := self._foreign(folder):
            return Status(kind="missing", reason=foreign, stale=True)
        if (path := self.failure_path(spec)).exists():
            failure = read_fields(path, {"reason": Kind.TEXT, "permanent": Kind.ANY, "version": Kind.TEXT}, fix="remove it")
            if failure["version"] == version():
                return Status(kind="failed", reason=failure["reason"], permanent=failure["permanent"] is True)
        if (folder.path / "config.json").exists() and read_json(folder.path / "config.json", fix=_FIX) != spec.identity:
            return Status(kind="failed", reason=f"{folder.path} holds another run's config; {_FIX}")
        if not (folder.path / "paper.json").exists():
            steps = [record["step"] for record in folder.read_metrics()]
            reason = f"not finished: step {steps[-1]} of {spec.train.steps}" if steps else "not run yet"
            return Status(kind="missing", reason=reason)
        return Status(kind="finished", reason=None, finished=_read_finished(folder))

    def _foreign(self, folder: RunFolder) -> str | None:
        """Why what lies in a run's place may not be used; None where it may."""
        if folder.environment_path.exists():
            made_by = read_fields(folder.environment_path, {"sparseffn": Kind.TEXT}, fix=_FIX)["sparseffn"]
            if made_by != version():
                return f"made by version {made_by}; this is {version()}"
        path = folder.path / "paper.json"
        if path.exists():
            found = read_fields(path, {"format": Kind.COUNT}, fix=_FIX)["format"]
            if found != FORMAT:
                return f"made in format {found}; this version reads {FORMAT}"
        return None

    def set_aside(self, spec: RunSpec) -> Path:
        """Move what lies in a run's place out of the way, keeping it."""
        folder = self.folder(spec).path
        number = 1
        while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
            number += 1
        return folder.rename(aside)

    def record_failure(self, spec: RunSpec, reason: str, *, permanent: bool) -> None:
        """Write why a run gave no result."""
        write_json(self.failure_path(spec), {"reason": reason, "permanent": permanent, "version": version()})

    @contextlib.contextmanager
    def claimed(self, spec: RunSpec) -> Iterator[bool]:
        """Whether this process may work on the run; False while another one does."""
        path = self.path / "runs" / f"{spec.digest}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, blocking=False)
        try:
            lock.acquire()
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()


def version() -> str:
    """Of the package."""
    return __version__


def window_losses(finished: Finished, split: str) -> np.ndarray:
    """Mean loss in nats of every evaluation window of a split.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = finished.folder.window_losses_path(split)
    try:
        losses = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"`{path}` must hold the losses of windows; got {error}; fix: {_FIX}") from None
    if losses.ndim != 1 or losses.size == 0 or losses.dtype.kind != "f" or not np.isfinite(losses).all():
        raise UserError(f"`{path}` must hold finite losses of windows; got other values; fix: {_FIX}")
    return losses


def sources_note(runs: Iterable[Finished]) -> str | None:
    """How many of some runs other code of this version made, or older code that did not write down which it was.

    They are not refused: most of the sources have nothing to do with a run, and no digest can tell which have.
    """
    found = [run.environment.get("sources") for run in runs]
    unknown, other = found.count(None), sum(digest not in (None, environment()["sources"]) for digest in found)
    if not unknown and not other:
        return None
    return f"of {len(found)} runs, other sources of version {version()} than this one made {other}, and unknown ones {unknown}"


def median_step_s(finished: Finished) -> float:
    """Median seconds of a training step: neither a burst of other work nor a run that was stopped for a while moves it."""
    times = [record["time_s"] for record in finished.folder.read_metrics() if "time_s" in record]
    return float(np.median(np.diff([0.0, *times])))


def _read_finished(folder: RunFolder) -> Finished:
    extra = read_fields(folder.path / "paper.json", {"wall_s": Kind.POSITIVE, "load": Kind.ANY}, fix=_FIX)
    finished = Finished(
        result=TrainResult.read(folder.result_path),
        wall_s=extra["wall_s"],
        load=extra["load"],
        environment=read_json(folder.environment_path, fix=_FIX) if folder.environment_path.exists() else {},
        folder=folder,
    )
    # Tables compare runs by them: a file that cannot be read costs this run, not every table that has it.
    window_losses(finished, "test")
    return finished
