"""`result.json`: the final numbers of a run, with the digests of the files that they stand for.

    result.write(folder)
    TrainResult.read(folder.result_path)

Tables and curves are made of a finished run's files without training anything: a changed one is refused instead.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from sparseffn.errors import UserError
from sparseffn.storage import Count, file_digest, json_digest, read, write_json
from sparseffn.training.run_folder import RunFolder


class _Seal(msgspec.Struct):
    """What version 0.1 did not write."""

    files: dict[str, str] = {}
    """Digests of the run's other files, as they were when it ended."""
    digest: str | None = None
    """Of all other fields."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """Final numbers of a run; losses in nats a token."""

    steps: Count
    valid: float
    test: float
    seconds: float
    """Time spent in training steps."""
    saving_seconds: float = 0.0
    """Time that training waited for checkpoints to be written, but for the last one before each interruption."""
    notes: tuple[str, ...] = ()
    """What one must know of the settings to read the numbers; also logged once, when the run begins."""

    @classmethod
    def read(cls, path: Path) -> TrainResult:
        """The result that a finished run wrote.

        Raises:
            UserError: the file is damaged, or it or another file of the run was changed or removed since.
        """
        fix = "remove the file and run the same command again, which makes it again from the last checkpoint"
        result, seal = read(path, cls, fix=fix), read(path, _Seal, fix=fix)
        if seal.digest is None:
            return result
        fields = read(path, dict[str, Any], fix=fix)
        if json_digest({name: value for name, value in fields.items() if name != "digest"}) != seal.digest:
            raise UserError(f"`{path}` must match its digest; got a changed file; fix: {fix}")
        for file in map(path.with_name, _sealed_names()):
            if seal.files.get(file.name) != (file_digest(file) if file.is_file() else None):
                raise UserError(
                    f"`{file}` must be as the finished run left it; got a missing or changed file; fix: restore it, or "
                    f"remove {path} and run the same command again, which goes on from the last checkpoint"
                )
        return result

    def write(self, folder: RunFolder) -> None:
        """Write `result.json`, after which the run is finished.

        Raises:
            UserError: the file system refuses.
        """
        files = {name: file_digest(folder.path / name) for name in _sealed_names()}
        fields = {**dataclasses.asdict(self), "notes": list(self.notes), "files": files}
        write_json(folder.result_path, {**fields, "digest": json_digest(fields)})


def _sealed_names() -> list[str]:
    folder = RunFolder(".")
    paths = (folder.config_path, folder.metrics_path, *map(folder.window_losses_path, ("valid", "test")))
    return [path.name for path in paths]
