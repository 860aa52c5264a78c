"""A run folder: `config.json`, `environment.json`, `metrics.jsonl`, `checkpoints/step-*/`, `windows-*.npy`, `routing/`,
`result.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from sparseffn.errors import UserError
from sparseffn.storage import Kind, environment, read_fields, write_json, write_text


@final
class RunFolder:
    """Files of one run. A folder belongs to one config: another one is refused and nothing is overwritten."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @property
    def environment_path(self) -> Path:
        """What the result depends on beside its config."""
        return self.path / "environment.json"

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

    def window_losses_path(self, split: str) -> Path:
        """Mean loss of every evaluation window of a split, written before the final numbers."""
        return self.path / f"windows-{split}.npy"

    def open(self, config: Mapping[str, Any]) -> bool:
        """Create the folder for a config, or check that it is this config's.

        Returns:
            Whether the folder is new.

        Raises:
            UserError: the folder holds a run of another config or files of something else.
        """
        self.check(config)
        path = self.path / "config.json"
        # The config comes first: a kill in between must leave a folder that the same command takes up.
        fresh = not path.exists()
        if fresh:
            write_json(path, config)
        if not self.environment_path.exists():
            write_json(self.environment_path, environment())
        return fresh

    def check(self, config: Mapping[str, Any]) -> None:
        """Check, writing nothing, that the folder is free or this config's.

        Raises:
            UserError: the folder holds a run of another config or files of something else.
        """
        path = self.path / "config.json"
        if path.exists():
            fix = "restore the file or choose another --out"
            self._compare(read_fields(path, dict.fromkeys(config, Kind.ANY), fix=fix), json.loads(json.dumps(config)))
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
        """All whole lines; a last line that a kill cut short is left out.

        Raises:
            UserError: another line is damaged.
        """
        if not self.metrics_path.exists():
            return []
        lines = self.metrics_path.read_bytes().splitlines()
        records = [_metrics_record(line) for line in lines]
        for number, record in enumerate(records[:-1], start=1):
            if record is None:
                raise UserError(
                    f"`{self.metrics_path}` must hold a step and its losses in every line; got another line {number}; "
                    "fix: restore the file or remove that line"
                )
        return [record for record in records if record is not None]

    def rewind_metrics(self, step: int) -> None:
        """Drop what was written after the checkpoint of a step: the steps run again."""
        kept = [json.dumps(record) for record in self.read_metrics() if record["step"] <= step]
        write_text(self.metrics_path, "".join(line + "\n" for line in kept))


def _metrics_record(line: bytes) -> dict[str, Any] | None:
    """A line of the metrics; None where it is none."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not Kind.COUNT.accepts(record.get("step")):
        return None
    fields = ("valid",) if "valid" in record else ("loss", "balance_loss")
    return record if all(Kind.NUMBER.accepts(record.get(field)) for field in fields) else None


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
