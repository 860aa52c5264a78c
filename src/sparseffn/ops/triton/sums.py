"""Sums of rows: the rows of each token added up, weighted value rows (equation 7) and their gradients, without atomics.

Every program writes one stretch of one output row and adds the rows that belong to it in a fixed order, in float32. Where
many rows go to one output row, the caller sorts them: output row s owns entries starts[s] up to starts[s + 1] of `order`.
An index of no row adds nothing and is never read through.
Names: p_ pointer, b_ block of values, o_ offsets, m_ mask, i_ index of the program. Shapes: see ops/README.md.
"""

# Kernels call each other when compiled, never as Python functions, which is what their types say.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_stretch(n_width, BLOCK_D: tl.constexpr):
    """The output row of this program and its stretch of columns, with the mask."""
    n_blocks = tl.cdiv(n_width, BLOCK_D)
    i_row = (tl.program_id(0) // n_blocks).to(tl.int64)
    o_d = (tl.program_id(0) % n_blocks).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    return i_row, o_d, o_d < n_width


@triton.jit
def load_rows(p_table, o_rows, m_rows, o_d, m_d, stride_row, stride_inner):
    """A block of table rows in float32; masked rows are zero."""
    p_rows = p_table + o_rows[:, None] * stride_row + o_d[None, :] * stride_inner
    return tl.load(p_rows, m_rows[:, None] & m_d[None, :], 0.0).to(tl.float32)


@triton.jit(do_not_specialize=["n_tokens"])
def token_sum_kernel(
    p_rows, p_out, n_tokens, K: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """`out[t] = sum_k rows[t K + k]`, in float32, rounded once: a token's rows are neighbours."""
    n_blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    o_t = (tl.program_id(0) // n_blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_d = (tl.program_id(0) % n_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_out = (o_t < n_tokens)[:, None] & (o_d < D)[None, :]
    b_sum = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for i_k in range(K):
        b_sum += tl.load(p_rows + (o_t * K + i_k)[:, None] * D + o_d[None, :], m_out, 0.0).to(tl.float32)
    tl.store(p_out + o_t[:, None] * D + o_d[None, :], b_sum.to(p_out.dtype.element_ty), m_out)


@triton.jit
def weighted_rows_fwd_kernel(
    p_values, p_indices, p_weights, p_out, n_values, n_k, n_width, stride_row, stride_inner,
    BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`out[t] = sum_k weights[t, k] values[indices[t, k]]`."""
    i_token, o_d, m_d = row_stretch(n_width, BLOCK_D)
    b_sum = tl.zeros([BLOCK_D], tl.float32)
    for i_k in range(0, n_k, BLOCK_J):
        o_k = i_k + tl.arange(0, BLOCK_J)
        m_k = o_k < n_k
        o_v = tl.load(p_indices + i_token * n_k + o_k, m_k, -1)
        m_k = (o_v >= 0) & (o_v < n_values)
        b_weights = tl.load(p_weights + i_token * n_k + o_k, m_k, 0.0).to(tl.float32)
        b_rows = load_rows(p_values, o_v, m_k, o_d, m_d, stride_row, stride_inner)
        b_sum += tl.sum(b_rows * b_weights[:, None], 0)
    tl.store(p_out + i_token * n_width + o_d, b_sum.to(p_out.dtype.element_ty), m_d)


@triton.jit
def weighted_rows_bwd_values_kernel(
    p_grad, p_weights, p_order, p_starts, p_out, n_k, n_width, stride_row, stride_inner,
    BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`out[v] = sum over the pairs (t, k) with indices[t, k] = v of weights[t, k] grad[t]`; `order` holds t n_k + k."""
    i_value, o_d, m_d = row_stretch(n_width, BLOCK_D)
    i_start, i_stop = tl.load(p_starts + i_value), tl.load(p_starts + i_value + 1)
    b_sum = tl.zeros([BLOCK_D], tl.float32)
    for i_entry in range(i_start, i_stop, BLOCK_J):
        o_j = i_entry + tl.arange(0, BLOCK_J)
        m_j = o_j < i_stop
        o_pair = tl.load(p_order + o_j, m_j, 0)
        b_weights = tl.load(p_weights + o_pair, m_j, 0.0).to(tl.float32)
        b_rows = load_rows(p_grad, o_pair // n_k, m_j, o_d, m_d, stride_row, stride_inner)
        b_sum += tl.sum(b_rows * b_weights[:, None], 0)
    tl.store(p_out + i_value * n_width + o_d, b_sum.to(p_out.dtype.element_ty), m_d)


@triton.jit
def weighted_rows_bwd_weights_kernel(
    p_grad, p_values, p_indices, p_out, n_values, n_k, n_width, stride_grad_row, stride_grad_inner, stride_row, stride_inner,
    BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`out[t, k] = grad[t] . values[indices[t, k]]`."""
    n_blocks = tl.cdiv(n_k, BLOCK_J)
    i_token = (tl.program_id(0) // n_blocks).to(tl.int64)
    o_k = (tl.program_id(0) % n_blocks) * BLOCK_J + tl.arange(0, BLOCK_J)
    m_k = o_k < n_k
    o_v = tl.load(p_indices + i_token * n_k + o_k, m_k, -1)
    m_v = (o_v >= 0) & (o_v < n_values)
    b_sum = tl.zeros([BLOCK_J], tl.float32)
    for i_d in range(0, n_width, BLOCK_D):
        o_d = i_d + tl.arange(0, BLOCK_D).to(tl.int64)
        m_d = o_d < n_width
        p_g = p_grad + i_token * stride_grad_row + o_d * stride_grad_inner
        b_grad = tl.load(p_g, m_d, 0.0).to(tl.float32)
        b_rows = load_rows(p_values, o_v, m_v, o_d, m_d, stride_row, stride_inner)
        b_sum += tl.sum(b_rows * b_grad[None, :], 1)
    tl.store(p_out + i_token * n_k + o_k, b_sum.to(p_out.dtype.element_ty), m_k)
