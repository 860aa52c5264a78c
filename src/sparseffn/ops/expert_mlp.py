"""The whole expert computation of a mixture in one operation (equations 11, 12):

    y[t] = sum over the selections (e, s) of token t:  s  drop * act(x[t] keys[e])  values[e]

One hidden tensor is kept for backward, whatever the activation: its output for ReLU, its input for GELU and SiLU.
Shapes: see ops/README.md.
"""
# Annotations stay real objects here: torch.library reads them to infer the schema.

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparseffn.errors import UserError, unknown_name
from sparseffn.ops._checks import check_routing, require_one_device
from sparseffn.ops._differentiable import differentiable
from sparseffn.ops.activations import ACTIVATIONS
from sparseffn.ops.autocast import to_autocast
from sparseffn.ops.backends import direct_kernel, is_traced, kernel, needs_gradient, runs_eagerly
from sparseffn.ops.expert_mlp_inner import expert_mlp_inner


def _kept_forward(x, keys, values, gates, indices, keep, keep_scale, activation, backend):
    forward = kernel("expert_mlp", x, backend)
    return forward(x, keys, values, gates, indices, keep, keep_scale, activation, save=True)


def _gradients(grad, x, keys, values, gates, hidden, order, offsets, keep, keep_scale, activation, backend):
    backward = kernel("expert_mlp_backward", x, backend)
    return backward(grad, x, keys, values, gates, hidden, order, offsets, keep, keep_scale, activation)


@torch.library.custom_op("sparseffn::expert_mlp", mutates_args=())
def _expert_mlp(
    x: Tensor, keys: Tensor, values: Tensor, gates: Tensor, indices: Tensor, keep: Tensor | None, keep_scale: float,
    activation: str, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _kept_forward(x, keys, values, gates, indices, keep, keep_scale, activation, backend)


@_expert_mlp.register_fake
def _(x, keys, values, gates, indices, keep, keep_scale, activation, backend):
    n_rows = indices.shape[0] * indices.shape[1]
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty(n_rows, keys.shape[2]),
        indices.new_empty(n_rows),
        indices.new_empty(keys.shape[0] + 1),
    )


@torch.library.custom_op("sparseffn::expert_mlp_backward", mutates_args=())
def _expert_mlp_backward(
    grad: Tensor, x: Tensor, keys: Tensor, values: Tensor, gates: Tensor, hidden: Tensor, order: Tensor,
    offsets: Tensor, keep: Tensor | None, keep_scale: float, activation: str, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _gradients(grad, x, keys, values, gates, hidden, order, offsets, keep, keep_scale, activation, backend)


@_expert_mlp_backward.register_fake
def _(grad, x, keys, values, gates, hidden, order, offsets, keep, keep_scale, activation, backend):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, keys, values, gates))


def _save(ctx, inputs, output) -> None:
    x, keys, values, gates, _, keep, ctx.keep_scale, ctx.activation, ctx.backend = inputs
    _, hidden, order, offsets = output
    ctx.mark_non_differentiable(hidden, order, offsets)
    # Else autograd fills a gradient of zeros for each of them, the largest as large as `hidden`.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, keys, values, gates, hidden, order, offsets, keep)


def _differentiate(ctx, grad, *_):
    if grad is None:
        return (None,) * 9
    backward: Callable[..., Any] = torch.ops.sparseffn.expert_mlp_backward if is_traced(grad) else _gradients
    grads = backward(grad, *ctx.saved_tensors, ctx.keep_scale, ctx.activation, ctx.backend)
    return *grads, None, None, None, None, None


_expert_mlp.register_autograd(_differentiate, setup_context=_save)
_eager_expert_mlp = differentiable(_kept_forward, _save, _differentiate)


