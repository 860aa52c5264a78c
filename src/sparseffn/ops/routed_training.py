"""A mixture's router and experts as one differentiable operation for few tokens (equations 11 and 12).

The calls between logits, top-K, gates and experts, and autograd's between their gradients, take longer than a few tokens do.
For many tokens they are nothing, and the operations stand alone. Shapes: see ops/README.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparseffn.ops.backends import is_traced, kernel_beside, needs_gradient
from sparseffn.ops.routed_mlp import GateName
from sparseffn.ops.router_logits import FEW_TOKENS

# Gates whose gradient needs the gates alone. That of a softmax over all experts needs every logit.
_OF_CHOSEN: tuple[GateName, ...] = ("sigmoid", "renormalised")


class _Routed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        x, selector, keys, values, k, ctx.gate, ctx.activation = inputs
        run = kernel_beside("expert_mlp", "routed_training", x)
        ctx.run_backward = kernel_beside("expert_mlp", "routed_training_backward", x)
        assert run is not None, "runs_at_once says whether there is one"
        y, logits, indices, gates, kept = run(x, selector, keys, values, k, ctx.gate, ctx.activation)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, selector, keys, values, indices, gates, *kept)
        ctx.mark_non_differentiable(indices)
        return y, logits, indices, gates

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor | None, grad_logits: Tensor | None, _: None, grad_gates: Tensor | None
    ) -> Any:
        x, *others = ctx.saved_tensors
        if grad is None:
            # A balancing loss without the output's.
            grad = torch.zeros_like(x)
        return *ctx.run_backward(grad, grad_gates, grad_logits, x, *others, ctx.gate, ctx.activation), None, None, None


def runs_at_once(gate: GateName, x: Tensor, selector: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether `routed_training` can compute these: few tokens, in float32 or float64, and eagerly."""
    # Before a look at the number of tokens, which a compiled graph must not depend on.
    if gate not in _OF_CHOSEN or is_traced(x, selector, keys, values) or not needs_gradient(x, selector, keys, values):
        return False
    if not 0 < x.shape[0] < FEW_TOKENS or x.dtype not in (torch.float32, torch.float64):
        return False
    return kernel_beside("expert_mlp", "routed_training", x) is not None


def routed_training(
    x: Tensor, selector: Tensor, keys: Tensor, values: Tensor, *, k: int, gate: GateName, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`y = sum over the K largest of s = selector x:  gate(s) act(x keys[e]) values[e]`, with gradients.

    For callers that asked `runs_at_once`; elsewhere `router_logits`, `topk` and `expert_mlp` make the same, step by step.

    Args:
        x: `[T, D]`, the dtype and device of the others.
        selector: `[E, D]`.
        keys: `[E, D, G]`.
        values: `[E, G, D]`.
        k: experts of a token, 1 to E; ties go to the lowest index.
        gate: sigmoid of each logit, or softmax over the K chosen.
        activation: relu, gelu (exact), silu or identity.

    Returns:
        y `[T, D]`; logits `[T, E]`; indices int64 `[T, K]`, largest logit first; gates `[T, K]`. All but the indices are
        differentiable.

    Raises:
        NonFiniteError: a gate is NaN or infinite.
    """
    return _Routed.apply(x, selector, keys, values, k, gate, activation)
