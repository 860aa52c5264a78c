"""A whole training step, interleaved in one run: relative against plain attention, and methods against the dense block.

Where a step spends its time is measured in steps of their own by hooks on the modules. Forward: from entering a module to
leaving it. Backward: from the gradient of its output being there to the gradients of its inputs being there; the engine runs
one node after the other, latest first, so that a module's nodes are not mixed with another's. The output layer includes the
loss and both backwards. The optimiser begins where the last gradient is there, and includes clipping. The rest is the whole
minus the parts: embedding, layer norms, dropout, residuals, memory. On a GPU every look at the clock waits for the device, so
that a step in parts takes longer than one that is timed as a whole.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import nn

from sparseffn.bench.machine import clock_of, head
from sparseffn.bench.timing import Clock, interleaved, medians, ratio
from sparseffn.devices import Precision
from sparseffn.errors import UserError
from sparseffn.models import PlainAttention, RelativeAttention, TransformerXL, TransformerXLConfig
from sparseffn.models.attention import Attention
from sparseffn.models.transformer_xl import Block
from sparseffn.results.bench_result import MethodStep, StepResult, StepSettings
from sparseffn.training import TrainConfig
from sparseffn.training.stepper import Stepper

PARTS: tuple[str, ...] = ("feedforward", "attention", "output layer", "optimiser")
CPU = torch.device("cpu")
# The time of a step does not depend on the rate.
_LR = 2.5e-4


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """Sizes of a training step, its precision and where it is taken."""

    batch: int = 4
    context: int = 256
    """Tokens of a window."""
    memory: int = 256
    """Positions before the window that are attended to."""
    precision: Precision = "float32"
    device: torch.device = CPU

    def __post_init__(self) -> None:
        if min(self.batch, self.context) < 1 or self.memory < 0:
            raise UserError(
                f"`batch` and `context` must be at least 1 and `memory` at least 0; got {self.batch}, {self.context}, "
                f"{self.memory}; fix: --batch 4"
            )

    def config(self) -> TrainConfig:
        """The settings of the training loop, optimiser included."""
        return TrainConfig(steps=1, batch=self.batch, context=self.context, memory=self.memory, precision=self.precision)


@final
class Step:
    """One model's training step on random tokens with a full memory, as the trainer takes it."""

    def __init__(self, config: TransformerXLConfig, shape: StepShape, attention: type[Attention] = RelativeAttention) -> None:
        self.model = TransformerXL(config, attention).train()
        self.model.init_parameters(0)
        self.model.to(shape.device)
        self.stepper = Stepper(self.model, shape.config())
        self.clock = clock_of(shape.device)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(config.vocab_size, (shape.batch, shape.context + 1), generator=generator)
        self.inputs, self.targets = tokens[:, :-1], tokens[:, 1:]
        size = (shape.batch, shape.memory, config.d_model)
        self.memory = tuple(torch.randn(size, generator=generator).to(shape.device) for _ in self.model.layers)

    def run(self) -> None:
        """The step, timed as a whole by the caller."""
        self.stepper.memories = [self.memory]
        self.stepper.take(self.inputs, self.targets, _LR)

    def run_in_parts(self, clock: Clock | None = None) -> dict[str, float]:
        """The step with its time split into parts, which add up to the whole."""
        clock = clock or self.clock
        parts = PartClock(self.stepper, clock)
        start = clock()
        try:
            self.run()
        finally:
            for handle in parts.handles:
                handle.remove()
        return whole_with_rest(parts.seconds, clock() - start)


@final
class PartClock:
    """Adds up the time of each part of one step, until its `handles` are removed from the model."""

    def __init__(self, stepper: Stepper, clock: Clock) -> None:
        self.clock = clock
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.handles: list[Any] = []
        self.started: dict[str, float] = {}
        model = stepper.model
        assert isinstance(model, TransformerXL), "a step is timed within a Transformer-XL"
        for i, layer in enumerate(model.layers):
            assert isinstance(layer, Block), "a Transformer-XL is made of blocks"
            self._time(layer.ffn, "feedforward", i)
            self._time(layer.attention, "attention", i)
        self.handles += [
            model.output.register_forward_pre_hook(self._begin("output layer")),
            model.output.register_full_backward_hook(self._end("output layer")),
            # The first operation of a forward: nothing of backward comes after it.
            model.embedding.weight.register_post_accumulate_grad_hook(self._begin("optimiser")),
            stepper.optimizer.register_step_post_hook(self._end("optimiser")),
        ]

    def _time(self, module: nn.Module, part: str, layer: int) -> None:
        """Add a module's forward and backward to a part."""
        begin, end = self._begin(part, layer), self._end(part, layer)
        self.handles += [
            module.register_forward_pre_hook(begin),
            module.register_forward_hook(end),
            module.register_full_backward_pre_hook(begin),
            module.register_full_backward_hook(end),
        ]

    def _begin(self, part: str, layer: int = 0) -> Callable[..., None]:
        def begin(*args: object) -> None:
            self.started[f"{part} {layer}"] = self.clock()

        return begin

    def _end(self, part: str, layer: int = 0) -> Callable[..., None]:
        def end(*args: object) -> None:
            self.seconds[part] += self.clock() - self.started[f"{part} {layer}"]

        return end


def whole_with_rest(parts: dict[str, float], whole_s: float) -> dict[str, float]:
    return {**parts, "rest": whole_s - sum(parts.values())}


def bench_step(
    base: TransformerXLConfig, models: Mapping[str, TransformerXLConfig], shape: StepShape, settings: StepSettings
) -> StepResult:
    """Time the training step of `base` with either attention, and that of several models against the first of them.

    Args:
        settings: as the result shows them; `rounds` is the number of timed steps of each.
    """
    times = _in_turn({"relative": Step(base, shape), "plain": Step(base, shape, PlainAttention)}, shape, settings.rounds)
    return StepResult(
        **head(shape.device),
        settings=settings,
        seconds=medians(times),
        ratio=ratio(times, "relative", "plain"),
        times={name: tuple(values) for name, values in times.items()},
        methods=_method_steps(models, shape, settings.rounds),
    )


def _in_turn(steps: Mapping[str, Step], shape: StepShape, rounds: int) -> dict[str, list[float]]:
    calls = {label: step.run for label, step in steps.items()}
    return interleaved(calls, rounds=rounds, warmup=1, clock=clock_of(shape.device))


def _method_steps(models: Mapping[str, TransformerXLConfig], shape: StepShape, rounds: int) -> dict[str, MethodStep]:
    """Time of a training step of several models, the first of which is the base of ratios, and how each is split."""
    steps = {label: Step(config, shape) for label, config in models.items()}
    times = _in_turn(steps, shape, rounds)
    runs = [{label: step.run_in_parts() for label, step in steps.items()} for _ in range(rounds)]
    # The run whose whole is the median: unlike the medians of the parts, its parts add up.
    split = {label: sorted((run[label] for run in runs), key=_whole)[rounds // 2] for label in steps}
    base = next(iter(models))
    return {
        label: MethodStep(
            seconds=statistics.median(times[label]),
            over_base=ratio(times, label, base),
            times=tuple(times[label]),
            parts=split[label],
            parts_whole_s=_whole(split[label]),
            params=models[label].num_params(),
        )
        for label in models
    }


def _whole(parts: Mapping[str, float]) -> float:
    return sum(parts.values())
