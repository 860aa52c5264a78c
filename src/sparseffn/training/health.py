"""What goes wrong in training, found and named: tensors that are not finite, losses that jump, experts that nobody selects."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from typing import final

import torch
from torch import Tensor

from sparseffn.evaluation import token_losses
from sparseffn.ffn.mixture import MixtureConfig
from sparseffn.models import LanguageModel

_NAMED = 3
"""Tensors that a message names."""

SPIKE_WINDOW = 64
SPIKE_SIGMAS, SPIKE_NATS = 6.0, 0.5
"""A loss is a spike if it is above the mean of the last ones by so many standard deviations, and by so many nats."""

DEAD_BELOW = 0.01
"""An expert is dead under this share of the mean load, as in the analysis of a run."""
COLLAPSE_FROM = 50
"""Steps before which a router has hardly learned, and its load says nothing."""
MAX_DEAD = 0.25
MAX_LOAD = 0.9
"""Experts have collapsed if more than a share of them is dead, or one is selected for almost every token."""


def where_not_finite(model: LanguageModel, losses: Tensor, inputs: Tensor, targets: Tensor, window: int) -> str:
    """Which tensors and which tokens a step failed by, as far as they can still be told.

    Args:
        model: after a step that was not taken: its gradients are those of the step.
        losses: `[batch, context]`, of each token in that step.
        inputs: the window's tokens, of the same shape.
        targets: the tokens that were to be predicted.
        window: number of the window.
    """
    found = []
    if places := (~losses.isfinite()).nonzero().tolist():
        stream, token = places[0]
        more = f", and {len(places) - 1} more of {losses.numel()}" if len(places) > 1 else ""
        found.append(f"the loss of token {token} in stream {stream} of window {window}{more}")
    parameters = _not_finite((name, parameter) for name, parameter in model.named_parameters())
    if parameters:
        found.append(f"parameters {_some(parameters)}")
    elif module := _first_module(model, inputs, targets):
        found.append(module)
    elif not places:
        gradients = _not_finite((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)
        found += [f"the gradients of {_some(gradients)}"] if gradients else []
    return "; ".join(found)


def _not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    return [name for name, tensor in tensors if not bool(_own(tensor).isfinite().all())]


def _own(tensor: Tensor) -> Tensor:
    """What this process has of a tensor, without asking others."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


@torch.no_grad()
def _first_module(model: LanguageModel, inputs: Tensor, targets: Tensor) -> str | None:
    """The first module whose output on a window, without memory and dropout, is not finite.

    Only where the whole model is in this process, and on the CPU: elsewhere a router that is not finite is an assertion of the
    device, which ends every work on it.
    """
    if inputs.device.type != "cpu" or next(model.parameters()).device.type != "cpu":
        return None
    if any(_own(parameter) is not parameter for parameter in model.parameters()):
        return None
    seen: list[str] = []

    def look(name: str) -> object:
        def hook(_: object, __: object, output: object) -> None:
            if isinstance(output, Tensor) and not bool(output.isfinite().all()):
                seen.append(name)

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]  # pyright: ignore[reportArgumentType]
    was_training = model.training
    model.eval()
    try:
        losses = token_losses(model(inputs).logits, targets)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    if seen:
        return f"the output of {seen[0]}"
    return None if bool(losses.isfinite().all()) else "the loss of finite logits"


@final
class LossSpikes:
    """Tells a loss that jumps from the noise of those before it."""

    def __init__(self, losses: Iterable[float] = ()) -> None:
        """`losses`: those of the steps before, the last of which count."""
        self._last = deque(losses, maxlen=SPIKE_WINDOW)

    def note(self, loss: float) -> str | None:
        """A step's loss; what is to be said of it, if it is a spike."""
        before = list(self._last)
        self._last.append(loss)
        if len(before) < SPIKE_WINDOW:
            return None
        mean = statistics.fmean(before)
        if loss <= mean + max(SPIKE_NATS, SPIKE_SIGMAS * statistics.pstdev(before)):
            return None
        return (
            f"the loss jumped to {loss:.3f} nats, from {mean:.3f} in the mean of the {SPIKE_WINDOW} steps before; "
            "fix: if it does not come back, lower lr or clip, or raise warmup, in a new --out"
        )


def collapse(selections: Sequence[Tensor], config: MixtureConfig) -> str | None:
    """What is to be said of experts that are hardly selected, if many are: the worst layer, and the remedy.

    Args:
        selections: int `[n_tokens, K]` of each layer, -1 for nothing.
        config: the layers'.
    """
    worst: tuple[float, float, int] | None = None
    for layer, chosen in enumerate(selections):
        counts = torch.bincount(chosen[chosen >= 0].long(), minlength=config.n_experts).double()
        mean, (n_tokens, k) = float(counts.mean()), chosen.shape
        dead, largest = float((counts < DEAD_BELOW * mean).double().mean()), float(counts.max())
        # With few experts, or all of them, one of them may well be selected for every token.
        hot = largest > MAX_LOAD * n_tokens and 4 * k <= config.n_experts
        if (dead > MAX_DEAD or hot) and (worst is None or (dead, largest / mean) > worst[:2]):
            worst = (dead, largest / mean, layer)
    if worst is None:
        return None
    dead, load, layer = worst
    weights = config.balancing()
    set_now = ", ".join(f"{name}_weight (now {value:g})" for name, value in weights.items() if value > 0)
    unset = ", ".join(f"{name}_weight" for name in weights)
    remedy = f"raise {set_now}" if set_now else f"set {unset}" if unset else "choose a method with a balancing loss"
    return (
        f"experts collapse: in layer {layer}, {dead:.0%} of {config.n_experts} experts have under 1% of the mean load, and the "
        f"largest load is {load:.1f} times the mean; fix: {remedy}, or lower lr, in a new --out"
    )
