"""A whole training step, interleaved in one run: relative against plain attention, and a method against the dense block."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch

from sparseffn.bench.head import result
from sparseffn.bench.parts import PartClock, no_clock, whole_with_rest
from sparseffn.bench.timing import Clock, interleaved, medians, ratio
from sparseffn.errors import UserError
from sparseffn.models import PlainAttention, RelativeAttention, TransformerXL, TransformerXLConfig
from sparseffn.models.attention import Attention
from sparseffn.training import TrainConfig
from sparseffn.training.step import make_optimizer, training_loss


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """Sizes of a training step."""

    batch: int = 4
    """Streams."""
    context: int = 256
    """Tokens of a window."""
    memory: int = 256
    """Positions before the window that are attended to."""

    def __post_init__(self) -> None:
        if min(self.batch, self.context) < 1 or self.memory < 0:
            raise UserError(
                f"`batch` and `context` must be at least 1 and `memory` at least 0; got {self.batch}, {self.context}, "
                f"{self.memory}; fix: --batch 4"
            )

    def config(self) -> TrainConfig:
        """The settings of the training loop, optimiser included."""
        return TrainConfig(steps=1, batch=self.batch, context=self.context, memory=self.memory)


@final
class Step:
    """One model's training step on random tokens with a full memory, as the training loop takes it."""

    def __init__(self, config: TransformerXLConfig, shape: StepShape, attention: type[Attention] = RelativeAttention) -> None:
        self.model = TransformerXL(config, attention).train()
        self.model.init_parameters(0)
        self.config = shape.config()
        self.optimizer = make_optimizer(self.model, self.config)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(config.vocab_size, (shape.batch, shape.context + 1), generator=generator)
        self.inputs, self.targets = tokens[:, :-1], tokens[:, 1:]
        size = (shape.batch, shape.memory, config.d_model)
        self.memory = tuple(torch.randn(size, generator=generator) for _ in self.model.layers)

    def run(self) -> None:
        """The step, timed as a whole by the caller."""
        self._run(lambda: None, no_clock)

    def run_in_parts(self, clock: Clock = time.perf_counter) -> dict[str, float]:
        """The step with its time split into parts, which add up to the whole."""
        parts = PartClock(self.model, clock)
        start = clock()
        try:
            self._run(parts.loss_is_there, parts.add)
        finally:
            parts.remove()
        return whole_with_rest(parts.seconds, clock() - start)

    def _run(self, loss_is_there: Callable[[], None], timed: Callable[[str, Callable[[], object]], None]) -> None:
        timed("optimiser", lambda: self.optimizer.zero_grad(set_to_none=True))
        loss, balance, _ = training_loss(self.model, self.inputs, self.targets, self.memory, self.config)
        total = loss + balance
        loss_is_there()
        total.backward()
        timed("optimiser", self._update)

    def _update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()


def attention_ratio(config: TransformerXLConfig, shape: StepShape, *, rounds: int = 5) -> dict[str, Any]:
    """Time of a training step with relative over one with plain attention, all else equal.

    Args:
        config: the model.
        shape: of the step.
        rounds: timed steps of each.

    Returns:
        Median seconds of both, their ratio, and all timings.
    """
    kinds: dict[str, type[Attention]] = {"relative": RelativeAttention, "plain": PlainAttention}
    steps = {name: Step(config, shape, attention) for name, attention in kinds.items()}
    times = interleaved({name: step.run for name, step in steps.items()}, rounds=rounds, warmup=1)
    return {"seconds": medians(times), "ratio": ratio(times, "relative", "plain"), "times": times}


def method_steps(models: Mapping[str, TransformerXLConfig], shape: StepShape, *, rounds: int = 5) -> dict[str, Any]:
    """Time of a training step of several models, the first of which is the base of ratios, and how each is split.

    Args:
        models: by label, the base first.
        shape: of the step.
        rounds: timed steps of each, and of each with its parts.

    Returns:
        For each label: median seconds, the ratio to the base, all timings, and the parts of the step whose whole is the median.
    """
    steps = {label: Step(config, shape) for label, config in models.items()}
    times = interleaved({label: step.run for label, step in steps.items()}, rounds=rounds, warmup=1)
    runs = [{label: step.run_in_parts() for label, step in steps.items()} for _ in range(rounds)]
    split = {label: _middle([run[label] for run in runs]) for label in steps}
    base = next(iter(models))
    return {
        label: {
            "seconds": statistics.median(times[label]),
            "over_base": ratio(times, label, base),
            "times": times[label],
            "parts": split[label],
            "parts_whole_s": sum(split[label].values()),
            "params": models[label].num_params(),
        }
        for label in models
    }


def _middle(runs: list[dict[str, float]]) -> dict[str, float]:
    """The run whose whole is the median: unlike the medians of the parts, its parts add up."""
    return sorted(runs, key=lambda run: sum(run.values()))[len(runs) // 2]


def step_result(
    shape: StepShape, settings: Mapping[str, Any], *, attention: Mapping[str, Any], methods: Mapping[str, Any]
) -> dict[str, Any]:
    """The JSON-able result of both measurements; `seconds`, `ratio` and `times` are those of the attentions."""
    sizes = {"batch": shape.batch, "context": shape.context, "memory": shape.memory}
    return result("step", torch.device("cpu"), {**settings, **sizes}, **attention, methods=dict(methods))
