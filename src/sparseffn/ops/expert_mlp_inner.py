"""`expert_mlp` with a further top-K: of a token's K G coefficients `s drop * act(x keys[e])` only the largest take part.

Kept for backward are the survivors alone: what the activation keeps of each, and their int32 positions among the K G.
"""
# Annotations stay real objects here: torch.library reads them to infer the schema.

import torch
from torch import Tensor

from sparseffn.ops.backends import kernel


@torch.library.custom_op("sparseffn::expert_mlp_inner", mutates_args=())
def expert_mlp_inner(
    x: Tensor, keys: Tensor, values: Tensor, gates: Tensor, indices: Tensor, keep: Tensor | None, keep_scale: float,
    activation: str, inner_k: int, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The output, survivors `[T, inner_k]`, their positions, and the sorted routing; see `ops.expert_mlp`."""
    forward = kernel("expert_mlp_inner", x, backend)
    return forward(x, keys, values, gates, indices, keep, keep_scale, activation, inner_k)


@expert_mlp_inner.register_fake
def _(x, keys, values, gates, indices, keep, keep_scale, activation, inner_k, backend):
    n_tokens, k = indices.shape
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty(n_tokens, inner_k),
        indices.new_empty(n_tokens, inner_k, dtype=torch.int32),
        indices.new_empty(n_tokens * k),
        indices.new_empty(keys.shape[0] + 1),
    )


@torch.library.custom_op("sparseffn::expert_mlp_inner_backward", mutates_args=())
def _backward(
    grad: Tensor, x: Tensor, keys: Tensor, values: Tensor, gates: Tensor, survivors: Tensor, positions: Tensor,
    order: Tensor, offsets: Tensor, keep_scale: float, activation: str, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    backward = kernel("expert_mlp_inner_backward", x, backend)
    return backward(grad, x, keys, values, gates, survivors, positions, order, offsets, keep_scale, activation)


@_backward.register_fake
def _(grad, x, keys, values, gates, survivors, positions, order, offsets, keep_scale, activation, backend):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, keys, values, gates))


def _save(ctx, inputs, output) -> None:
    x, keys, values, gates, _, _, ctx.keep_scale, ctx.activation, _, ctx.backend = inputs
    _, survivors, positions, order, offsets = output
    ctx.mark_non_differentiable(survivors, positions, order, offsets)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, keys, values, gates, survivors, positions, order, offsets)


def _differentiate(ctx, grad, *_):
    if grad is None:
        return (None,) * 10
    backward = torch.ops.sparseffn.expert_mlp_inner_backward
    grads = backward(grad, *ctx.saved_tensors, ctx.keep_scale, ctx.activation, ctx.backend)
    return *grads, None, None, None, None, None, None


expert_mlp_inner.register_autograd(_differentiate, setup_context=_save)
