"""The K largest columns of each row (equation 6), and a gather of columns that keeps only the indices for backward.

`torch.topk` leaves the choice among equal values to the algorithm; here ties go to the lowest index, on every device and at
every size. `torch.gather` keeps its whole input, `[T, d_ff]` for Top-K, to know its shape. Shapes: see ops/README.md.
"""
# Annotations stay real objects here: torch.library reads them to infer the schema.

import torch
from torch import Tensor

from sparseffn.errors import UserError
from sparseffn.ops._checks import bad_index, require_one_device
from sparseffn.ops._differentiable import differentiable
from sparseffn.ops.backends import is_traced, kernel, needs_gradient, runs_eagerly


def _gather(x: Tensor, indices: Tensor) -> Tensor:
    try:
        return x.gather(1, indices)
    except RuntimeError as error:
        # PyTorch looks at each index anyway; on a GPU it stops the device.
        if "out of bounds" in str(error):
            raise bad_index("a column of `x`", x.shape[1]) from error
        raise


@torch.library.custom_op("sparseffn::select_columns", mutates_args=())
def _select_columns(x: Tensor, indices: Tensor) -> Tensor:
    return _gather(x, indices)


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
_eager_select_columns = differentiable(_gather, _save, _differentiate)


def select_columns(x: Tensor, indices: Tensor) -> Tensor:
    """`y[t, k] = x[t, indices[t, k]]`.

    Args:
        x: `[T, N]`.
        indices: int64 `[T, K]`, 0 to N - 1.

    Returns:
        `[T, K]`, differentiable in x.

    Raises:
        UserError: ranks, lengths, dtypes or devices do not fit together, or an index is that of no column.
    """
    if x.dim() != 2 or indices.dim() != 2 or x.shape[0] != indices.shape[0] or indices.dtype != torch.int64:
        raise UserError(
            "`x` and `indices` must be [T, N] and int64 [T, K]; "
            f"got {tuple(x.shape)} and {indices.dtype} {tuple(indices.shape)}; fix: flatten leading dimensions first"
        )
    require_one_device(x, indices)
    if is_traced(x):
        return torch.ops.sparseffn.select_columns(x, indices) if needs_gradient(x) else x.gather(1, indices)
    return _eager_select_columns(x, indices) if needs_gradient(x) else _gather(x, indices)


@torch.library.custom_op("sparseffn::topk", mutates_args=())
def _topk(scores: Tensor, k: int, ordered: bool, backend: str) -> Tensor:
    return kernel("topk", scores, backend)(scores, k, ordered)


@_topk.register_fake
def _(scores: Tensor, k: int, ordered: bool, backend: str) -> Tensor:
    return scores.new_empty(*scores.shape[:-1], k, dtype=torch.int64)


def topk(scores: Tensor, k: int, *, ordered: bool = True, backend: str = "auto") -> Tensor:
    """Indices of the `k` largest entries of the last dimension, ties to the lowest index.

    Args:
        scores: `(..., n)`, any floating dtype. Minus infinity is allowed and comes last.
        k: how many, 1 to n.
        ordered: largest first; False leaves the order to the backend, which is faster where K is large.
        backend: see `ops.backends`.

    Returns:
        int64 indices `(..., k)`; not differentiable.

    Raises:
        UserError: `k` is outside 1..n, or `scores` are integers or a single number.
    """
    if scores.dim() == 0 or not scores.is_floating_point():
        raise UserError(
            f"`scores` must be floating, (..., n); got {scores.dtype} in shape {tuple(scores.shape)}; fix: cast them"
        )
    n = scores.shape[-1]
    if not 1 <= k <= n:
        raise UserError(f"`k` must be between 1 and the number of entries {n}; got {k}; fix: choose from 1 to n")
    scores = scores.detach()
    if runs_eagerly(scores):
        return kernel("topk", scores, backend)(scores, k, ordered)
    return torch.ops.sparseffn.topk(scores, k, ordered, backend)
