"""Evaluation, with a Transformer-XL's memory: every token of a split but the first is predicted exactly once."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparseffn.data import EvalWindow, evaluation_windows
from sparseffn.devices import autocast, to_device
from sparseffn.distribution import World
from sparseffn.errors import NonFiniteError, UserError
from sparseffn.ffn import CollectedStats, collect_stats
from sparseffn.models import LanguageModel

OnProgress = Callable[[int, int], None]


class NonFiniteLossError(NonFiniteError):
    """A loss or a gradient became infinite or not a number."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Loss over a split."""

    nats_per_token: float
    """Mean cross-entropy of the predictions, without any balancing loss."""
    n_predictions: int
    """Predictions made: tokens of the split less one."""
    window_nats: np.ndarray = field(compare=False, repr=False)
    """`[n]`, mean cross-entropy of each stream's windows of `context` tokens, one stream after the other: neighbours in the
    text are neighbours here. A stream's last window may be shorter."""


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats of each prediction, float32 (float64 of float64), of targets' shape."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    tokens: np.ndarray,
    *,
    batch: int = 8,
    context: int = 256,
    memory: int = 1024,
    precision: str = "float32",
    max_tokens: int | None = None,
    world: World | None = None,
    on_progress: OnProgress | None = None,
    observe: Callable[[CollectedStats, EvalWindow], None] | None = None,
) -> Evaluation:
    """Mean loss of a model on a split, memory carried from window to window, on the model's device.

    Sums stay on the device until the last window, so that nothing waits for it before.

    Args:
        model: put into evaluation mode, and back as it was on leaving.
        tokens: `[n]`, the split.
        batch: streams that the split is cut into, each starting with an empty memory; 1 is exact, more is faster.
        context: tokens of a window.
        memory: hidden states of earlier windows that are attended to; the paper uses 4 x the training context.
        precision: float32, or bfloat16 or float16 (autocast).
        max_tokens: use only the first so many tokens; None for all.
        world: processes that share the streams and must all call this; each gets the whole result. None: this one alone.
        on_progress: called with the number of tokens done and of all, after every window that was given to the device.
        observe: called with the routing statistics of every window, and the window, on the CPU; None leaves them uncomputed.

    Raises:
        UserError: there are fewer than two tokens, or a size is out of range.
        NonFiniteLossError: the loss is not finite.
    """
    if memory < 0:
        raise UserError(f"`memory` must be at least 0; got {memory}; fix: 0 attends to the window alone")
    tokens = tokens if max_tokens is None else tokens[:max_tokens]
    device, world = next(model.parameters()).device, world or World()
    was_training = model.training
    model.eval()
    count, state = 0, None
    total = torch.zeros((), dtype=torch.float64, device=device)
    windows: list[Tensor] = []
    try:
        for window in (_own_streams(w, world) for w in evaluation_windows(tokens, batch=batch, context=context)):
            with autocast(precision, device), nullcontext() if observe is None else collect_stats(model) as stats:
                output = model(to_device(window.inputs, device), state, memory_length=memory)
            if observe is not None and stats is not None:
                observe(stats, window)
            state = output.memory
            losses = token_losses(output.logits, to_device(window.targets, device))
            # Places in place of a mask, whose length the host would have to ask for.
            counted = to_device(window.mask.flatten().nonzero().flatten(), device)
            total += losses.flatten()[counted].double().sum()
            windows.append(_row_means(losses, to_device(window.mask, device)))
            count += len(counted)
            if on_progress is not None:
                on_progress(count, len(tokens) - 1)
    finally:
        model.train(was_training)
    # Rows that end before the last window have no mean there.
    means = torch.stack(windows, dim=1)
    if not world.is_alone:
        count = int(world.sum(torch.tensor(count, device=device)))
        total, means = world.sum(total), world.gather(means)
    nats = float(total) / max(count, 1)
    if not np.isfinite(nats):
        raise NonFiniteLossError(f"the evaluation loss must be finite; got {nats}; fix: train with a lower lr, or in float32")
    means = means.flatten().cpu()
    return Evaluation(nats_per_token=nats, n_predictions=count, window_nats=means[~means.isnan()].numpy())


def _own_streams(window: EvalWindow, world: World) -> EvalWindow:
    """This process's streams of a window: equally many in each, of which those that are too many count for nothing."""
    if world.is_alone:
        return window
    n = len(window.mask)
    each = -(-n // world.size)
    rows = torch.arange(world.rank * each, (world.rank + 1) * each)
    there = (rows < n)[:, None]
    rows = rows.clamp_max(n - 1)
    return EvalWindow(window.inputs[rows], window.targets[rows], window.mask[rows] & there)


def _row_means(losses: Tensor, mask: Tensor) -> Tensor:
    """float64 `[batch]`: mean of each row's losses that count; NaN where none does."""
    return losses.double().where(mask, 0.0).sum(dim=1) / mask.sum(dim=1)
