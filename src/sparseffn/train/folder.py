"""A run folder: `config.json`, `environment.json`, `metrics.jsonl`, `checkpoints/step-*/`, `result.json`."""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, final

import numpy as np
import torch

from sparseffn.errors import UserError


def write_json(path: Path, data: object) -> None:
    """Write JSON so that the file is whole or is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=1, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is not there or is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} must exist; got no such file; fix: check the path") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} must hold JSON; got {error}; fix: restore the file or remove its folder") from None


def environment() -> dict[str, Any]:
    """What a result depends on beside its config."""
    return {
        "sparseffn": metadata.version("sparseffn"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "threads": torch.get_num_threads(),
        "cpu": _cpu_name(),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def _cpu_name() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@final
class RunFolder:
    """Files of one run. A folder belongs to one config: another one is refused and nothing is overwritten."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @property
    def metrics_path(self) -> Path:
        """One JSON object a line: training steps and validation points."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def result_path(self) -> Path:
        """Final numbers; there when the run is finished."""
        return self.path / "result.json"

    def open(self, config: Mapping[str, Any]) -> None:
        """Create the folder for a config, or check that it is this config's.

        Raises:
            UserError: the folder holds a run of another config or files of something else.
        """
        self.check(config)
        path = self.path / "config.json"
        # The config comes first: a kill in between must leave a folder that the same command takes up.
        if not path.exists():
            write_json(path, config)
        if not (self.path / "environment.json").exists():
            write_json(self.path / "environment.json", environment())

    def check(self, config: Mapping[str, Any]) -> None:
        """Check, writing nothing, that the folder is free or this config's.

        Raises:
            UserError: the folder holds a run of another config or files of something else.
        """
        path = self.path / "config.json"
        if path.exists():
            self._compare(read_json(path), json.loads(json.dumps(config)))
            return
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise UserError(
                f"`out` must be a new folder or one of this run; got {self.path}, which holds other files; "
                "fix: choose another --out"
            )

    def _compare(self, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        differences = _differences(found, wanted)
        if differences:
            raise UserError(
                f"`out` must be a new folder or one of the same config; got {self.path}, where "
                f"{'; '.join(differences[:3])}; fix: choose another --out or the same settings"
            )

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add one line."""
        with self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """All whole lines; a line that a kill cut short is left out."""
        if not self.metrics_path.exists():
            return []
        records = []
        for line in self.metrics_path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return records

    def rewind_metrics(self, step: int) -> None:
        """Drop what was written after the checkpoint of a step: the steps run again."""
        kept = [json.dumps(record) for record in self.read_metrics() if record["step"] <= step]
        handle, name = tempfile.mkstemp(dir=self.path, prefix=".metrics.")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in kept)
        Path(name).replace(self.metrics_path)


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Where two configs differ, as `key is a, not b`."""
    lines = []
    for key in sorted({*found, *wanted}):
        a, b = found.get(key), wanted.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key} is {a!r}, not {b!r}")
    return lines
