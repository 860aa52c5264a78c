"""The operations on Triton kernels; signatures as in `_torch_kernels.py`. Shapes: see ops/README.md.

Products of rows leave each row where the sort by expert put it; `sum_rows` then gathers and adds up a token's rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparseffn.ops._checks import check_rows
from sparseffn.ops.triton import outer, products, sums
from sparseffn.ops.triton.launch import (
    check_tensors,
    device_of,
    run_outer,
    run_product,
    segments,
    start,
    sum_options,
    sum_rows,
)
from sparseffn.ops.triton.tuning import cdiv


def expert_up(x: Tensor, weight: Tensor, tokens: Tensor, offsets: Tensor) -> Tensor:
    """See `ops.expert_up`."""
    check_tensors(x=x, weight=weight, tokens=tokens, offsets=offsets)
    tokens, offsets = tokens.contiguous(), offsets.contiguous()
    n_rows, (_, n_inner, n_outer) = tokens.shape[0], weight.shape
    out = x.new_empty(n_rows, n_outer)
    strides = (*x.stride(), *weight.stride())

    def launch(n_programs: int, tiles: Tensor, options: dict[str, Any]) -> None:
        pointers = (x, weight, tokens, offsets, tiles, out)
        start(products.expert_up_fwd_kernel, n_programs, *pointers, n_inner, n_outer, *strides, **options)

    run_product("expert_up", x, weight, offsets, n_rows, launch)
    return out


def expert_up_backward(grad: Tensor, x: Tensor, weight: Tensor, tokens: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the expert matrices."""
    check_tensors(grad=grad, x=x, weight=weight, tokens=tokens, offsets=offsets)
    tokens, offsets, back = tokens.contiguous(), offsets.contiguous(), weight.transpose(1, 2)
    n_rows, (_, n_left, n_right) = tokens.shape[0], weight.shape
    rows, grad_weight = x.new_empty(n_rows, n_left), weight.new_empty(weight.shape)

    def launch_rows(n_programs: int, tiles: Tensor, options: dict[str, Any]) -> None:
        pointers, strides = (grad, back, offsets, tiles, rows), (*grad.stride(), *back.stride())
        start(products.expert_up_bwd_x_kernel, n_programs, *pointers, n_right, n_left, *strides, **options)

    def launch_weight(n_programs: int, options: dict[str, Any]) -> None:
        pointers, strides = (x, grad, tokens, offsets, grad_weight), (*x.stride(), *grad.stride())
        start(outer.expert_up_bwd_weight_kernel, n_programs, *pointers, n_left, n_right, *strides, **options)

    run_product("expert_up_bwd_x", grad, back, offsets, n_rows, launch_rows)
    run_outer("expert_up_bwd_weight", x, grad, grad_weight, n_rows, launch_weight)
    return sum_rows(rows, tokens, x.shape[0]), grad_weight


def expert_down(a: Tensor, weight: Tensor, gates: Tensor, tokens: Tensor, offsets: Tensor, n_tokens: int) -> Tensor:
    """See `ops.expert_down`."""
    check_tensors(a=a, weight=weight, gates=gates, tokens=tokens, offsets=offsets)
    gates, tokens, offsets = gates.contiguous(), tokens.contiguous(), offsets.contiguous()
    n_rows, (_, n_inner, n_outer) = tokens.shape[0], weight.shape
    rows = a.new_empty(n_rows, n_outer)
    strides = (*a.stride(), *weight.stride())

    def launch(n_programs: int, tiles: Tensor, options: dict[str, Any]) -> None:
        pointers = (a, weight, gates, offsets, tiles, rows)
        start(products.expert_down_fwd_kernel, n_programs, *pointers, n_inner, n_outer, *strides, **options)

    run_product("expert_down", a, weight, offsets, n_rows, launch)
    return sum_rows(rows, tokens, n_tokens)


def expert_down_backward(
    grad: Tensor, a: Tensor, weight: Tensor, gates: Tensor, tokens: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the activations, of the expert matrices and of the gates."""
    check_tensors(grad=grad, a=a, weight=weight, gates=gates, tokens=tokens, offsets=offsets)
    gates, tokens, offsets, back = gates.contiguous(), tokens.contiguous(), offsets.contiguous(), weight.transpose(1, 2)
    n_rows, (_, n_left, n_right) = tokens.shape[0], weight.shape
    grad_a, grad_weight = a.new_empty(n_rows, n_left), weight.new_empty(weight.shape)

    def launch_rows(n_programs: int, tiles: Tensor, options: dict[str, Any]) -> Tensor:
        dots = a.new_empty(cdiv(n_left, options["BLOCK_N"]), n_rows, dtype=torch.float32)
        pointers = (grad, back, a, gates, tokens, offsets, tiles, grad_a, dots)
        sizes, strides = (n_right, n_left, n_rows), (*grad.stride(), *back.stride(), *a.stride())
        start(products.expert_down_bwd_a_gates_kernel, n_programs, *pointers, *sizes, *strides, **options)
        return dots

    def launch_weight(n_programs: int, options: dict[str, Any]) -> None:
        pointers, strides = (a, grad, gates, tokens, offsets, grad_weight), (*a.stride(), *grad.stride())
        start(outer.expert_down_bwd_weight_kernel, n_programs, *pointers, n_left, n_right, *strides, **options)

    dots = run_product("expert_down_bwd_a_gates", grad, back, offsets, n_rows, launch_rows)
    run_outer("expert_down_bwd_weight", a, grad, grad_weight, n_rows, launch_weight)
    return grad_a, grad_weight, dots.sum(dim=0).to(gates.dtype)


def weighted_rows(values: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """See `ops.weighted_rows`; the weights are used as they come, not rounded to the dtype of the values."""
    check_tensors(values=values, indices=indices, weights=weights)
    check_rows(indices, values.shape[0])
    indices, weights = indices.contiguous(), weights.contiguous()
    (n_tokens, n_k), n_width = indices.shape, values.shape[1]
    out, options = values.new_empty(n_tokens, n_width), sum_options(n_width)
    with device_of(values):
        pointers, n_programs = (values, indices, weights, out), n_tokens * cdiv(n_width, options["BLOCK_D"])
        start(sums.weighted_rows_fwd_kernel, n_programs, *pointers, n_k, n_width, *values.stride(), **options)
    return out


def weighted_rows_backward(grad: Tensor, values: Tensor, indices: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the value table and of the weights."""
    check_tensors(grad=grad, values=values, indices=indices, weights=weights)
    indices, weights = indices.contiguous(), weights.contiguous()
    (n_tokens, n_k), (n_values, n_width) = indices.shape, values.shape
    grad_values, grad_weights = values.new_empty(n_values, n_width), weights.new_empty(n_tokens, n_k)
    options = sum_options(n_width)
    with device_of(values):
        pointers, n_programs = (grad, values, indices, grad_weights), n_tokens * cdiv(n_k, options["BLOCK_J"])
        strides = (*grad.stride(), *values.stride())
        start(sums.weighted_rows_bwd_weights_kernel, n_programs, *pointers, n_k, n_width, *strides, **options)
        order, starts = segments(indices.flatten(), n_values)
        pointers, n_programs = (grad, weights, order, starts, grad_values), n_values * cdiv(n_width, options["BLOCK_D"])
        start(sums.weighted_rows_bwd_values_kernel, n_programs, *pointers, n_k, n_width, *grad.stride(), **options)
    return grad_values, grad_weights
