"""A long run needs no more memory, files and threads at its end than near its beginning."""

from __future__ import annotations

import dataclasses
import os
import threading
from pathlib import Path

import pytest

from sparseffn.data import Corpus
from sparseffn.models import TransformerXLConfig
from sparseffn.training import RunFolder, TrainConfig, train
from sparseffn.training.journal import StepReport

STEPS, FROM = 5000, 500
PAGE = os.sysconf("SC_PAGE_SIZE")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_memory_files_and_threads_are_flat_over_5000_steps(
    tmp_path: Path, corpus: Corpus, model: TransformerXLConfig, config: TrainConfig
) -> None:
    """Within 2%, with validation, routing snapshots and checkpoints on the way; the metrics can be read meanwhile."""
    config = dataclasses.replace(config, steps=STEPS, lr=1e-3, eval_every=250, checkpoint_every=500, accumulation=1)
    seen: dict[int, tuple[int, int, int]] = {}

    def on_step(report: StepReport) -> None:
        if report.step in (FROM, STEPS):
            seen[report.step] = resident_bytes(), len(list(Path("/proc/self/fd").iterdir())), threading.active_count()
            steps = [record["step"] for record in RunFolder(tmp_path / "run").read_metrics() if "loss" in record]
            assert steps == list(range(1, report.step + 1))

    train(model, config, corpus, tmp_path / "run", on_step=on_step)
    (memory, *others), (memory_then, *others_then) = seen[STEPS], seen[FROM]
    assert memory <= 1.02 * memory_then, f"{memory_then / 2**20:.1f} MiB after {FROM} steps, {memory / 2**20:.1f} at the end"
    assert others == others_then, "open files and threads"
