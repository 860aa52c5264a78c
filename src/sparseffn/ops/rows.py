"""Weighted sums of value rows, and the exact top-K of product keys (equation 8). Shapes: see ops/README.md."""
# Annotations stay real objects here: torch.library reads them to infer the schema.

import torch
from torch import Tensor

from sparseffn.errors import UserError
from sparseffn.ops._checks import require_one_device
from sparseffn.ops.autocast import to_autocast
from sparseffn.ops.backends import direct_kernel, kernel, runs_eagerly


@torch.library.custom_op("sparseffn::weighted_rows", mutates_args=())
def _weighted_rows(values: Tensor, indices: Tensor, weights: Tensor, backend: str) -> Tensor:
    return kernel("weighted_rows", values, backend)(values, indices, weights)


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
        indices: int64 `[T, K]`, rows of `values`; repeats add up.
        weights: `[T, K]`, cast to the dtype of `values`.
        backend: see `ops.backends`.

    Returns:
        `[T, D]` in the dtype of `values`, under autocast in autocast's.

    Raises:
        UserError: `indices` and `weights` differ in shape or are not matrices.
    """
    (values,) = to_autocast(values)
    if indices.dim() != 2 or indices.shape != weights.shape:
        raise UserError(
            f"`indices` and `weights` must both be [tokens, k]; got {tuple(indices.shape)} and {tuple(weights.shape)}"
        )
    if values.dim() != 2 or indices.dtype != torch.int64:
        raise UserError(
            f"`values` must be [rows, width] and `indices` int64; got {tuple(values.shape)} and {indices.dtype}; fix: cast them"
        )
    require_one_device(values, indices, weights)
    direct = direct_kernel("weighted_rows", backend)
    if direct is not None:
        return direct(values, indices, weights)
    if runs_eagerly(values, weights):
        return kernel("weighted_rows", values, backend)(values, indices, weights)
    return torch.ops.sparseffn.weighted_rows(values, indices, weights, backend)


@torch.library.custom_op("sparseffn::product_key_topk", mutates_args=())
def _product_key_topk(scores_a: Tensor, scores_b: Tensor, k: int, backend: str) -> tuple[Tensor, Tensor]:
    return kernel("product_key_topk", scores_a, backend)(scores_a, scores_b, k)


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
        scores_b: `(..., n_b)`.
        k: 1 to n_a n_b.
        backend: see `ops.backends`.

    Returns:
        The sums `(..., k)`, differentiable, and their int64 indices i. Which of equal sums is taken is deterministic.

    Raises:
        UserError: `k` is out of range or the leading shapes differ.
    """
    if scores_a.shape[:-1] != scores_b.shape[:-1]:
        raise UserError(
            f"`scores_a` and `scores_b` must agree before the last dimension; got {tuple(scores_a.shape)} and "
            f"{tuple(scores_b.shape)}"
        )
    require_one_device(scores_a, scores_b)
    n_pairs = scores_a.shape[-1] * scores_b.shape[-1]
    if not 1 <= k <= n_pairs:
        raise UserError(f"`k` must be between 1 and n_a n_b = {n_pairs}; got {k}; fix: lower k or add sub-keys")
    direct = direct_kernel("product_key_topk", backend)
    if direct is not None:
        return direct(scores_a, scores_b, k)
    if runs_eagerly(scores_a, scores_b):
        return kernel("product_key_topk", scores_a, backend)(scores_a, scores_b, k)
    return torch.ops.sparseffn.product_key_topk(scores_a, scores_b, k, backend)