def expert_mlp(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: Tensor,
    indices: Tensor,
    *,
    activation: str = "relu",
    dropout: float = 0.0,
    inner_k: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """`y[t] = sum_k gates[t, k] drop(act(x[t] @ keys[e])) @ values[e]` with `e = indices[t, k]`, summed in float32 or wider.

    Args:
        x: `[T, D]`; under autocast it, `keys` and `values` are cast as `nn.Linear` casts.
        keys: `[E, D, G]`.
        values: `[E, G, D]`.
        gates: `[T, K]`, float32 (float64 for float64 x). A gate of exactly 0 selects nothing.
        indices: int64 `[T, K]`, 0 to E - 1.
        activation: relu, gelu (exact), silu or identity.
        dropout: rate at which hidden units are removed; the others are scaled by 1 / (1 - rate).
        inner_k: of a token's K G coefficients `gate x unit` only so many, the largest, take part; None: all.
        backend: see `ops.backends`.

    Returns:
        `[T, D]` in the dtype of `x`.

    Raises:
        UserError: ranks, widths, dtypes or devices do not fit together, `K` is 0, `inner_k` is not in 1..K G, an index is
            that of no expert, or the activation is unknown.
        NonFiniteError: a gate is NaN or infinite.
    """
    x, keys, values = to_autocast(x, keys, values)
    _check(x, keys, values, gates, indices)
    _check_options(activation, dropout, inner_k, indices.shape[1] * keys.shape[2])
    keep, scale = None, 1.0
    if dropout > 0:
        shape = (*indices.shape, keys.shape[2])
        keep, scale = torch.rand(shape, device=x.device) >= dropout, 1.0 / (1.0 - dropout)
    direct = direct_kernel("expert_mlp", backend)
    if direct is not None:
        check_routing(gates, indices, keys.shape[0])
        return direct(x, keys, values, gates, indices, keep, scale, activation, inner_k)
    if inner_k is not None:
        inputs = (x, keys, values, gates, indices, keep, scale, activation, inner_k)
        if runs_eagerly(x, keys, values, gates):
            return kernel("expert_mlp_inner", x, backend)(*inputs)[0]
        return expert_mlp_inner(*inputs, backend)[0]
    inputs = (x, keys, values, gates)
    if is_traced(*inputs):
        return torch.ops.sparseffn.expert_mlp(*inputs, indices, keep, scale, activation, backend)[0]
    if needs_gradient(*inputs):
        return _eager_expert_mlp(*inputs, indices, keep, scale, activation, backend)[0]
    return kernel("expert_mlp", x, backend)(*inputs, indices, keep, scale, activation, save=False)[0]


def _check_options(activation: str, dropout: float, inner_k: int | None, n_units: int) -> None:
    if activation not in ACTIVATIONS:
        raise unknown_name("activation", activation, ACTIVATIONS)
    if not 0.0 <= dropout < 1.0:
        raise UserError(f"`dropout` must be at least 0 and below 1; got {dropout}; fix: a rate such as 0.1")
    if inner_k is not None and not 1 <= inner_k <= n_units:
        raise UserError(f"`inner_k` must be between 1 and K G = {n_units}; got {inner_k}; fix: lower it, or None for all")


def _check(x: Tensor, keys: Tensor, values: Tensor, gates: Tensor, indices: Tensor) -> None:
    fits = x.dim() == 2 and keys.dim() == 3 and values.dim() == 3 and keys.shape[1] == x.shape[1]
    if not fits or values.shape != (keys.shape[0], keys.shape[2], keys.shape[1]):
        raise UserError(
            "`x`, `keys` and `values` must be [T, D], [E, D, G] and [E, G, D]; "
            f"got {tuple(x.shape)}, {tuple(keys.shape)} and {tuple(values.shape)}; fix: flatten leading dimensions first"
        )
    if indices.dim() != 2 or gates.shape != indices.shape or indices.shape[0] != x.shape[0] or indices.shape[1] == 0:
        raise UserError(
            f"`gates` and `indices` must both be [T, K] with T = {x.shape[0]} and K >= 1; "
            f"got {tuple(gates.shape)} and {tuple(indices.shape)}"
        )
    same = x.dtype == keys.dtype == values.dtype
    if not same or not x.is_floating_point() or indices.dtype != torch.int64:
        raise UserError(
            "`x`, `keys` and `values` must share a floating dtype and `indices` be int64; "
            f"got {x.dtype}, {keys.dtype}, {values.dtype} and {indices.dtype}; fix: cast them"
        )
    require_one_device(x, keys, values, gates, indices)
    if gates.dtype != torch.promote_types(x.dtype, torch.float32):
        raise UserError(f"`gates` must be {torch.promote_types(x.dtype, torch.float32)}; got {gates.dtype}; fix: cast them")
