"""Rows times the matrix of their expert (equation 26), in tiles of BLOCK_M sorted rows that never span two experts.

A row's selection is `order[r] = token K + slot`; what a row adds to its token is stored at its selection, so that a token's K
rows are neighbours. Sizes and strides are constants of a compilation, which makes gathered rows of any even width
asynchronous copies. Products are accumulated in float32; a row of no expert (see `sorting.py`) has matrices of zeros.
Names: p_ pointer (None: not there), b_ block of values, o_ offsets, m_ mask, i_ index of the program. Shapes: ops/README.md.
"""

# Kernels call each other when compiled, never as Python functions, which is what their types say.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from sparseffn.ops.triton.units import units, units_backward

BATCH_SIZES = ["n_rows"]


@triton.jit
def tile_rows(
    p_offsets, n_rows, N_OUT: tl.constexpr, N_EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Expert, rows and output columns of this program, with masks. Programs of one tile are neighbours.

    The offsets are few enough to be searched by every program: a map of tiles would be a launch more, and one for every
    size of tiles. Behind expert E - 1 come the rows of none, then programs without rows.
    """
    n_blocks: tl.constexpr = (N_OUT + BLOCK_N - 1) // BLOCK_N
    i_tile = tl.program_id(0) // n_blocks
    o_e = tl.arange(0, BLOCK_E)
    b_start = tl.load(p_offsets + o_e, o_e <= N_EXPERTS, 0).to(tl.int32)
    b_start = tl.where(o_e <= N_EXPERTS, b_start, n_rows)
    b_stop = tl.load(p_offsets + o_e + 1, o_e < N_EXPERTS, 0).to(tl.int32)
    b_stop = tl.where(o_e < N_EXPERTS, b_stop, n_rows)
    b_ends = tl.cumsum((b_stop - b_start + BLOCK_M - 1) // BLOCK_M, 0)
    i_expert = tl.sum((b_ends <= i_tile).to(tl.int32))
    i_first = tl.max(tl.where(b_ends <= i_tile, b_ends, 0))
    i_start = tl.sum(tl.where(o_e == i_expert, b_start, 0))
    i_stop = tl.sum(tl.where(o_e == i_expert, b_stop, 0))
    o_r = (i_start + (i_tile - i_first) * BLOCK_M).to(tl.int64) + tl.arange(0, BLOCK_M)
    o_n = (tl.program_id(0) % n_blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    return i_expert.to(tl.int64), o_r, o_r < i_stop, o_n, (o_n < N_OUT) & (i_expert < N_EXPERTS)


@triton.jit
def expert_bias(p_bias, i_expert, o_n, m_n, N_OUT: tl.constexpr):
    """One expert's bias, as a row."""
    return tl.load(p_bias + i_expert * N_OUT + o_n, m_n, 0.0).to(tl.float32)[None, :]


@triton.jit
def add_product(
    b_sum, p_rows, m_r, p_weight, m_n, N_IN: tl.constexpr, IN: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`b_sum + rows @ weight` of one tile; the pointers are at the rows' and at the columns' first element, IN apart."""
    o_k = tl.arange(0, BLOCK_K).to(tl.int64)
    p_a = p_rows[:, None] + o_k[None, :]
    p_b = p_weight[None, :] + o_k[:, None] * IN
    for i_k in range(0, N_IN, BLOCK_K):
        m_k = o_k < N_IN - i_k
        b_a = tl.load(p_a, m_r[:, None] & m_k[None, :], 0.0)
        b_b = tl.load(p_b, m_k[:, None] & m_n[None, :], 0.0)
        b_sum = tl.dot(b_a, b_b, b_sum, input_precision=PRECISION)
        p_a += BLOCK_K
        p_b += BLOCK_K * IN
    return b_sum


@triton.jit(do_not_specialize=BATCH_SIZES)
def experts_up_fwd_kernel(
    p_x, p_keys, p_gate_keys, p_key_bias, p_gate_bias, p_keep, p_order, p_offsets, p_hidden, p_a, n_rows,
    N_IN: tl.constexpr, N_OUT: tl.constexpr, N_EXPERTS: tl.constexpr, K: tl.constexpr, X_ROW: tl.constexpr,
    KEYS_EXPERT: tl.constexpr, KEYS_IN: tl.constexpr, KEYS_OUT: tl.constexpr,
    GATES_EXPERT: tl.constexpr, GATES_IN: tl.constexpr, GATES_OUT: tl.constexpr,
    ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, KEEP_SCALE: tl.constexpr, UNSORTED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`a[r] = keep act(x[t] keys[e] + key_bias[e]) (x[t] gate_keys[e] + gate_bias[e])`, and what backward needs of it.

    UNSORTED: both are written to row `order[r]` instead, where a token's units are neighbours.
    """
    i_expert, o_r, m_r, o_n, m_n = tile_rows(p_offsets, n_rows, N_OUT, N_EXPERTS, BLOCK_M, BLOCK_N, BLOCK_E)
    if i_expert > N_EXPERTS:
        return
    GATED: tl.constexpr = p_gate_keys is not None
    o_s = tl.load(p_order + o_r, m_r, 0)
    o_k = tl.arange(0, BLOCK_K).to(tl.int64)
    p_b_x = (p_x + o_s // K * X_ROW)[:, None] + o_k[None, :]
    p_b_keys = (p_keys + i_expert * KEYS_EXPERT + o_n * KEYS_OUT)[None, :] + o_k[:, None] * KEYS_IN
    if GATED:
        p_b_gates = (p_gate_keys + i_expert * GATES_EXPERT + o_n * GATES_OUT)[None, :] + o_k[:, None] * GATES_IN
    b_h = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    b_u = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_k in range(0, N_IN, BLOCK_K):
        m_k = o_k < N_IN - i_k
        b_x = tl.load(p_b_x, m_r[:, None] & m_k[None, :], 0.0)
        b_keys = tl.load(p_b_keys, m_k[:, None] & m_n[None, :], 0.0)
        b_h = tl.dot(b_x, b_keys, b_h, input_precision=PRECISION)
        if GATED:
            b_gates = tl.load(p_b_gates, m_k[:, None] & m_n[None, :], 0.0)
            b_u = tl.dot(b_x, b_gates, b_u, input_precision=PRECISION)
            p_b_gates += BLOCK_K * GATES_IN
        p_b_x += BLOCK_K
        p_b_keys += BLOCK_K * KEYS_IN
    if p_key_bias is not None:
        b_h += expert_bias(p_key_bias, i_expert, o_n, m_n, N_OUT)
    if p_gate_bias is not None:
        b_u += expert_bias(p_gate_bias, i_expert, o_n, m_n, N_OUT)
    # Rows of no expert are stored too, as zeros.
    m_out = m_r[:, None] & (o_n < N_OUT)[None, :]
    o_row = o_r
    if UNSORTED:
        # Once more, as over the product it would lie in registers; by another policy, or it would be taken for the same load.
        o_row = tl.load(p_order + o_r, m_r, 0, eviction_policy="evict_first")
    if p_hidden is not None:
        ROW: tl.constexpr = 2 * N_OUT if GATED else N_OUT
        p_h = p_hidden + o_row[:, None] * ROW + o_n[None, :]
        if not GATED and (ACTIVATION == "relu" or ACTIVATION == "relu2"):
            b_h = tl.where(b_h <= 0, 0.0, b_h)
        tl.store(p_h, b_h.to(p_hidden.dtype.element_ty), m_out)
        if GATED:
            tl.store(p_h + N_OUT, b_u.to(p_hidden.dtype.element_ty), m_out)
    if p_a is not None:
        b_a = units(b_h, b_u, GATED, ACTIVATION, ALPHA, LIMIT)
        o_a = o_row[:, None] * N_OUT + o_n[None, :]
        if p_keep is not None:
            if UNSORTED:
                o_keep = o_a
            else:
                o_keep = o_s[:, None] * N_OUT + o_n[None, :]
            m_keep = tl.load(p_keep + o_keep, m_out, 0) != 0
            b_a = tl.where(m_keep, b_a * KEEP_SCALE, 0.0)
        tl.store(p_a + o_a, b_a.to(p_a.dtype.element_ty), m_out)


@triton.jit(do_not_specialize=BATCH_SIZES)
def experts_down_fwd_kernel(
    p_rows, p_values, p_value_bias, p_gates, p_order, p_offsets, p_out, n_rows,
    N_IN: tl.constexpr, N_OUT: tl.constexpr, N_EXPERTS: tl.constexpr,
    VALUES_EXPERT: tl.constexpr, VALUES_IN: tl.constexpr, VALUES_OUT: tl.constexpr, GATHERED: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`out[order[r]] = gates[order[r]] (rows[r] values[e] + value_bias[e])`, what row r adds to the output of its token.

    GATHERED: `rows[order[r]]` instead, of rows that were not sorted.
    """
    i_expert, o_r, m_r, o_n, m_n = tile_rows(p_offsets, n_rows, N_OUT, N_EXPERTS, BLOCK_M, BLOCK_N, BLOCK_E)
    if i_expert > N_EXPERTS:
        return
    o_row = o_r
    if GATHERED:
        o_row = tl.load(p_order + o_r, m_r, 0)
    b_out = add_product(
        tl.zeros([BLOCK_M, BLOCK_N], tl.float32), p_rows + o_row * ROW, m_r,
        p_values + i_expert * VALUES_EXPERT + o_n * VALUES_OUT, m_n, N_IN, VALUES_IN, BLOCK_K, PRECISION,
    )  # fmt: skip
    if p_value_bias is not None:
        b_out += expert_bias(p_value_bias, i_expert, o_n, m_n, N_OUT)
    # Not before the product, over which it would lie in registers.
    o_s = tl.load(p_order + o_r, m_r, 0)
    if p_gates is not None:
        b_out = b_out * tl.load(p_gates + o_s, m_r, 0.0)[:, None]
    p_o = p_out + o_s[:, None] * N_OUT + o_n[None, :]
    tl.store(p_o, b_out.to(p_out.dtype.element_ty), m_r[:, None] & (o_n < N_OUT)[None, :])


@triton.jit(do_not_specialize=BATCH_SIZES)
def experts_bwd_hidden_kernel(
    p_grad, p_values, p_value_bias, p_hidden, p_gates, p_keep, p_order, p_offsets, p_grad_hidden, p_alpha, p_dots, n_rows,
    N_IN: tl.constexpr, N_OUT: tl.constexpr, N_EXPERTS: tl.constexpr, K: tl.constexpr, GRAD_ROW: tl.constexpr,
    VALUES_EXPERT: tl.constexpr, VALUES_IN: tl.constexpr, VALUES_OUT: tl.constexpr, GATED: tl.constexpr,
    ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, KEEP_SCALE: tl.constexpr, UNSORTED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """With `s[r] = grad[t] values[e]^T` the gradients of both products, and of the gates `s[r] a[r] + grad[t] value_bias[e]`.

    `alpha[r] = gates[order[r]] a[r]` is what the values' gradient multiplies. The gates' dot product is split over the column
    blocks; block n writes its share to `dots[n, order[r]]`. UNSORTED: hidden numbers are read from row `order[r]`.
    """
    i_expert, o_r, m_r, o_n, m_n = tile_rows(p_offsets, n_rows, N_OUT, N_EXPERTS, BLOCK_M, BLOCK_N, BLOCK_E)
    if i_expert > N_EXPERTS:
        return
    o_s = tl.load(p_order + o_r, m_r, 0)
    p_rows = p_grad + o_s // K * GRAD_ROW
    b_s = add_product(
        tl.zeros([BLOCK_M, BLOCK_N], tl.float32), p_rows, m_r,
        p_values + i_expert * VALUES_EXPERT + o_n * VALUES_OUT, m_n, N_IN, VALUES_IN, BLOCK_K, PRECISION,
    )  # fmt: skip
    m_out = m_r[:, None] & (o_n < N_OUT)[None, :]
    ROW: tl.constexpr = 2 * N_OUT if GATED else N_OUT
    o_h = o_r[:, None] * ROW + o_n[None, :]
    o_kept = o_h
    if UNSORTED:
        o_kept = o_s[:, None] * ROW + o_n[None, :]
    b_h = tl.load(p_hidden + o_kept, m_out, 0.0).to(tl.float32)
    b_u = b_h
    if GATED:
        b_u = tl.load(p_hidden + o_kept + N_OUT, m_out, 0.0).to(tl.float32)
    b_a = units(b_h, b_u, GATED, ACTIVATION, ALPHA, LIMIT)
    b_gates = tl.load(p_gates + o_s, m_r, 0.0)[:, None]
    b_grad_a = b_s * b_gates
    if p_keep is not None:
        m_keep = tl.load(p_keep + o_s[:, None] * N_OUT + o_n[None, :], m_out, 0) != 0
        b_a = tl.where(m_keep, b_a * KEEP_SCALE, 0.0)
        b_grad_a = tl.where(m_keep, b_grad_a * KEEP_SCALE, 0.0)
    tl.store(p_alpha + o_r[:, None] * N_OUT + o_n[None, :], (b_a * b_gates).to(p_alpha.dtype.element_ty), m_out)
    b_grad_h, b_grad_u = units_backward(b_grad_a, b_h, b_u, GATED, ACTIVATION, ALPHA, LIMIT)
    tl.store(p_grad_hidden + o_h, b_grad_h.to(p_grad_hidden.dtype.element_ty), m_out)
    if GATED:
        tl.store(p_grad_hidden + o_h + N_OUT, b_grad_u.to(p_grad_hidden.dtype.element_ty), m_out)
    b_dots = tl.sum(b_s * b_a, 1)
    n_blocks: tl.constexpr = (N_OUT + BLOCK_N - 1) // BLOCK_N
    i_block = (tl.program_id(0) % n_blocks).to(tl.int64)
    # The first condition holds or not when the kernel is compiled, the second for a program.
    if p_value_bias is not None:  # noqa: SIM102
        if i_block == 0:
            b_dots += bias_dots(p_rows, m_r, p_value_bias + i_expert * N_IN, i_expert < N_EXPERTS, N_IN, BLOCK_M, BLOCK_K)
    tl.store(p_dots + i_block * n_rows + o_s, b_dots, m_r)


@triton.jit
def bias_dots(p_rows, m_r, p_bias, m_expert, N_IN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """`rows . bias`."""
    b_dots = tl.zeros([BLOCK_M], tl.float32)
    for i_k in range(0, N_IN, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        b_bias = tl.load(p_bias + o_k, (o_k < N_IN) & m_expert, 0.0).to(tl.float32)
        b_rows = tl.load(p_rows[:, None] + o_k[None, :], m_r[:, None] & (o_k < N_IN)[None, :], 0.0).to(tl.float32)
        b_dots += tl.sum(b_rows * b_bias[None, :], 1)
    return b_dots


@triton.jit(do_not_specialize=BATCH_SIZES)
def experts_bwd_x_kernel(
    p_grad_hidden, p_keys, p_gate_keys, p_order, p_offsets, p_out, n_rows,
    N_IN: tl.constexpr, N_OUT: tl.constexpr, N_EXPERTS: tl.constexpr,
    KEYS_EXPERT: tl.constexpr, KEYS_IN: tl.constexpr, KEYS_OUT: tl.constexpr,
    GATES_EXPERT: tl.constexpr, GATES_IN: tl.constexpr, GATES_OUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`out[order[r]]`: what row r adds to the gradient of x of its token, through the keys and the gate keys."""
    i_expert, o_r, m_r, o_n, m_n = tile_rows(p_offsets, n_rows, N_OUT, N_EXPERTS, BLOCK_M, BLOCK_N, BLOCK_E)
    if i_expert > N_EXPERTS:
        return
    GATED: tl.constexpr = p_gate_keys is not None
    ROW: tl.constexpr = 2 * N_IN if GATED else N_IN
    p_rows = p_grad_hidden + o_r * ROW
    b_out = add_product(
        tl.zeros([BLOCK_M, BLOCK_N], tl.float32), p_rows, m_r,
        p_keys + i_expert * KEYS_EXPERT + o_n * KEYS_OUT, m_n, N_IN, KEYS_IN, BLOCK_K, PRECISION,
    )  # fmt: skip
    if GATED:
        b_out = add_product(
            b_out, p_rows + N_IN, m_r,
            p_gate_keys + i_expert * GATES_EXPERT + o_n * GATES_OUT, m_n, N_IN, GATES_IN, BLOCK_K, PRECISION,
        )  # fmt: skip
    o_s = tl.load(p_order + o_r, m_r, 0)
    p_o = p_out + o_s[:, None] * N_OUT + o_n[None, :]
    tl.store(p_o, b_out.to(p_out.dtype.element_ty), m_r[:, None] & (o_n < N_OUT)[None, :])
