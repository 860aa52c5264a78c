"""Where a training step spends its time: feedforward blocks, attention, output layer, optimiser, and the rest.

Measured in steps of their own by hooks on the modules. Forward: from entering a module to leaving it. Backward: from the
gradient of its output being there to the gradients of its inputs being there; the engine of a CPU runs one node after the
other, latest first, so that a module's nodes are not mixed with another's. The output layer includes the loss: in forward until
the loss is there, in backward from the start. The optimiser includes zeroing and clipping the gradients. The rest is the whole
minus the parts: embedding, layer norms, dropout, residuals, memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, final

from torch import nn

from sparseffn.bench.timing import Clock
from sparseffn.models import TransformerXL
from sparseffn.models.transformer_xl import Block

PARTS: tuple[str, ...] = ("feedforward", "attention", "output layer", "optimiser")


@final
class PartClock:
    """Adds up the time of each part of one step."""

    def __init__(self, model: TransformerXL, clock: Clock = time.perf_counter) -> None:
        self.clock = clock
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.handles: list[Any] = []
        self.started: dict[int, float] = {}
        self.output_at = 0.0
        for layer in model.layers:
            assert isinstance(layer, Block), "a Transformer-XL is made of blocks"
            self._watch(layer.ffn, "feedforward")
            self._watch(layer.attention, "attention")
        self.handles.append(model.output.register_forward_pre_hook(self._output_begins))
        self.handles.append(model.output.register_full_backward_hook(self._output_ends))

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self.handles:
            handle.remove()

    def loss_is_there(self) -> None:
        """Forward is over: ends the output layer's forward, and begins its backward."""
        now = self.clock()
        self.seconds["output layer"] += now - self.output_at
        self.output_at = now

    def add(self, part: str, call: Callable[[], object]) -> None:
        """Time a call that is no module's."""
        start = self.clock()
        call()
        self.seconds[part] += self.clock() - start

    def _watch(self, module: nn.Module, part: str) -> None:
        """Add a module's forward and backward to a part."""

        def begin(*args: object) -> None:
            self.started[id(module)] = self.clock()

        def end(*args: object) -> None:
            self.seconds[part] += self.clock() - self.started[id(module)]

        self.handles += [
            module.register_forward_pre_hook(begin),
            module.register_forward_hook(end),
            module.register_full_backward_pre_hook(begin),
            module.register_full_backward_hook(end),
        ]

    def _output_begins(self, *args: object) -> None:
        self.output_at = self.clock()

    def _output_ends(self, *args: object) -> None:
        self.seconds["output layer"] += self.clock() - self.output_at


def whole_with_rest(parts: dict[str, float], whole_s: float) -> dict[str, float]:
    """The parts and what is left of the whole."""
    return {**parts, "rest": whole_s - sum(parts.values())}


def no_clock(part: str, call: Callable[[], object]) -> None:
    """Runs a call without timing it: the place of `PartClock.add` in a step that is timed as a whole."""
    call()
