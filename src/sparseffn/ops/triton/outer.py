"""Gradients of the expert matrices: `out[e] = sum over the rows r of expert e of left[r] right[r]^T`, without atomics.

One program owns one tile of one matrix and walks through the rows of that expert, so every entry is written once, in a
fixed order of summation, and a matrix without rows is written as zeros. Accumulated in float32.
Names: p_ pointer, b_ block of values, o_ offsets, m_ mask, i_ index of the program. Shapes: see ops/README.md.
"""

# Kernels call each other when compiled, never as Python functions, which is what their types say.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def matrix_tile(n_left, n_right, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The expert, left columns and right columns of this program, with masks. Programs of one expert are neighbours."""
    n_blocks_left, n_blocks_right = tl.cdiv(n_left, BLOCK_M), tl.cdiv(n_right, BLOCK_N)
    i_expert = tl.program_id(0) // (n_blocks_left * n_blocks_right)
    i_tile = tl.program_id(0) % (n_blocks_left * n_blocks_right)
    o_m = (i_tile // n_blocks_right).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = (i_tile % n_blocks_right).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    return i_expert.to(tl.int64), o_m, o_m < n_left, o_n, o_n < n_right


@triton.jit
def store_matrix_tile(p_out, b_sum, i_expert, o_m, m_m, o_n, m_n, n_left, n_right):
    """Write one tile of `out[e]`."""
    p_o = p_out + i_expert * n_left * n_right + o_m[:, None] * n_right + o_n[None, :]
    tl.store(p_o, b_sum.to(p_out.dtype.element_ty), m_m[:, None] & m_n[None, :])


@triton.jit
def expert_up_bwd_weight_kernel(
    p_x, p_grad, p_tokens, p_offsets, p_out, n_left, n_right,
    stride_x_row, stride_x_inner, stride_grad_row, stride_grad_inner,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`out[e] = sum_r x[tokens[r]] grad[r]^T`."""
    i_expert, o_m, m_m, o_n, m_n = matrix_tile(n_left, n_right, BLOCK_M, BLOCK_N)
    i_start, i_stop = tl.load(p_offsets + i_expert), tl.load(p_offsets + i_expert + 1)
    b_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_row in range(i_start, i_stop, BLOCK_K):
        o_r = i_row + tl.arange(0, BLOCK_K)
        m_r = o_r < i_stop
        o_t = tl.load(p_tokens + o_r, m_r, 0)
        p_left = p_x + o_t[None, :] * stride_x_row + o_m[:, None] * stride_x_inner
        b_left = tl.load(p_left, m_m[:, None] & m_r[None, :], 0.0)
        p_right = p_grad + o_r[:, None] * stride_grad_row + o_n[None, :] * stride_grad_inner
        b_right = tl.load(p_right, m_r[:, None] & m_n[None, :], 0.0)
        b_sum = tl.dot(b_left, b_right, b_sum, input_precision=PRECISION)
    store_matrix_tile(p_out, b_sum, i_expert, o_m, m_m, o_n, m_n, n_left, n_right)


@triton.jit
def expert_down_bwd_weight_kernel(
    p_a, p_grad, p_gates, p_tokens, p_offsets, p_out, n_left, n_right,
    stride_a_row, stride_a_inner, stride_grad_row, stride_grad_inner,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`out[e] = sum_r gates[r] a[r] grad[tokens[r]]^T`; the scaled row is rounded once to the dtype of a."""
    i_expert, o_m, m_m, o_n, m_n = matrix_tile(n_left, n_right, BLOCK_M, BLOCK_N)
    i_start, i_stop = tl.load(p_offsets + i_expert), tl.load(p_offsets + i_expert + 1)
    b_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_row in range(i_start, i_stop, BLOCK_K):
        o_r = i_row + tl.arange(0, BLOCK_K)
        m_r = o_r < i_stop
        o_t = tl.load(p_tokens + o_r, m_r, 0)
        b_gates = tl.load(p_gates + o_r, m_r, 0.0).to(tl.float32)
        p_left = p_a + o_r[None, :] * stride_a_row + o_m[:, None] * stride_a_inner
        b_left = tl.load(p_left, m_m[:, None] & m_r[None, :], 0.0)
        b_left = (b_left.to(tl.float32) * b_gates[None, :]).to(p_a.dtype.element_ty)
        p_right = p_grad + o_t[:, None] * stride_grad_row + o_n[None, :] * stride_grad_inner
        b_right = tl.load(p_right, m_r[:, None] & m_n[None, :], 0.0)
        b_sum = tl.dot(b_left, b_right, b_sum, input_precision=PRECISION)
    store_matrix_tile(p_out, b_sum, i_expert, o_m, m_m, o_n, m_n, n_left, n_right)
