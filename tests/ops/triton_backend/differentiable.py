"""`route`, `experts` and `cvmm` on Triton's kernels with their gradients, called without PyTorch's dispatcher: for the CPU
tensors that interpreted kernels take it would find the CPU's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
    def forward(ctx: Any, x: Tensor, selector: Tensor, k: int, gate: str) -> tuple[Tensor, Tensor, Tensor]:
        logits, indices, gates, shares = operations.route_kept(x, selector, k, gate)
        ctx.arguments, ctx.kept = (x, selector, k, gate), (indices, gates, shares)
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        return logits, indices, gates

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        logits, _, gates = grads
        return *operations.route_backward(logits, gates, *ctx.arguments, *ctx.kept), None, None


class _Cvmm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        ctx.arguments = arguments
        return operations.cvmm(*arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight = operations.cvmm_backward(*grads, *ctx.arguments)
        return x, None, weight


def cvmm(x: Tensor, sel: Tensor, weight: Tensor) -> Tensor:
    """As `ops.cvmm`' schema."""
    return _Cvmm.apply(x, sel, weight)  # pyright: ignore[reportReturnType]


def experts(*arguments: Any) -> Tensor:
    """As `ops.experts`' schema; the kernels for evaluation where nothing is differentiated."""
    if not torch.is_grad_enabled():
        return operations.experts(*arguments)
    return _Experts.apply(*arguments, *_DEFAULTS[len(arguments) - 5 :])


def route(x: Tensor, selector: Tensor, k: int, gate: str) -> tuple[Tensor, Tensor, Tensor]:
    """As `ops.route`' schema."""
    return _Route.apply(x, selector, k, gate) if torch.is_grad_enabled() else operations.route(x, selector, k, gate)
