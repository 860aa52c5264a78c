"""One run in several numbers of processes: `results/processes.json`, as `tools/processes.py` writes it."""

from __future__ import annotations

from typing import Any

import msgspec

from sparseffn.storage import Positive, PositiveInt

ROUNDING_STEPS = 20
"""Steps for which losses must agree to rounding; then near ties of routers may fall otherwise."""


class ProcessesRun(msgspec.Struct, frozen=True, kw_only=True):
    """The run in one number of processes."""

    processes: PositiveInt
    strategy: str
    losses: list[float]
    """Training loss of each step, nats a token."""
    tokens_per_s: Positive


class ProcessesResult(msgspec.Struct, frozen=True, kw_only=True):
    """All of them, the single process first."""

    method: str
    preset: str
    environment: dict[str, Any]
    runs: list[ProcessesRun]

    def difference(self, run: ProcessesRun, steps: int | None = None) -> float:
        """Largest difference of a run's losses to the single process's, in the first steps or in all."""
        pairs = zip(run.losses[:steps], self.runs[0].losses[:steps], strict=True)
        return max(abs(a - b) for a, b in pairs)

    def difference_in_words(self) -> str:
        first = max(self.difference(run, ROUNDING_STEPS) for run in self.runs)
        whole = max(self.difference(run) for run in self.runs)
        n = len(self.runs[0].losses)
        return f"largest difference to one process: {first:.1e} in the first {ROUNDING_STEPS} steps, {whole:.1e} in {n}"
