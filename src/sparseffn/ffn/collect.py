"""`collect_stats`: routing statistics of the layers inside a model whose code knows nothing of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparseffn.errors import UserError
from sparseffn.ffn.feedforward import FeedForward
from sparseffn.ffn.routing_stats import RoutingStats
from sparseffn.ops.library import runs_in_backward


class CollectedStats(dict[str, list[RoutingStats]]):
    """Statistics by layer name, one entry for each time that the layer ran."""

    def _all(self) -> list[RoutingStats]:
        return [stats for calls in self.values() for stats in calls]

    @property
    def balance_loss(self) -> Tensor:
        """Sum of the balancing losses over layers and calls.

        Raises:
            UserError: no layer has run, so that there is no loss to add.
        """
        losses = [stats.balance_loss.float() for stats in self._all()]
        if not losses:
            raise UserError(
                "no layer reported: the model must run inside `with collect_stats(model)`; "
                "fix: call it there, and compile it, if at all, inside too or pass return_stats=True"
            )
        return torch.stack(losses).sum()

    @property
    def entropy(self) -> float:
        """Mean over layers and calls of each one's entropy as a share of its maximum, log n_units."""
        shares = [float(s.entropy) / math.log(len(s.counts)) for s in self._all() if len(s.counts) > 1]
        return sum(shares) / max(len(shares), 1)


@contextmanager
def collect_stats(model: nn.Module) -> Iterator[CollectedStats]:
    """Collect the statistics of every `FeedForward` in `model` while the context is open.

    Hooks ask each layer for its statistics and take them off its output again; they are removed on leaving. Each call is
    counted once: recomputation by non-re-entrant checkpointing is not, whether backward runs inside the context or after
    it. Re-entrant checkpointing is refused. Contexts may be nested.

    Example:
        with collect_stats(model) as stats:
            loss = criterion(model(x), y) + stats.balance_loss

    Raises:
        UserError: `model` holds no such layer, or runs under re-entrant checkpointing.
    """
    layers = {name or "layer": module for name, module in model.named_modules() if isinstance(module, FeedForward)}
    if not layers:
        raise UserError("`model` must hold a sparseffn layer; got none; fix: build one with `FFNConfig.build()`")
    collected = CollectedStats({name: [] for name in layers})
    with ExitStack() as stack:
        for name, layer in layers.items():
            before, after = _hooks(name, collected)
            stack.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
            # Contexts nest like brackets: the last one opened sees the output first.
            stack.callback(layer.register_forward_hook(after, prepend=True).remove)
        yield collected


def _hooks(name: str, collected: CollectedStats) -> tuple[Any, Any]:
    ours = {"asked": False}

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        ours["asked"] = not kwargs.get("return_stats", False)
        return args, {**kwargs, "return_stats": True}

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        y, stats = output
        # That is how non-re-entrant checkpointing recomputes.
        if not runs_in_backward():
            collected[name].append(stats)
        return y if ours["asked"] else output

    return before, after
