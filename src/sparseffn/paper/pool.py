"""Runs by the digest of their config: `POOL/runs/DIGEST/` is a run folder, and every table is a view on the pool.

A run is its model, its training settings, its corpus's digest, and the revision of what its method computes where that is not
the first. Runs of a version that `COMPATIBLE` names are used as those of this one; those of another version or format are shown
as missing, with the reason. The device is not part of a run, the precision is.

    POOL/runs/DIGEST/...          the run folder of `train`, and `paper.json` once everything of it is there
    POOL/runs/DIGEST.lock         held while a process works on the run
    POOL/failures/DIGEST.json     why a run gave no result
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from sparseffn import __version__
from sparseffn.data import Corpus
from sparseffn.errors import UserError
from sparseffn.models import TransformerXLConfig
from sparseffn.results.table_result import Load
from sparseffn.storage import Positive, environment, json_digest, lock, read, read_json, write_json
from sparseffn.training import RunFolder, TrainConfig, TrainResult
from sparseffn.training.loop import run_config

COMPATIBLE = ("0.1.0", "0.2.0")
"""Versions whose runs are what this one would make of the same config, but for methods whose `revision` says otherwise."""

FORMAT = 1
"""Layout of a run's `paper.json` and of the files beside it."""

# Nats; from 709.8 on, a perplexity is no number.
_LARGEST_LOSS = 690.0
_FIX = "remove the run's folder and run the same command again"


class RunSummary(msgspec.Struct, frozen=True, kw_only=True):
    """What `execute` adds to a finished run, as `paper.json`."""

    format: int
    wall_s: Positive
    """Training, evaluation and counting."""
    load: Load | None = None
    """None where nothing is routed."""


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    reason: str
    permanent: bool
    """Whether it would only repeat."""
    version: str


class _MadeBy(msgspec.Struct, frozen=True):
    """The part of `environment.json` that says whether a run is used."""

    sparseffn: str


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
        revision = self.model.ffn.revision
        # Left out where it is the first, so that runs of version 0.1 keep their names.
        return json_digest(self.identity if revision == 1 else {**self.identity, "revision": revision})


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What a finished run says of itself."""

    result: TrainResult
    wall_s: float
    load: Load | None
    environment: Mapping[str, Any]
    """What made it; nothing where it did not write that down."""
    folder: RunFolder

    @cached_property
    def step_s(self) -> float:
        """Median seconds of a training step: neither a burst of other work nor a run that was stopped for a while moves it."""
        times = [record["time_s"] for record in self.folder.read_metrics() if "time_s" in record]
        return float(np.median(np.diff([0.0, *times])))

    @property
    def train_s(self) -> float:
        """Of training, as if every step had been the median one."""
        return self.result.steps * self.step_s


@dataclass(frozen=True, kw_only=True)
class Status:
    kind: Literal["finished", "recorded", "missing", "failed", "settled"]
    """`recorded` and `settled` are of `paper.evidence.statuses`."""
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


def is_compatible(version: str) -> bool:
    """Whether runs of a version are used."""
    return version in (__version__, *COMPATIBLE)


class Pool:
    """A folder of runs."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def folder(self, spec: RunSpec) -> RunFolder:
        """The run's folder, whether or not it is there."""
        return RunFolder(self.path / "runs" / spec.digest)

    def failure_path(self, spec: RunSpec) -> Path:
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
            failure = read(path, Failure, fix="remove it")
            if is_compatible(failure.version):
                return Status(kind="failed", reason=failure.reason, permanent=failure.permanent)
        if (folder.path / "config.json").exists() and read_json(folder.path / "config.json", fix=_FIX) != spec.identity:
            return Status(kind="failed", reason=f"{folder.path} holds another run's config; {_FIX}")
        if not (folder.path / "paper.json").exists():
            steps = [record["step"] for record in folder.read_metrics()]
            reason = f"not finished: step {steps[-1]} of {spec.train.steps}" if steps else "not run yet"
            return Status(kind="missing", reason=reason)
        finished = _read_finished(folder)
        if (worst := max(finished.result.valid, finished.result.test)) > _LARGEST_LOSS:
            return Status(kind="failed", reason=f"a loss of {worst:.0f} nats has no perplexity", permanent=True)
        return Status(kind="finished", reason=None, finished=finished)

    def _foreign(self, folder: RunFolder) -> str | None:
        """Why what lies in a run's place may not be used; None where it may."""
        if folder.environment_path.exists():
            made_by = read(folder.environment_path, _MadeBy, fix=_FIX).sparseffn
            if not is_compatible(made_by):
                return f"made by version {made_by}; this is {__version__}"
        path = folder.path / "paper.json"
        if path.exists() and (found := read(path, RunSummary, fix=_FIX).format) != FORMAT:
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
        write_json(self.failure_path(spec), Failure(reason=reason, permanent=permanent, version=__version__))

    @contextmanager
    def claimed(self, spec: RunSpec) -> Iterator[bool]:
        """Whether this process may work on the run; False while another one does."""
        with lock(self.path / "runs" / f"{spec.digest}.lock", wait=False) as ours:
            yield ours


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


def makers_note(runs: Iterable[Finished]) -> str | None:
    """Which code made some runs, where that is not this one: other versions, other or unknown sources of this version.

    They are not refused: most of the sources have nothing to do with a run, and no digest can tell which have.
    """
    found = [run.environment for run in runs]
    here, version = environment()["sources"], __version__
    versions = Counter(str(made_by.get("sparseffn", "unknown")) for made_by in found)
    own = [made_by.get("sources") for made_by in found if made_by.get("sparseffn", "unknown") == version]
    parts = [f"version {name} made {n}" for name, n in sorted(versions.items()) if name != version]
    other, unknown = sum(digest not in (None, here) for digest in own), own.count(None)
    if other or unknown:
        parts.append(f"other sources of version {version} than this one made {other}, and unknown ones {unknown}")
    return f"of {len(found)} runs, {', '.join(parts)}" if parts else None


def _read_finished(folder: RunFolder) -> Finished:
    summary = read(folder.path / "paper.json", RunSummary, fix=_FIX)
    finished = Finished(
        result=TrainResult.read(folder.result_path),
        wall_s=summary.wall_s,
        load=summary.load,
        environment=read_json(folder.environment_path, fix=_FIX) if folder.environment_path.exists() else {},
        folder=folder,
    )
    # Tables compare runs by them: a file that cannot be read costs this run, not every table that has it.
    window_losses(finished, "test")
    return finished
