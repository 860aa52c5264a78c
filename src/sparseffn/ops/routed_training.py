"""A mixture's router and experts as one differentiable operation for few tokens (equations 11 and 12).

The calls between logits, top-K, gates and experts, and autograd's between their gradients, take longer than a few tokens do.
For many tokens they are nothing, and the operations stand alone. Shapes: see ops/README.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparseffn.errors import UserError
from sparseffn.ops.backends import is_traced, kernel_beside
from sparseffn.ops.routed_mlp import GateName, check_routed
from sparseffn.ops.router_logits import FEW_TOKENS

# Gates whose gradient needs the gates alone. That of a softmax over all experts needs every logit.
_OF_CHOSEN: tuple[GateName, ...] = ("sigmoid", "renormalised")


class _Routed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        x, selector, keys, values, k, ctx.gate, ctx.activation = inputs
        run = kernel_beside("expert_mlp", "routed_training", x)
        ctx.run_backward = kernel_beside("expert_mlp", "routed_training_backward", x)
        assert run is not None, "runs_fused checks that there is one"
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
        x, selector, keys, values, indices, gates, *kept = ctx.saved_tensors
        if grad is not None and not is_traced(grad):
            saved = (x, selector, keys, values, indices, gates, *kept)
            return *ctx.run_backward(grad, grad_gates, grad_logits, *saved, ctx.gate, ctx.activation), None, None, None
        grad_x = grad_keys = grad_values = None
        if grad is not None:
            run = torch.ops.sparseffn.expert_mlp_backward
            inputs = (x, keys, values, gates, *kept, None, 1.0, ctx.activation, "auto")
            grad_x, grad_keys, grad_values, through_y = run(grad, *inputs)
            grad_gates = through_y if grad_gates is None else grad_gates + through_y
        grad_logits = _logits_gradient(ctx.gate, grad_gates, grad_logits, gates, indices, selector.shape[0])
        if grad_logits is None:
            return (None,) * 7
        through_logits = grad_logits @ selector
        grad_x = through_logits if grad_x is None else grad_x + through_logits
        return grad_x, grad_logits.t() @ x, grad_keys, grad_values, None, None, None


def _logits_gradient(
    gate: GateName, grad_gates: Tensor | None, grad_logits: Tensor | None, gates: Tensor, indices: Tensor, n_experts: int
) -> Tensor | None:
    """What the logits get through the gates of the chosen, and directly."""
    if grad_gates is None:
        return grad_logits
    through = grad_gates if gate == "sigmoid" else grad_gates - (gates * grad_gates).sum(dim=1, keepdim=True)
    chosen = through * gates * (1 - gates if gate == "sigmoid" else 1)
    spread = chosen.new_zeros(gates.shape[0], n_experts).scatter_add(1, indices, chosen)
    return spread if grad_logits is None else grad_logits + spread


def runs_fused(gate: GateName, x: Tensor, selector: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether `routed_training` computes these, which are of one dtype and device: few tokens, in float32 or float64, eagerly,
    and all weights trained, as all their gradients are made.

    Not whether autograd records: logits are the same bits in a checkpointed forward and when it is computed again.
    """
    # Before a look at the number of tokens, which a compiled graph must not depend on.
    if gate not in _OF_CHOSEN or is_traced(x, selector, keys, values):
        return False
    if not (selector.requires_grad and keys.requires_grad and values.requires_grad):
        return False
    if not 0 < x.shape[0] < FEW_TOKENS or x.dtype not in (torch.float32, torch.float64):
        return False
    return kernel_beside("expert_mlp", "routed_training", x) is not None


def train_fused(
    x: Tensor, selector: Tensor, keys: Tensor, values: Tensor, k: int, gate: GateName, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`routed_training` without its checks, for a layer whose shapes are fixed and that asked `runs_fused`."""
    return _Routed.apply(x, selector, keys, values, k, gate, activation)


def routed_training(
    x: Tensor, selector: Tensor, keys: Tensor, values: Tensor, *, k: int, gate: GateName, activation: str = "relu"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`y = sum over the K largest of s = selector x:  gate(s) act(x keys[e]) values[e]`, with gradients.

    Where `runs_fused` is false, `router_logits`, `topk` and `expert_mlp` make the same, step by step.

    Args:
        x: `[T, D]`, fewer than 128 tokens in float32 or float64; the others have its dtype and device.
        selector: `[E, D]`, requires a gradient, as keys and values do.
        keys: `[E, D, G]`.
        values: `[E, G, D]`.
        k: experts of a token, 1 to E; ties go to the lowest index.
        gate: sigmoid of each logit, or renormalised: softmax over the K chosen.
        activation: relu, gelu (exact), silu or identity.

    Returns:
        y `[T, D]`; logits `[T, E]`; indices int64 `[T, K]`, largest logit first; gates `[T, K]`. All but the indices are
        differentiable, once.

    Raises:
        UserError: what `routed_mlp` refuses, or `runs_fused` is false.
        NonFiniteError: a gate is NaN or infinite.
    """
    check_routed(x, selector, keys, values, k, gate, activation)
    if not runs_fused(gate, x, selector, keys, values):
        raise UserError(
            f"`routed_training` takes 1 to {FEW_TOKENS - 1} tokens in float32 or float64, gates {' or '.join(_OF_CHOSEN)}, "
            f"weights that require gradients, and a backend that has it; got {x.shape[0]} of {x.dtype}, {gate!r}; "
            "fix: router_logits, topk and expert_mlp"
        )
    return train_fused(x, selector, keys, values, k, gate, activation)
