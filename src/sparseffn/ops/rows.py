"""Weighted sums of value rows, and the exact top-K of product keys (equation 8). Shapes: see ops/README.md."""

from __future__ import annotations

import torch
from torch import Tensor

from sparseffn.errors import UserError
from sparseffn.ops import _torch_kernels
from sparseffn.ops._checks import check_indices, require_one_device
from sparseffn.ops.backends import call
from sparseffn.ops.library import Kept, define, gradient_like


def check_weighted_rows(values: Tensor, indices: Tensor, weights: Tensor) -> None:
    """That they fit together; raises as `weighted_rows` documents."""
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
    check_indices(indices, "a row of `values`", values.shape[0])


def weighted_rows_plain(values: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """A product over all rows; those that a token does not choose have weight zero.

    Zero times a row that is not finite is NaN: such a row counts as zeros, and its NaN comes by the weights of who chose it.
    """
    wide = torch.promote_types(values.dtype, torch.float32)
    finite_ND = values.isfinite()
    factor_N = torch.where(finite_ND.all(dim=1), 1.0, torch.nan).to(wide)
    weights_TK = weights.to(wide) * factor_N[indices]
    every_TN = weights.new_zeros(indices.shape[0], values.shape[0], dtype=wide).scatter_add(1, indices, weights_TK)
    return (every_TN @ torch.where(finite_ND, values, 0.0).to(wide)).to(values.dtype)


def weighted_rows_eager(values: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """By PyTorch's bags of embeddings."""
    return _torch_kernels.weighted_rows(values, indices, weights)


def _fake_rows(values, indices, weights):
    return values.new_empty(indices.shape[0], values.shape[1])


_weighted_rows = define(
    "weighted_rows",
    "Tensor values, Tensor indices, Tensor weights",
    "Tensor y",
    check=check_weighted_rows,
    cast=("values",),
    plain=weighted_rows_plain,
    eager=weighted_rows_eager,
    fake=_fake_rows,
    flops=lambda values, indices, _: 2 * indices[0] * indices[1] * values[1],
    kept=Kept(
        returns="",
        fake=_fake_rows,
        backward="Tensor grad_y, Tensor values, Tensor indices, Tensor weights, bool[]? needed=None",
        gradients=("values", "weights"),
    ),
)


def weighted_rows(values: Tensor, indices: Tensor, weights: Tensor, *, backend: str = "auto") -> Tensor:
    """`y[t] = sum_k weights[t, k] values[indices[t, k]]`.

    Args:
        values: `[N, D]`; under autocast cast as `nn.Linear` casts.
        indices: int64 `[T, K]` with K >= 1, rows of `values`; repeats add up.
        weights: `[T, K]`, used in float32 or wider; backend `torch` rounds them to the dtype of `values`.
        backend: see `ops.backends`.

    Returns:
        `[T, D]` in the dtype of `values`, under autocast in autocast's. NaN and infinity of a weight, or of a row of `values`,
        reach the rows of the tokens concerned alone; under transforms of `torch.func` the whole of such a row is NaN.

    Raises:
        UserError: ranks, shapes, dtypes or devices do not fit together, `K` is 0, or an index is that of no row.
    """
    return call(_weighted_rows, (values, indices, weights), backend)


def check_product_keys(scores_a: Tensor, scores_b: Tensor, k: int) -> None:
    """That they fit together; raises as `product_key_topk` documents."""
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


def product_key_topk_plain(scores_a: Tensor, scores_b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """From all sums, by a sort."""
    every = (scores_b[..., :, None] + scores_a[..., None, :]).flatten(-2)
    indices = every.detach().sort(dim=-1, descending=True, stable=True).indices[..., :k].contiguous()
    return every.gather(-1, indices), indices


def product_key_topk_eager(scores_a: Tensor, scores_b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """From the few pairs that can be among the largest."""
    return _torch_kernels.product_key_topk(scores_a, scores_b, k)


def _fake_sums(scores_a, scores_b, k):
    shape = (*scores_a.shape[:-1], k)
    return scores_a.new_empty(shape), scores_a.new_empty(shape, dtype=torch.int64)


def _backward_sums(grad_sums: Tensor, scores_a: Tensor, scores_b: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    n_a = scores_a.shape[-1]
    grad_a = gradient_like(scores_a).zero_().scatter_add_(-1, indices % n_a, grad_sums)
    return grad_a, gradient_like(scores_b).zero_().scatter_add_(-1, indices // n_a, grad_sums)


_product_key_topk = define(
    "product_key_topk",
    "Tensor scores_a, Tensor scores_b, int k",
    "Tensor sums, Tensor indices",
    check=check_product_keys,
    plain=product_key_topk_plain,
    eager=product_key_topk_eager,
    fake=_fake_sums,
    kernel=product_key_topk_eager,
    kept=Kept(
        returns="",
        fake=_fake_sums,
        backward="Tensor grad_sums, Tensor scores_a, Tensor scores_b, Tensor indices",
        gradients=("scores_a", "scores_b"),
        kernels=(product_key_topk_eager, _backward_sums),
    ),
)


def product_key_topk(scores_a: Tensor, scores_b: Tensor, k: int, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """The `k` largest of all sums `scores_b[i // n_a] + scores_a[i mod n_a]`, exactly, largest first.

    Args:
        scores_a: `(..., n_a)`, scores of the first half's sub-keys.
        scores_b: `(..., n_b)`, in the same dtype.
        k: 1 to n_a n_b.
        backend: see `ops.backends`.

    Returns:
        The sums `(..., k)`, differentiable, and their int64 indices i. Which of equal sums is taken is deterministic; NaN
        comes first.

    Raises:
        UserError: `k` is out of range, or leading shapes, dtypes or devices differ.
    """
    return call(_product_key_topk, (scores_a, scores_b, k), backend)
