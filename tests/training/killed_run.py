"""A run that kills itself with SIGKILL: `killed_run.py FOLDER DATA CACHE WHEN`, WHEN a step or `saving`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import sparseffn.training.checkpoint as checkpoint
from sparseffn.data import load_corpus
from sparseffn.models import TransformerXLConfig
from sparseffn.storage import read_json
from sparseffn.training import TrainConfig, train

out, data, cache, when = sys.argv[1:]
settings = read_json(Path(out).with_suffix(".json"))


def die_while_saving(tensors: dict[str, Any], path: Path) -> None:
    """Write half a file, the second time, and die."""
    if os.environ.get("SAVED"):
        Path(path).write_bytes(b"half a file")
        os.kill(os.getpid(), signal.SIGKILL)
    os.environ["SAVED"] = "1"
    save_file(tensors, path)


def on_step(report: Any) -> None:
    """Die after a step."""
    if when == str(report.step):
        os.kill(os.getpid(), signal.SIGKILL)


if when == "saving":
    save_file, checkpoint.save_file = checkpoint.save_file, die_while_saving
train(
    TransformerXLConfig.from_json(settings["model"]),
    TrainConfig.from_json(settings["train"]),
    load_corpus("text", data_dir=data, cache_dir=cache),
    out,
    on_step=on_step,
)
