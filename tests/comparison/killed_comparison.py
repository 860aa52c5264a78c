"""A comparison that kills itself with SIGKILL in its second run: `killed_comparison.py FOLDER DATA WHEN`.

WHEN is `step`, after step 7, between two checkpoints, or `saving`, in the middle of writing that run's third checkpoint.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import sparseffn.training.checkpoint as checkpoint
from sparseffn.comparison import CompareSettings, NoProgress, compare, parse_methods

STEPS = 12
# One every two steps; the first run's are all written by then.
SAVES_BEFORE = STEPS // 2 + 2


def settings(data: str) -> CompareSettings:
    """Two methods, one with every kind of state."""
    return CompareSettings(
        methods=tuple(parse_methods(["dense", "sigma-moe", "expert_dropout=0.1"])),
        corpus="text",
        data_dir=data,
        steps=STEPS,
        overrides={"batch": 2, "context": 16},
    )


class DiesAfterAStep(NoProgress):
    """Kills the process after step 7 of the second run."""

    def run(self, label: str, seed: int, position: int, n_runs: int) -> Any:
        """The callback of a run."""

        def on_step(report: Any) -> None:
            if position == 1 and report.step == 7:
                os.kill(os.getpid(), signal.SIGKILL)

        return on_step


def die_while_saving() -> None:
    """Have half a file written and the process killed when the second run's third checkpoint is due."""
    save_file, saves = checkpoint.save_file, [0]

    def die(tensors: dict[str, Any], path: Path) -> None:
        saves[0] += 1
        if saves[0] > SAVES_BEFORE:
            Path(path).write_bytes(b"half a file")
            os.kill(os.getpid(), signal.SIGKILL)
        save_file(tensors, path)

    checkpoint.save_file = die


if __name__ == "__main__":
    out, data, when = sys.argv[1:]
    if when == "saving":
        die_while_saving()
    compare(settings(data), out, progress=DiesAfterAStep() if when == "step" else NoProgress())
