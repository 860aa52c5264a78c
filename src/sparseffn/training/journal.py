"""What a run says of its steps: lines of `metrics.jsonl`, warnings, and reports to whoever called it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

from sparseffn.data import Unit
from sparseffn.training.config import TrainConfig
from sparseffn.training.health import LossSpikes
from sparseffn.training.run_folder import RunFolder
from sparseffn.training.stepper import StepNumbers

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one step did, for a progress bar."""

    step: int
    """Steps done."""
    n_steps: int
    loss: float
    """Cross-entropy in nats a token, without the balancing loss."""
    balance_loss: float
    unit: Unit
    """What a token is, which sets the metric of the loss."""
    tokens_per_s: float
    seconds_left: float


OnStep = Callable[[StepReport], None]
OnMetrics = Callable[[dict[str, Any]], None]


@final
class Journal:
    """The records of a run. In another process than the first it keeps silent: all of them have the same to say."""

    def __init__(
        self,
        folder: RunFolder,
        config: TrainConfig,
        unit: Unit,
        *,
        speaks: bool,
        on_step: OnStep | None = None,
        on_metrics: OnMetrics | None = None,
    ) -> None:
        self.folder, self.config, self.speaks = folder, config, speaks
        self.unit: Unit = unit
        self._on_step, self._on_metrics = on_step, on_metrics
        self._spikes = LossSpikes()

    def go_on(self) -> None:
        """Read what was written before, which losses are told from."""
        before = self.folder.read_metrics() if self.speaks else []
        self._spikes = LossSpikes(record["loss"] for record in before if "loss" in record)

    def record(self, record: dict[str, Any]) -> None:
        """Add a line to the metrics."""
        if not self.speaks:
            return
        self.folder.append_metrics(record)
        if self._on_metrics is not None:
            self._on_metrics(record)

    def warn(self, step: int, warning: str | None) -> None:
        """Log and record a warning, if there is one."""
        if self.speaks and warning is not None:
            _log.warning("step %d: %s", step, warning)
            self.record({"step": step, "warning": warning})

    def report(self, step: int, numbers: StepNumbers, *, seconds: float, seconds_of_all: float) -> None:
        """A step that was taken: its seconds, and those of all up to it."""
        if not self.speaks:
            return
        record: dict[str, Any] = {"step": step, "loss": numbers.loss, "balance_loss": numbers.balance_loss}
        if numbers.finite:
            record["grad_norm"] = numbers.grad_norm
        record["lr"] = self.config.lr_at(step - 1)
        if self.config.precision == "float16":
            record["loss_scale"] = numbers.loss_scale
        self.record({**record, "time_s": round(seconds_of_all, 4)})
        self.warn(step, self._spikes.note(numbers.loss))
        if self._on_step is not None:
            report = StepReport(
                step=step,
                n_steps=self.config.steps,
                loss=numbers.loss,
                balance_loss=numbers.balance_loss,
                unit=self.unit,
                tokens_per_s=self.config.tokens_per_step / seconds,
                seconds_left=(self.config.steps - step) * seconds_of_all / step,
            )
            self._on_step(report)
