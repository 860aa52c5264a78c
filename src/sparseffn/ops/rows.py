"""Weighted sums of value rows, and the exact top-K of product keys (equation 8). Shapes: see ops/README.md."""
# Annotations stay real objects here: torch.library reads them to infer the schema.

import torch
from torch import Tensor

from sparseffn.errors import UserError
from sparseffn.ops._checks import check_finite, check_rows, require_one_device
from sparseffn.ops.autocast import to_autocast
from sparseffn.ops.backends import direct_kernel, kernel, runs_eagerly


def _sum_rows(values: Tensor, indices: Tensor, weights: Tensor, backend: str) -> Tensor:
    check_finite(weights, "weights")
    return kernel("weighted_rows", values, backend)(values, indices, weights)


@torch.library.custom_op("sparseffn::weighted_rows", mutates_args=())
def _weighted_rows(values: Tensor, indices: Tensor, weights: Tensor, backend: str) -> Tensor:
    return _sum_rows(values, indices, weights, backend)


@_weighted_rows.register_fake
def _(values: Tensor, indices: Tensor, weights: Tensor, backend: str) -> Tensor:
    return values.new_empty(indices.shape[0], values.shape[1])


@torch.library.custom_op("sparseffn::weighted_rows_backward", mutates_args=())
def _weighted_rows_backward(
    grad: Tensor, values: Tensor, indices: Tensor, weights: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    return kernel("weighted_rows_backward", values, backend)(grad, values, indices, weights)


@_weighted_rows_backward.register_fake
def _(grad: Tensor, values: Tensor, indices: Tensor, weights: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    dense = torch.contiguous_format
    return torch.empty_like(values, memory_format=dense), torch.empty_like(weights, memory_format=dense)


def _save_rows(ctx, inputs, output) -> None:
    values, indices, weights, ctx.backend = inputs
    ctx.save_for_backward(values, indices, weights)


def _differentiate_rows(ctx, grad):
    grads = torch.ops.sparseffn.weighted_rows_backward(grad, *ctx.saved_tensors, ctx.backend)
    return grads[0], None, grads[1], None


_weighted_rows.register_autograd(_differentiate_rows, setup_context=_save_rows)


def weighted_rows(values: Tensor, indices: Tensor, weights: Tensor, *, backend: str = "auto") -> Tensor:
    """`y[t] = sum_k weights[t, k] values[indices[t, k]]`.

    Args:
        values: `[N, D]`.
        indices: int64 `[T, K]` with K >= 1, rows of `values`; repeats add up.
        weights: `[T, K]`, finite, used in float32 or wider; backend `torch` rounds them to the dtype of `values`.
        backend: see `ops.backends`.

    Returns:
        `[T, D]` in the dtype of `values`, under autocast in autocast's.

    Raises:
        UserError: ranks, shapes, dtypes or devices do not fit together, `K` is 0, or an index is that of no row.
        NonFiniteError: a weight is NaN or infinite.
    """
    (values,) = to_autocast(values)
    if indices.dim() != 2 or indices.shape != weights.shape or indices.shape[1] == 0:
        raise UserError(
            f"`indices` and `weights` must both be [tokens, k] with k >= 1; "
            f"got {tuple(indices.shape)} and {tuple(weights.shape)}; fix: flatten leading dimensions first"
        )
    if not values.is_floating_point() or not weights.is_floating_point():
        raise UserError(f"`values` and `weights` must be floating; got {values.dtype} and {weights.dtype}; fix: cast them")
    if values.dim() != 2 or indices.dtype != torch.int64:
        raise UserError(
            f"`values` must be [rows, width] and `indices` int64; got {tuple(values.shape)} and {indices.dtype}; fix: cast them"
        )
    require_one_device(values, indices, weights)
    direct = direct_kernel("weighted_rows", backend)
    if direct is not None:
        check_finite(weights, "weights")
        check_rows(indices, values.shape[0])
        return direct(values, indices, weights)
    if runs_eagerly(values, weights):
        return _sum_rows(values, indices, weights, backend)
    return torch.ops.sparseffn.weighted_rows(values, indices, weights, backend)


def _best_sums(scores_a: Tensor, scores_b: Tensor, k: int, backend: str) -> tuple[Tensor, Tensor]:
    sums, indices = kernel("product_key_topk", scores_a, backend)(scores_a, scores_b, k)
    # NaN comes first, so that the few sums show whatever in the many scores could have been chosen.
    check_finite(sums, "scores")
    return sums, indices


@torch.library.custom_op("sparseffn::product_key_topk", mutates_args=())
def _product_key_topk(scores_a: Tensor, scores_b: Tensor, k: int, backend: str) -> tuple[Tensor, Tensor]:
    return _best_sums(scores_a, scores_b, k, backend)


@_product_key_topk.register_fake
def _(scores_a: Tensor, scores_b: Tensor, k: int, backend: str) -> tuple[Tensor, Tensor]:
    shape = (*scores_a.shape[:-1], k)
    return scores_a.new_empty(shape), scores_a.new_empty(shape, dtype=torch.int64)


def _save_keys(ctx, inputs, output) -> None:
    scores_a, scores_b, _, _ = inputs
    ctx.n_a, ctx.n_b = scores_a.shape[-1], scores_b.shape[-1]
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate_keys(ctx, grad, _):
    if grad is None:
        return None, None, None, None
    (indices,) = ctx.saved_tensors
    grad_a = grad.new_zeros(*grad.shape[:-1], ctx.n_a).scatter_add(-1, indices % ctx.n_a, grad)
    grad_b = grad.new_zeros(*grad.shape[:-1], ctx.n_b).scatter_add(-1, indices // ctx.n_a, grad)
    return grad_a, grad_b, None, None


_product_key_topk.register_autograd(_differentiate_keys, setup_context=_save_keys)


def product_key_topk(scores_a: Tensor, scores_b: Tensor, k: int, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """The `k` largest of all sums `scores_b[i // n_a] + scores_a[i mod n_a]`, exactly, largest first.

    Args:
        scores_a: `(..., n_a)`, scores of the first half's sub-keys.
        scores_b: `(..., n_b)`, in the same dtype.
        k: 1 to n_a n_b.
        backend: see `ops.backends`.

    Returns:
        The sums `(..., k)`, differentiable, and their int64 indices i. Which of equal sums is taken is deterministic.

    Raises:
        UserError: `k` is out of range, or leading shapes, dtypes or devices differ.
        NonFiniteError: one of the sums is NaN or infinite.
    """
    if scores_a.dim() == 0 or scores_b.dim() == 0:
        raise UserError(
            "`scores_a` and `scores_b` must be (..., n_a) and (..., n_b); "
            f"got {tuple(scores_a.shape)} and {tuple(scores_b.shape)}; fix: give the scores of all sub-keys"
        )
    if scores_a.shape[:-1] != scores_b.shape[:-1]:
        raise UserError(
            f"`scores_a` and `scores_b` must agree before the last dimension; got {tuple(scores_a.shape)} and "
            f"{tuple(scores_b.shape)}"
        )
    if scores_a.dtype != scores_b.dtype or not scores_a.is_floating_point():
        raise UserError(
            f"`scores_a` and `scores_b` must share a floating dtype; got {scores_a.dtype} and {scores_b.dtype}; fix: cast one"
        )
    require_one_device(scores_a, scores_b)
    n_pairs = scores_a.shape[-1] * scores_b.shape[-1]
    if not 1 <= k <= n_pairs:
        raise UserError(f"`k` must be between 1 and n_a n_b = {n_pairs}; got {k}; fix: lower k or add sub-keys")
    direct = direct_kernel("product_key_topk", backend)
    if direct is not None:
        sums, indices = direct(scores_a, scores_b, k)
        check_finite(sums, "scores")
        return sums, indices
    if runs_eagerly(scores_a, scores_b):
        return _best_sums(scores_a, scores_b, k, backend)
    return torch.ops.sparseffn.product_key_topk(scores_a, scores_b, k, backend)
