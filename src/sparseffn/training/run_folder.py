"""A run folder: `config.json`, `environment.json`, `corpus.json`, `tokenizer.json`, `metrics.jsonl`, `checkpoints/step-*/`,
`windows-*.npy`, `routing/`, `result.json`.

The config identifies the run. Environment, device and the place of its corpus do not: it goes on elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import msgspec

from sparseffn import __version__
from sparseffn.data import Corpus
from sparseffn.errors import UserError
from sparseffn.storage import (
    LOCK,
    Count,
    environment,
    json_digest,
    partial_of,
    read,
    read_json,
    write_json,
    write_text,
    writing,
)


class _Line(msgspec.Struct):
    """A line of the metrics: a training step, a point of validation, the device of the steps that follow, a step that was left
    out and why, or a warning.
    """

    step: Count
    loss: float | None = None
    balance_loss: float | None = None
    valid: float | None = None
    device: str | None = None
    skipped: str | None = None
    warning: str | None = None

    def __post_init__(self) -> None:
        if None in (self.loss, self.balance_loss) and {self.valid, self.device, self.skipped, self.warning} == {None}:
            raise ValueError("a step must have its losses, a validation, a device, a reason or a warning")


@final
class RunFolder:
    """Files of one run. A folder belongs to one config: another one is refused and nothing is overwritten."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.config_path = self.path / "config.json"
        # What the result depends on beside the config, as it was when the run began.
        self.environment_path = self.path / "environment.json"
        # A `data.CorpusOrigin`: where the corpus was found.
        self.corpus_path = self.path / "corpus.json"
        self.tokenizer_path = self.path / "tokenizer.json"
        self.metrics_path = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        # There when the run is finished.
        self.result_path = self.path / "result.json"

    def window_losses_path(self, split: str) -> Path:
        """Mean loss of every evaluation window of a split, written before the final numbers."""
        return self.path / f"windows-{split}.npy"

    def open(self, config: Mapping[str, Any], *, device: str = "cpu") -> bool:
        """Create the folder for a config, or `check` that it is this config's; returns whether it is new."""
        self.check(config)
        path = self.config_path
        # The config comes first: a kill in between must leave a folder that the same command takes up.
        fresh = not path.exists()
        if fresh:
            write_json(path, config)
        if not self.environment_path.exists():
            write_json(self.environment_path, environment(device))
        return fresh

    def check(self, config: Mapping[str, Any]) -> None:
        """Check, writing nothing, that the folder is free or this config's.

        Raises:
            UserError: the folder holds a run of another config or files of something else.
        """
        path = self.config_path
        if path.exists():
            fix = "restore the file or choose another --out"
            found = read(path, dict[str, Any], fix=fix)
            if absent := [key for key in config if key not in found]:
                raise UserError(f"`{path}` must hold `{absent[0]}`; got nothing; fix: {fix}")
            differences = _differences(found, json.loads(json.dumps(config)))
            if differences:
                raise UserError(
                    f"`out` must be a new folder or one of the same config; got {self.path}, where "
                    f"{'; '.join(differences[:3])}; fix: {self._other_config_fix()}"
                )
        elif self.path.exists() and (not self.path.is_dir() or not all(map(self._is_of_no_run, self.path.iterdir()))):
            raise UserError(
                f"`out` must be a new folder or one of this run; got {self.path}, which holds other files; "
                "fix: choose another --out"
            )

    def _is_of_no_run(self, file: Path) -> bool:
        """Whether a file says no more than that somebody writes here, or was killed when the config was to be written."""
        return file.name == LOCK or partial_of(file) == self.config_path.name

    def digest(self) -> str:
        """Digest of the run's config: what its checkpoints and its result are of.

        Raises:
            UserError: the folder holds no run, or its config is damaged.
        """
        return json_digest(read(self.config_path, dict[str, Any], fix="restore the file or train again"))

    def _other_config_fix(self) -> str:
        made_by = read_json(self.environment_path).get("sparseffn") if self.environment_path.exists() else __version__
        if made_by == __version__:
            return "choose another --out or the same settings"
        return (
            f"the folder is of version {made_by}, where equal settings may have other defaults, as the warm-up and the length "
            "of curves of `train` in 0.1: finish it with that version, or choose another --out"
        )

    def note_corpus(self, corpus: Corpus) -> None:
        """Write what `load_run_corpus` needs to open the run's corpus again.

        Raises:
            UserError: another tokenizer is there, or the file system refuses.
        """
        tokenizer = corpus.tokenizer.to_json()
        if not self.tokenizer_path.exists():
            write_text(self.tokenizer_path, tokenizer)
        elif not self.tokenizer_path.is_file() or self.tokenizer_path.read_bytes() != tokenizer.encode():
            raise UserError(
                f"`{self.tokenizer_path}` must be the tokenizer that the run began with; got a damaged file; fix: remove it"
            )
        write_json(self.corpus_path, corpus.origin)

    def note_device(self, step: int, device: str) -> None:
        """Add a line to the metrics where the steps after `step` are taken on another device than those before."""
        devices = [record["device"] for record in self._records() if "device" in record]
        if devices[-1:] != [device]:
            self.append_metrics({"step": step, "device": device})

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add a line to the metrics.

        Raises:
            UserError: the file system refuses, or the folder is gone.
        """
        with writing(self.metrics_path, fix="run the same command again elsewhere"), self.metrics_path.open("ab") as file:
            file.write(json.dumps(record, allow_nan=False).encode() + b"\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """Steps that were taken, and validation points; a last line that a kill cut short is left out.

        Raises:
            UserError: another line is damaged.
        """
        return [record for record in self._records() if "loss" in record or "valid" in record]

    def n_skipped(self) -> int:
        """Steps that were left out."""
        return sum("skipped" in record for record in self._records())

    def _records(self) -> list[dict[str, Any]]:
        if self.metrics_path.exists() and not self.metrics_path.is_file():
            raise UserError(f"`{self.metrics_path}` must be a file; got something else; fix: remove it or restore the file")
        if not self.metrics_path.exists():
            return []
        records = [_metrics_record(line) for line in self.metrics_path.read_bytes().splitlines()]
        for number, record in enumerate(records[:-1], start=1):
            if record is None:
                raise UserError(
                    f"`{self.metrics_path}` must hold a step and its losses in every line; got another line {number}; "
                    "fix: restore the file or remove that line"
                )
        return [record for record in records if record is not None]

    def rewind_metrics(self, step: int) -> None:
        """Drop what was written after the checkpoint of a step: the steps run again."""
        kept = [json.dumps(record) for record in self._records() if record["step"] <= step]
        write_text(self.metrics_path, "".join(line + "\n" for line in kept))


def _metrics_record(line: bytes) -> dict[str, Any] | None:
    """A line of the metrics; None where it is none."""
    try:
        record = msgspec.json.decode(line, type=dict[str, Any])
        msgspec.convert(record, _Line)
    except (msgspec.MsgspecError, RecursionError):
        return None
    return record


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
