"""Gradients of the expert matrices, `out[e] = sum over the rows r of expert e of left[r] right[r]^T`, and of their biases.

One program owns one tile of one matrix and walks through the rows of that expert, or through one of a few equal stretches of
them, whose float32 parts `sum_parts_kernel` adds up in order: no atomics, every entry is written once, and a matrix without
rows is written as zeros. Sizes and strides are constants of a compilation. Accumulated in float32.
Names: p_ pointer (None: not there), b_ block of values, o_ offsets, m_ mask, i_ index of the program. Shapes: ops/README.md.
"""

# Kernels call each other when compiled, never as Python functions, which is what their types say.
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl

BATCH_SIZES = ["n_parts", "n_elements"]


@triton.jit
def matrix_tile(
    p_offsets, n_parts, M: tl.constexpr, N: tl.constexpr, N_EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Part, expert, left and right columns with masks, and the stretch of rows of this program; an expert's are neighbours."""
    n_left: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    n_right: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    i_tile = tl.program_id(0) % (n_left * n_right)
    i_expert = (tl.program_id(0) // (n_left * n_right)) % N_EXPERTS
    i_part = tl.program_id(0) // (n_left * n_right * N_EXPERTS)
    o_m = (i_tile // n_right).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = (i_tile % n_right).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    i_begin, i_end = tl.load(p_offsets + i_expert), tl.load(p_offsets + i_expert + 1)
    n_steps = (i_end - i_begin + n_parts * BLOCK_K - 1) // (n_parts * BLOCK_K)
    i_start = i_begin + i_part * n_steps * BLOCK_K
    i_stop = tl.minimum(i_end, i_start + n_steps * BLOCK_K)
    return i_part.to(tl.int64), i_expert.to(tl.int64), o_m, o_n, i_start, i_stop


@triton.jit
def store_tile(
    p_out, b_sum, i_part, i_expert, o_m, o_n, M: tl.constexpr, N: tl.constexpr, N_EXPERTS: tl.constexpr,
    EXPERT: tl.constexpr, ROW: tl.constexpr, COLUMN: tl.constexpr,
):  # fmt: skip
    """Write one tile of `out[e]`, or of a part of it: parts lie one behind the other."""
    p_o = p_out + i_part * (N_EXPERTS * M * N) + i_expert * EXPERT + o_m[:, None] * ROW + o_n[None, :] * COLUMN
    tl.store(p_o, b_sum.to(p_out.dtype.element_ty), (o_m < M)[:, None] & (o_n < N)[None, :])


@triton.jit(do_not_specialize=BATCH_SIZES)
def experts_bwd_keys_kernel(
    p_x, p_grad_hidden, p_order, p_offsets, p_keys, p_gate_keys, n_parts,
    M: tl.constexpr, N: tl.constexpr, N_EXPERTS: tl.constexpr, K: tl.constexpr, X_ROW: tl.constexpr,
    KEYS_EXPERT: tl.constexpr, KEYS_ROW: tl.constexpr, KEYS_COLUMN: tl.constexpr,
    GATES_EXPERT: tl.constexpr, GATES_ROW: tl.constexpr, GATES_COLUMN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of the keys `sum_r x[t]^T grad_hidden[r, :N]`; of gate keys the same with the columns behind, by the second programs."""
    GATED: tl.constexpr = p_gate_keys is not None
    HIDDEN_ROW: tl.constexpr = 2 * N if GATED else N
    i_part, i_expert, o_m, o_n, i_start, i_stop = matrix_tile(p_offsets, n_parts, M, N, N_EXPERTS, BLOCK_M, BLOCK_N, BLOCK_K)
    i_factor = tl.program_id(1).to(tl.int64)
    m_m, m_n = o_m < M, o_n < N
    b_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_row in range(i_start, i_stop, BLOCK_K):
        o_r = i_row + tl.arange(0, BLOCK_K)
        m_r = o_r < i_stop
        o_t = tl.load(p_order + o_r, m_r, 0) // K
        b_left = tl.load(p_x + o_t[None, :] * X_ROW + o_m[:, None], m_m[:, None] & m_r[None, :], 0.0)
        p_right = p_grad_hidden + i_factor * N + o_r[:, None] * HIDDEN_ROW + o_n[None, :]
        b_right = tl.load(p_right, m_r[:, None] & m_n[None, :], 0.0)
        b_sum = tl.dot(b_left, b_right, b_sum, input_precision=PRECISION)
    if GATED:
        if i_factor == 1:
            store_tile(
                p_gate_keys, b_sum, i_part, i_expert, o_m, o_n, M, N, N_EXPERTS, GATES_EXPERT, GATES_ROW, GATES_COLUMN
            )  # fmt: skip
        else:
            store_tile(p_keys, b_sum, i_part, i_expert, o_m, o_n, M, N, N_EXPERTS, KEYS_EXPERT, KEYS_ROW, KEYS_COLUMN)
    else:
        store_tile(p_keys, b_sum, i_part, i_expert, o_m, o_n, M, N, N_EXPERTS, KEYS_EXPERT, KEYS_ROW, KEYS_COLUMN)


@triton.jit(do_not_specialize=BATCH_SIZES)
def experts_bwd_values_kernel(
    p_alpha, p_grad, p_order, p_offsets, p_values, n_parts,
    M: tl.constexpr, N: tl.constexpr, N_EXPERTS: tl.constexpr, K: tl.constexpr, GRAD_ROW: tl.constexpr,
    VALUES_EXPERT: tl.constexpr, VALUES_ROW: tl.constexpr, VALUES_COLUMN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`sum_r alpha[r]^T grad[t]`, alpha the gate times the unit."""
    i_part, i_expert, o_m, o_n, i_start, i_stop = matrix_tile(p_offsets, n_parts, M, N, N_EXPERTS, BLOCK_M, BLOCK_N, BLOCK_K)
    m_m, m_n = o_m < M, o_n < N
    b_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_row in range(i_start, i_stop, BLOCK_K):
        o_r = i_row + tl.arange(0, BLOCK_K)
        m_r = o_r < i_stop
        o_t = tl.load(p_order + o_r, m_r, 0) // K
        b_left = tl.load(p_alpha + o_r[None, :] * M + o_m[:, None], m_m[:, None] & m_r[None, :], 0.0)
        b_right = tl.load(p_grad + o_t[:, None] * GRAD_ROW + o_n[None, :], m_r[:, None] & m_n[None, :], 0.0)
        b_sum = tl.dot(b_left, b_right, b_sum, input_precision=PRECISION)
    store_tile(p_values, b_sum, i_part, i_expert, o_m, o_n, M, N, N_EXPERTS, VALUES_EXPERT, VALUES_ROW, VALUES_COLUMN)


@triton.jit(do_not_specialize=BATCH_SIZES)
def sum_parts_kernel(p_parts, p_out, p_second, n_elements, n_parts, BLOCK: tl.constexpr):
    """`out = sum over the parts`, in their order; both lie alike in memory. `second`: of the parts behind."""
    i_factor = tl.program_id(1).to(tl.int64)
    o_i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_i = o_i < n_elements
    b_sum = tl.zeros([BLOCK], tl.float32)
    p_part = p_parts + i_factor * n_parts * n_elements + o_i
    for _ in range(n_parts):
        b_sum += tl.load(p_part, m_i, 0.0)
        p_part += n_elements
    if p_second is not None:
        if i_factor == 1:
            tl.store(p_second + o_i, b_sum.to(p_second.dtype.element_ty), m_i)
        else:
            tl.store(p_out + o_i, b_sum.to(p_out.dtype.element_ty), m_i)
    else:
        tl.store(p_out + o_i, b_sum.to(p_out.dtype.element_ty), m_i)


@triton.jit
def experts_bwd_bias_kernel(
    p_rows, p_gates, p_order, p_offsets, p_bias, p_gate_bias,
    N: tl.constexpr, K: tl.constexpr, ROW: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Of the keys' biases `sum_r rows[r]`, of the values', with gates, `sum_r gates[order[r]] rows[t]`."""
    n_blocks: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    i_expert = (tl.program_id(0) // n_blocks).to(tl.int64)
    o_n = (tl.program_id(0) % n_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    i_factor = tl.program_id(1).to(tl.int64)
    i_start, i_stop = tl.load(p_offsets + i_expert), tl.load(p_offsets + i_expert + 1)
    b_sum = tl.zeros([BLOCK_N], tl.float32)
    for i_row in range(i_start, i_stop, BLOCK_K):
        o_r = i_row + tl.arange(0, BLOCK_K)
        m_r = o_r < i_stop
        if p_gates is not None:
            o_s = tl.load(p_order + o_r, m_r, 0)
            b_gates = tl.load(p_gates + o_s, m_r, 0.0)
            b_rows = tl.load(p_rows + (o_s // K)[:, None] * ROW + o_n[None, :], m_r[:, None] & (o_n < N)[None, :], 0.0)
            b_sum += tl.sum(b_rows.to(tl.float32) * b_gates[:, None], 0)
        else:
            p_r = p_rows + i_factor * N + o_r[:, None] * ROW + o_n[None, :]
            b_sum += tl.sum(tl.load(p_r, m_r[:, None] & (o_n < N)[None, :], 0.0).to(tl.float32), 0)
    # The first programs' bias may be absent, and the second's.
    if i_factor == 0:
        if p_bias is not None:
            tl.store(p_bias + i_expert * N + o_n, b_sum.to(p_bias.dtype.element_ty), o_n < N)
    else:
        if p_gate_bias is not None:
            tl.store(p_gate_bias + i_expert * N + o_n, b_sum.to(p_gate_bias.dtype.element_ty), o_n < N)
