"""What `sparseffn plan` says beside what was measured: `results/planned.json`, as `tools/planned.py` writes it."""

from __future__ import annotations

from typing import Any

import msgspec

from sparseffn.storage import PositiveInt


class PlannedRun(msgspec.Struct, frozen=True, kw_only=True):
    """One step in some processes; bytes are those of one of them."""

    processes: PositiveInt
    strategy: str
    method: str
    accumulation: PositiveInt
    planned_sent: int
    counted_sent: int
    """Of the collectives that were called, at what a ring sends of each."""
    wire_sent: int | None
    """By gloo, headers included; None where the network was not this run's alone."""
    planned_peak: PositiveInt
    measured_peak: PositiveInt


class PlannedResult(msgspec.Struct, frozen=True, kw_only=True):
    """All of them."""

    preset: str
    batch: PositiveInt
    """Streams of all processes."""
    context: PositiveInt
    environment: dict[str, Any]
    runs: list[PlannedRun]
