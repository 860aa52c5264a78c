"""`cvmm` on the experts' Triton kernels; arguments as in the schema of ops/cvmm.py. A matrix that is not there gives zeros.

Shapes: see ops/README.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sparseffn.ops.cvmm import check_cvmm
from sparseffn.ops.library import gradient_like
from sparseffn.ops.triton import outer, products
from sparseffn.ops.triton.launch import (
    Rows,
    check_tensors,
    device_of,
    run_outer,
    run_product,
    sort_rows,
    start,
    with_lines,
)


def cvmm(x: Tensor, sel: Tensor, weight: Tensor) -> Tensor:
    """`[N, L]`, in four launches: the sort of `sel`, and the product."""
    check_cvmm(x, sel, weight)
    check_tensors(x=x)
    with device_of(x):
        return _products("cvmm", sort_rows(sel.contiguous(), weight.shape[0]), with_lines(x), weight)


# It keeps nothing but its arguments.
cvmm_kept = cvmm


def cvmm_backward(
    grad_y: Tensor, x: Tensor, sel: Tensor, weight: Tensor, needed: Sequence[bool] | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the matrices, those that are needed."""
    of_x, of_weight = needed or (True, True)
    grad, x = with_lines(grad_y), with_lines(x)
    with device_of(x):
        rows = sort_rows(sel.contiguous(), weight.shape[0])
        grad_x = _products("cvmm_bwd_x", rows, grad, weight.mT) if of_x else x.new_empty(0)
        grad_weight = _weight_gradient(rows, x, grad, weight) if of_weight else x.new_empty(0)
    return grad_x, grad_weight


def _products(name: str, rows: Rows, x: Tensor, weight: Tensor) -> Tensor:
    """Each row times its matrix, where the row was."""
    (_, n_in, n_out), out = weight.shape, x.new_empty(x.shape[0], weight.shape[2])
    strides = dict(zip(("VALUES_EXPERT", "VALUES_IN", "VALUES_OUT"), weight.stride(), strict=True))
    sizes = {"N_IN": n_in, "N_OUT": n_out, "ROW": x.stride(0), "GATHERED": True}

    def launch(n_programs: int, options: dict[str, Any]) -> None:
        arguments = (x, weight, None, None, *rows, out, rows.n_rows)
        start(products.experts_down_fwd_kernel, n_programs, *arguments, **sizes, **strides, **options)

    run_product(name, rows, (n_in, n_out), (x, weight), launch, family="hidden")
    return out


def _weight_gradient(rows: Rows, x: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
    out, (_, n_in, n_out) = gradient_like(weight), weight.shape
    sorted_grad = grad.index_select(0, rows.order)
    strides: dict[str, int] = {}
    for name in ("KEYS", "GATES"):
        strides |= dict(zip((f"{name}_EXPERT", f"{name}_ROW", f"{name}_COLUMN"), out.stride(), strict=True))
    sizes = {"M": n_in, "N": n_out, "K": 1, "X_ROW": x.stride(0), **strides}

    def launch(n_programs: int, targets: tuple[Tensor, ...], n_parts: int, options: dict[str, Any]) -> None:
        pointers = (x, sorted_grad, *rows, *targets, None, n_parts)
        start(outer.experts_bwd_keys_kernel, n_programs, *pointers, **sizes, **options)

    run_outer("cvmm_bwd_weight", rows, (out,), (x, sorted_grad), launch)
    return out
