"""Conditional vector-matrix multiplication (CVMM, equation 26 of arXiv 2310.10837): each row times the matrix of its choice.

Shapes: see ops/README.md.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from sparseffn.errors import UserError
from sparseffn.ops._checks import check_indices, require_one_device
from sparseffn.ops.backends import call
from sparseffn.ops.library import Kept, define, gradient_like


def check_cvmm(x: Tensor, sel: Tensor, weight: Tensor) -> None:
    """That they fit together, without a look at values; raises as `cvmm` documents."""
    if x.dim() != 2 or weight.dim() != 3 or x.shape[1] != weight.shape[1]:
        raise UserError(
            f"`x` must be [rows, {weight.shape[1] if weight.dim() == 3 else 'm'}] and `weight` [n_experts, m, l]; "
            f"got {tuple(x.shape)} and {tuple(weight.shape)}; fix: flatten leading dimensions first"
        )
    if sel.shape != x.shape[:1] or sel.dtype != torch.int64:
        raise UserError(
            f"`sel` must hold one index a row of x, int64 in shape {tuple(x.shape[:1])}; "
            f"got {sel.dtype} in shape {tuple(sel.shape)}; fix: flatten and cast it"
        )
    if x.dtype != weight.dtype or not x.is_floating_point():
        raise UserError(f"`x` and `weight` must share a floating dtype; got {x.dtype} and {weight.dtype}; fix: cast one")
    require_one_device(x, sel, weight)


def _check(x: Tensor, sel: Tensor, weight: Tensor) -> None:
    check_cvmm(x, sel, weight)
    check_indices(sel, "a matrix of `weight`", weight.shape[0], "sel")


def cvmm_plain(x: Tensor, sel: Tensor, weight: Tensor) -> Tensor:
    """Every matrix for every row, of which one is taken; for transforms."""
    y = x.new_zeros(x.shape[0], weight.shape[2])
    for e in range(weight.shape[0]):
        mine = (sel == e)[:, None]
        y = torch.where(mine, torch.where(mine, x, 0.0) @ weight[e], y)
    return y


def _sorted(sel: Tensor, n_matrices: int) -> tuple[Tensor, list[tuple[int, int]]]:
    """Rows in stable order of their matrix, and where each one's begin and end."""
    sorted_sel, order = sel.sort(stable=True)
    edges = torch.arange(n_matrices + 1, device=sel.device)
    return order, list(itertools.pairwise(torch.searchsorted(sorted_sel, edges).tolist()))


def _products(x: Tensor, sel: Tensor, weight: Tensor) -> Tensor:
    """One product a matrix, over its rows."""
    order, bounds = _sorted(sel, weight.shape[0])
    y = x.new_empty(x.shape[0], weight.shape[2])
    for e, (start, stop) in enumerate(bounds):
        if start < stop:
            rows = order[start:stop]
            y[rows] = x[rows] @ weight[e]
    return y


def _gradients(
    grad: Tensor, x: Tensor, sel: Tensor, weight: Tensor, needed: Sequence[bool] | None = None
) -> tuple[Tensor, Tensor]:
    of_x, of_weight = needed or (True, True)
    order, bounds = _sorted(sel, weight.shape[0])
    grad_x = gradient_like(x) if of_x else x.new_empty(0)
    grad_weight = gradient_like(weight).zero_() if of_weight else x.new_empty(0)
    for e, (start, stop) in enumerate(bounds):
        if start < stop:
            rows = order[start:stop]
            if of_x:
                grad_x[rows] = grad[rows] @ weight[e].t()
            if of_weight:
                grad_weight[e] = x[rows].t() @ grad[rows]
    return grad_x, grad_weight


def _fake(x, sel, weight):
    return x.new_empty(x.shape[0], weight.shape[2])


_cvmm = define(
    "cvmm",
    "Tensor x, Tensor sel, Tensor weight",
    "Tensor y",
    check=_check,
    cast=("x", "weight"),
    plain=cvmm_plain,
    fake=_fake,
    flops=lambda x, sel, weight: 2 * x[0] * weight[1] * weight[2],
    kernel=_products,
    kept=Kept(
        returns="",
        fake=_fake,
        backward="Tensor grad_y, Tensor x, Tensor sel, Tensor weight, bool[]? needed=None",
        gradients=("x", "weight"),
        kernels=(_products, _gradients),
    ),
)


def cvmm(x: Tensor, sel: Tensor, weight: Tensor, *, backend: str = "auto") -> Tensor:
    """`y[n] = x[n] @ weight[sel[n]]`.

    Args:
        x: `[N, M]`; under autocast it and `weight` are cast as `nn.Linear` casts.
        sel: int64 `[N]`, the matrix of each row, 0 to E - 1.
        weight: `[E, M, L]`, any strides.
        backend: see `ops.backends`.

    Returns:
        `[N, L]` in the dtype of `x`.

    Raises:
        UserError: ranks, widths, dtypes or devices do not fit together, or `sel` has another length or dtype or names a
            matrix that is not there.
    """
    return call(_cvmm, (x, sel, weight), backend)
