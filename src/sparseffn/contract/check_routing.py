"""Checks of mask, statistics, their collection, and activation checkpointing."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparseffn.contract.harness import ATOL, contract, differ, make_layer, require, seeded, tokens
from sparseffn.errors import UserError
from sparseffn.ffn import FeedForward, FFNConfig, RoutingStats, collect_stats


@contract
def mask(config: FFNConfig) -> None:
    """Padding gets output 0, changes nothing for other tokens, and does not count."""
    x, real = tokens(config, 14), torch.arange(14) % 3 != 1
    layer = make_layer(config)
    y, stats = layer(x, mask=real, return_stats=True)
    alone, alone_stats = layer(x[real], return_stats=True)
    require(not bool(y[~real].any()), "padding has an output other than 0")
    require(differ(y[real], alone) <= ATOL, "tokens beside padding have another output than without it")
    require(torch.equal(stats.counts, alone_stats.counts), "padding is counted")
    require(differ(stats.balance_loss, alone_stats.balance_loss) <= ATOL, "padding changes the balancing loss")
    require(int(stats.n_tokens) == int(real.sum()), "padding is among n_tokens")
    layer.train()
    before = seeded(lambda: layer(x, mask=real))
    garbage = x.masked_fill(~real[:, None], 1e3)
    require(differ(before, seeded(lambda: layer(garbage, mask=real))) <= ATOL, "what stands in padding matters in training")
    require(not bool(layer(x, mask=torch.zeros(14, dtype=torch.bool)).any()), "a batch of padding has an output")


@contract
def stats(config: FFNConfig) -> None:
    """Statistics are consistent, change nothing, and a balancing loss with a weight has a gradient."""
    x = tokens(config, 20)
    layer = make_layer(config, training=True)
    plain = seeded(lambda: layer(x))
    y, found = seeded(lambda: layer(x, return_stats=True))
    require(differ(plain, y) == 0.0, "asking for statistics changes the output")
    require(int(found.n_tokens) == 20, f"n_tokens is {int(found.n_tokens)} for 20 tokens")
    require(int(found.counts.sum()) == int(found.active.sum()), "counts by unit and by token do not add up to the same")
    require(found.balance_loss.dim() == 0, "balance_loss is not a scalar")
    require(not found.counts.requires_grad and not found.weights.requires_grad, "counts or weights carry a graph")
    if not any(weight > 0 for weight in config.balancing().values()):
        require(float(found.balance_loss.detach()) == 0.0, "balance_loss is not 0 although no weight is set")
        return
    require(found.balance_loss.requires_grad, "a balancing weight is set but balance_loss has no gradient")
    grads = torch.autograd.grad(found.balance_loss, list(layer.parameters()), allow_unused=True)
    require(any(g is not None and bool(g.any()) for g in grads), "the balancing loss reaches no parameter")


class _Foreign(nn.Module):
    """A model that knows nothing of statistics, with or without activation checkpointing."""

    def __init__(self, layer: FeedForward, *, checkpointed: bool, reentrant: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(layer.config.d_model, dtype=torch.float64)
        self.layer, self.checkpointed, self.reentrant = layer, checkpointed, reentrant

    def body(self, x: Tensor) -> Tensor:
        return x + self.layer(self.norm(x))

    def forward(self, x: Tensor) -> Tensor:
        if not self.checkpointed:
            return self.body(x)
        y = checkpoint(self.body, x, use_reentrant=self.reentrant)
        assert isinstance(y, Tensor), "body returns a tensor"
        return y


@contract
def collection(config: FFNConfig) -> None:
    """`collect_stats` sees each call once, with and without checkpointing, and gradients are the same."""
    layer = make_layer(config, training=True)
    wanted, calls, _ = _collect(_Foreign(layer, checkpointed=False), config, inside=True)
    require(calls == 1, f"a call was counted {calls} times")
    for inside in (True, False):
        where = "inside" if inside else "after"
        got, calls, found = _collect(_Foreign(layer, checkpointed=True), config, inside=inside)
        require(calls == 1, f"under checkpointing with backward {where} the context a call was counted {calls} times")
        require(int(found.n_tokens) == 12, "the statistics are of another number of tokens")
        gap = max((differ(a, b) for a, b in zip(got, wanted, strict=True)), default=0.0)
        require(gap <= ATOL, f"gradients under checkpointing with backward {where} the context differ by {gap:.2g}")
    try:
        _collect(_Foreign(layer, checkpointed=True, reentrant=True), config, inside=True)
    except UserError:
        return
    require(False, "re-entrant checkpointing is accepted, under which the balancing loss has no gradient")


def _collect(model: _Foreign, config: FFNConfig, *, inside: bool) -> tuple[list[Tensor], int, RoutingStats]:
    """Gradients of a step, calls counted and their statistics."""
    model.zero_grad(set_to_none=True)
    x = tokens(config).requires_grad_()
    torch.manual_seed(7)
    with collect_stats(model) as collected:
        loss = (model(x) * tokens(config, seed=3)).sum() + collected.balance_loss
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    calls = collected["layer"]
    return [p.grad for p in model.parameters() if p.grad is not None], len(calls), calls[0]
