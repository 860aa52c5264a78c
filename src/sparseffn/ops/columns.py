"""Selected columns of a matrix, a gather that keeps only the indices for backward.

`torch.gather` keeps its whole input, `[T, d_ff]` for Top-K, to know its shape. Shapes: see ops/README.md.
"""
# Annotations stay real objects here: torch.library reads them to infer the schema.

import torch
from torch import Tensor

from sparseffn.ops._differentiable import differentiable
from sparseffn.ops.backends import is_traced, needs_gradient


@torch.library.custom_op("sparseffn::select_columns", mutates_args=())
def _select_columns(x: Tensor, indices: Tensor) -> Tensor:
    return x.gather(1, indices)


@_select_columns.register_fake
def _(x: Tensor, indices: Tensor) -> Tensor:
    return x.new_empty(indices.shape)


def _save(ctx, inputs, output) -> None:
    x, indices = inputs
    ctx.n_columns = x.shape[1]
    ctx.save_for_backward(indices)


def _differentiate(ctx, grad):
    (indices,) = ctx.saved_tensors
    return grad.new_zeros(grad.shape[0], ctx.n_columns).scatter_add(1, indices, grad), None


_select_columns.register_autograd(_differentiate, setup_context=_save)
_eager_select_columns = differentiable(lambda x, indices: x.gather(1, indices), _save, _differentiate)


def select_columns(x: Tensor, indices: Tensor) -> Tensor:
    """`y[t, k] = x[t, indices[t, k]]`.

    Args:
        x: `[T, N]`.
        indices: int64 `[T, K]`.

    Returns:
        `[T, K]`, differentiable in x.
    """
    if not needs_gradient(x):
        return x.gather(1, indices)
    return torch.ops.sparseffn.select_columns(x, indices) if is_traced(x) else _eager_select_columns(x, indices)
