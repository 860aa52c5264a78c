"""Operations on Triton's kernels with their gradients, called without PyTorch's dispatcher: for the CPU tensors that
interpreted kernels take it would find the CPU's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from sparseffn import ops
from sparseffn.ops.triton import operations

# Of the arguments from the gate keys on: backward takes all of them.
_DEFAULTS = (None, None, None, None, None, 1.0, "relu", 1.702, 7.0, None)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        y, *kept = operations.experts_kept(*arguments)
        ctx.arguments, ctx.kept = arguments, kept
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        found = operations.experts_backward(*grads, *ctx.arguments, *ctx.kept)
        x, keys, values, gates, *rest = (
            g if g.numel() or a is not None else None for g, a in zip(found, _given(ctx), strict=True)
        )
        return x, keys, values, gates, None, *rest, *[None] * (len(ctx.arguments) - 9)


def _given(ctx: Any) -> list[Tensor | None]:
    x, keys, values, gates, _, *rest = ctx.arguments[:9]
    return [x, keys, values, gates, *rest]


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, selector: Tensor, k: int, gate: str, keep: Any) -> tuple[Tensor, Tensor, Tensor]:
        logits, indices, gates, shares = operations.route_kept(x, selector, k, gate, keep)
        ctx.arguments, ctx.kept = (x, selector, k, gate), (indices, gates, shares)
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        return logits, indices, gates

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        logits, _, gates = grads
        return *operations.route_backward(logits, gates, *ctx.arguments, *ctx.kept), None, None, None


class _Choose(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, spread: Any, k: int, gate: str, keep: Any, ranks: Any, noise: Any) -> Any:
        gates, indices = operations.choose_kept(logits, k, gate, keep, ranks, spread, noise)
        ctx.arguments, ctx.is_noisy = (logits, k, gate, spread, noise, gates, indices), noise is not None
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        return gates, indices

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        of_logits, of_spread = operations.choose_backward(grads[0], *ctx.arguments)
        return of_logits, of_spread if ctx.is_noisy else None, None, None, None, None, None


class _Cvmm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        ctx.arguments = arguments
        return operations.cvmm(*arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight = operations.cvmm_backward(*grads, *ctx.arguments)
        return x, None, weight


class _RouterLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, selector: Tensor) -> Tensor:
        ctx.arguments = x, selector
        return operations.router_logits(x, selector)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return operations.router_logits_backward(*grads, *ctx.arguments)


class _BatchEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        loss, kept = operations.batch_entropy_kept(logits, mask, scale)
        ctx.arguments = logits, mask, scale, kept
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return operations.batch_entropy_backward(*grads, *ctx.arguments), None, None


class _SwitchBalance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, indices: Tensor, weights: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        loss, slopes = operations.switch_balance_kept(logits, indices, weights, mask, scale)
        ctx.arguments = logits, mask, scale, slopes
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return operations.switch_balance_backward(*grads, *ctx.arguments), None, None, None, None


class _LoadVariation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, indices: Tensor, n_experts: int, scale: float) -> Tensor:
        loss, slopes = operations.load_variation_kept(weights, indices, n_experts, scale)
        ctx.arguments = weights, indices, slopes
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return operations.load_variation_backward(*grads, *ctx.arguments), None, None, None


def cvmm(x: Tensor, sel: Tensor, weight: Tensor) -> Tensor:
    """As `ops.cvmm`' schema."""
    return _Cvmm.apply(x, sel, weight)  # pyright: ignore[reportReturnType]


def experts(*arguments: Any) -> Tensor:
    """As `ops.experts`' schema; the kernels for evaluation where nothing is differentiated."""
    if not torch.is_grad_enabled():
        return operations.experts(*arguments)
    return _Experts.apply(*arguments, *_DEFAULTS[len(arguments) - 5 :])


def route(x: Tensor, selector: Tensor, k: int, gate: str, keep: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """As `ops.route`' schema."""
    run = _Route.apply if torch.is_grad_enabled() else operations.route
    return run(x, selector, k, gate, keep)  # pyright: ignore[reportReturnType]


def choose(
    logits: Tensor, k: int, gate: str, keep: Tensor | None = None, ranks: Tensor | None = None, spread: Tensor | None = None,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `ops.choose`' schema."""
    if not torch.is_grad_enabled():
        return operations.choose(logits, k, gate, keep, ranks, spread, noise)
    return _Choose.apply(logits, spread, k, gate, keep, ranks, noise)  # pyright: ignore[reportReturnType]


@contextmanager
def in_layers() -> Iterator[None]:
    """Layers of mixtures compute by these operations, as they do on a GPU; the others are those of the CPU."""

    def public_experts(
        *tensors: Tensor, gate_keys: Tensor | None, activation: str, dropout: float, inner_k: int | None
    ) -> Tensor:
        assert dropout == 0.0, "the mask is drawn by the public function, which this one is not"
        return experts(*tensors, gate_keys, None, None, None, None, 1.0, activation, *_DEFAULTS[7:9], inner_k)

    replaced = {
        "route": lambda x, selector, *, k, gate, keep=None: route(x, selector, k, gate, keep),
        "experts": public_experts,
        "choose": lambda logits, *, k, gate, **given: choose(logits, k, gate, **given),
        "over_capacity": lambda indices, weights, *, n_experts, factor, mask, group: operations.over_capacity(
            indices, weights.detach(), n_experts, factor, mask
        ),
        "sinkhorn": lambda scores, mask, *, backend, released=False: operations.sinkhorn(
            scores, mask, 3, -1.0 if released else 1.0
        ),
        "router_logits": _RouterLogits.apply,
        "batch_entropy": lambda logits, mask, scale, *, group: _BatchEntropy.apply(logits, mask, scale),
        "switch_balance": lambda logits, indices, weights, mask, scale, *, group: _SwitchBalance.apply(
            logits, indices, weights.detach(), mask, scale
        ),
        "load_variation": lambda weights, indices, n_experts, scale, *, group: _LoadVariation.apply(
            weights, indices, n_experts, scale
        ),
        "routing_counts": lambda indices, weights, n: operations.routing_counts(indices, weights.detach(), n),
        "topk": lambda scores, k: operations.topk(scores.detach(), k, True),
    }
    with ExitStack() as stack:
        for name, function in replaced.items():
            stack.enter_context(mock.patch.object(ops, name, function))
        yield
