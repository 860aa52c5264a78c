"""What a class of faults came to."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field


@dataclass
class Tally:
    """Faults of one class: tried, survived, lost."""

    name: str
    deadline: float
    """On `time.monotonic`, after which no more are tried."""
    tried: int = 0
    lost: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)

    def add(self, n: int, *, lost: int, what: str, outcome: str = "") -> None:
        """Count faults; those that were lost are shown."""
        self.tried += n
        self.lost += lost
        if outcome:
            self.outcomes[outcome] = self.outcomes.get(outcome, 0) + n
        if lost:
            sys.stderr.write(f"LOST {self.name}: {what}\n")

    def time_is_left(self) -> bool:
        return time.monotonic() < self.deadline

    def line(self) -> str:
        """For example `kill -9   200 tried, 200 survived, 0 lost`."""
        outcomes = ", ".join(f"{n} {name}" for name, n in sorted(self.outcomes.items()))
        survived = self.tried - self.lost
        more = f" ({outcomes})" if outcomes else ""
        return f"{self.name:<12}{self.tried:>7} tried, {survived:>6} survived, {self.lost} lost{more}"
