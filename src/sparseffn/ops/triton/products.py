"""Rows times the matrix of their expert (equation 26), `out[r] = rows[r] @ weight[e(r)]`, in tiles of BLOCK_M rows that never
span two experts. `tile_map_kernel` says which rows a tile has; everything about the routing stays on the device.

Rows are read through `tokens` (up, and the gradient of down's input) or in sorted order (down, and the gradient of up's
input). Gradients take the matrices transposed, which is a matter of strides. Products are accumulated in float32.
Names: p_ pointer, b_ block of values, o_ offsets, m_ mask, i_ index of the program. Shapes: see ops/README.md.
"""

# Kernels call each other when compiled, never as Python functions, which is what their types say.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

# Sizes that change from batch to batch: a value of 1 or a multiple of 16 must not compile another kernel.
BATCH_SIZES = ["n_tiles", "n_rows"]


@triton.jit(do_not_specialize=BATCH_SIZES)
def tile_map_kernel(p_offsets, p_tiles, n_experts, n_tiles, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """Write (expert, first row) of every tile; program e fills the tiles of expert e, the last one marks spare tiles -1."""
    i_expert = tl.program_id(0)
    o_e = tl.arange(0, BLOCK_E)
    b_tiles = tl.zeros([BLOCK_E], tl.int64)
    for i_start in range(0, i_expert, BLOCK_E):
        m_e = i_start + o_e < i_expert
        b_start = tl.load(p_offsets + i_start + o_e, m_e, 0)
        b_stop = tl.load(p_offsets + i_start + o_e + 1, m_e, 0)
        b_tiles += (b_stop - b_start + BLOCK_M - 1) // BLOCK_M
    i_first = tl.sum(b_tiles)
    m_expert = i_expert < n_experts
    i_row = tl.load(p_offsets + i_expert)
    i_stop = tl.load(p_offsets + i_expert + 1, m_expert, 0)
    n_own = tl.where(m_expert, (i_stop - i_row + BLOCK_M - 1) // BLOCK_M, n_tiles - i_first)
    i_value = tl.where(m_expert, i_expert, -1).to(tl.int64)
    for i_start in range(0, n_own, BLOCK_E):
        m_tile = i_start + o_e < n_own
        p_tile = p_tiles + 2 * (i_first + i_start + o_e)
        tl.store(p_tile, tl.zeros([BLOCK_E], tl.int64) + i_value, m_tile)
        tl.store(p_tile + 1, i_row + (i_start + o_e) * BLOCK_M, m_tile)


@triton.jit
def tile_rows(p_tiles, p_offsets, n_outer, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The expert, the rows and the output columns of this program, with masks. Programs of one tile are neighbours."""
    n_blocks = tl.cdiv(n_outer, BLOCK_N)
    i_tile = (tl.program_id(0) // n_blocks).to(tl.int64)
    i_expert = tl.load(p_tiles + 2 * i_tile)
    o_r = tl.load(p_tiles + 2 * i_tile + 1) + tl.arange(0, BLOCK_M)
    m_r = o_r < tl.load(p_offsets + i_expert + 1, i_expert >= 0, 0)
    o_n = (tl.program_id(0) % n_blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    return i_expert, o_r, m_r, o_n, o_n < n_outer


@triton.jit
def tile_product(
    p_rows, m_r, p_weight, m_n, n_inner, stride_row_inner, stride_weight_inner,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`rows @ weight` of one tile; `p_rows` points at the rows' and `p_weight` at the columns' first element."""
    o_k = tl.arange(0, BLOCK_K).to(tl.int64)
    p_a = p_rows[:, None] + o_k[None, :] * stride_row_inner
    p_b = p_weight[None, :] + o_k[:, None] * stride_weight_inner
    # A stride of columns may be as long as a batch: 64 bits, like every address.
    o_step = tl.full([1, 1], BLOCK_K, tl.int64)
    b_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_k in range(0, n_inner, BLOCK_K):
        m_k = o_k < n_inner - i_k
        b_a = tl.load(p_a, m_r[:, None] & m_k[None, :], 0.0)
        b_b = tl.load(p_b, m_k[:, None] & m_n[None, :], 0.0)
        b_sum = tl.dot(b_a, b_b, b_sum, input_precision=PRECISION)
        p_a += o_step * stride_row_inner
        p_b += o_step * stride_weight_inner
    return b_sum


@triton.jit
def expert_up_fwd_kernel(
    p_x, p_weight, p_tokens, p_offsets, p_tiles, p_out, n_inner, n_outer,
    stride_row, stride_row_inner, stride_expert, stride_weight_inner, stride_weight_outer,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`out[r] = x[tokens[r]] @ weight[e(r)]`."""
    i_expert, o_r, m_r, o_n, m_n = tile_rows(p_tiles, p_offsets, n_outer, BLOCK_M, BLOCK_N)
    if i_expert < 0:
        return
    o_t = tl.load(p_tokens + o_r, m_r, 0)
    b_out = tile_product(
        p_x + o_t * stride_row, m_r, p_weight + i_expert * stride_expert + o_n * stride_weight_outer, m_n,
        n_inner, stride_row_inner, stride_weight_inner, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
    )  # fmt: skip
    p_o = p_out + o_r[:, None] * n_outer + o_n[None, :]
    tl.store(p_o, b_out.to(p_out.dtype.element_ty), m_r[:, None] & m_n[None, :])


@triton.jit
def expert_up_bwd_x_kernel(
    p_grad, p_weight, p_offsets, p_tiles, p_out, n_inner, n_outer,
    stride_row, stride_row_inner, stride_expert, stride_weight_inner, stride_weight_outer,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`out[r] = grad[r] @ weight[e(r)]^T`, what row r adds to the gradient of x of its token."""
    i_expert, o_r, m_r, o_n, m_n = tile_rows(p_tiles, p_offsets, n_outer, BLOCK_M, BLOCK_N)
    if i_expert < 0:
        return
    b_out = tile_product(
        p_grad + o_r * stride_row, m_r, p_weight + i_expert * stride_expert + o_n * stride_weight_outer, m_n,
        n_inner, stride_row_inner, stride_weight_inner, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
    )  # fmt: skip
    p_o = p_out + o_r[:, None] * n_outer + o_n[None, :]
    tl.store(p_o, b_out.to(p_out.dtype.element_ty), m_r[:, None] & m_n[None, :])


@triton.jit
def expert_down_fwd_kernel(
    p_a, p_weight, p_gates, p_offsets, p_tiles, p_out, n_inner, n_outer,
    stride_row, stride_row_inner, stride_expert, stride_weight_inner, stride_weight_outer,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`out[r] = gates[r] (a[r] @ weight[e(r)])`, what row r adds to the output of its token."""
    i_expert, o_r, m_r, o_n, m_n = tile_rows(p_tiles, p_offsets, n_outer, BLOCK_M, BLOCK_N)
    if i_expert < 0:
        return
    b_out = tile_product(
        p_a + o_r * stride_row, m_r, p_weight + i_expert * stride_expert + o_n * stride_weight_outer, m_n,
        n_inner, stride_row_inner, stride_weight_inner, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
    )  # fmt: skip
    b_gates = tl.load(p_gates + o_r, m_r, 0.0).to(tl.float32)
    b_out = b_out * b_gates[:, None]
    p_o = p_out + o_r[:, None] * n_outer + o_n[None, :]
    tl.store(p_o, b_out.to(p_out.dtype.element_ty), m_r[:, None] & m_n[None, :])


@triton.jit(do_not_specialize=BATCH_SIZES)
def expert_down_bwd_a_gates_kernel(
    p_grad, p_weight, p_a, p_gates, p_tokens, p_offsets, p_tiles, p_out, p_dots, n_inner, n_outer, n_rows,
    stride_row, stride_row_inner, stride_expert, stride_weight_inner, stride_weight_outer, stride_a_row, stride_a_inner,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """With `s[r] = grad[tokens[r]] @ weight[e(r)]^T`: the gradient of a, `gates[r] s[r]`, and that of the gates, `s[r] . a[r]`.

    The dot product is split over the column blocks; block n writes its share to `dots[n, r]`.
    """
    i_expert, o_r, m_r, o_n, m_n = tile_rows(p_tiles, p_offsets, n_outer, BLOCK_M, BLOCK_N)
    if i_expert < 0:
        return
    o_t = tl.load(p_tokens + o_r, m_r, 0)
    b_s = tile_product(
        p_grad + o_t * stride_row, m_r, p_weight + i_expert * stride_expert + o_n * stride_weight_outer, m_n,
        n_inner, stride_row_inner, stride_weight_inner, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
    )  # fmt: skip
    m_out = m_r[:, None] & m_n[None, :]
    b_a = tl.load(p_a + o_r[:, None] * stride_a_row + o_n[None, :] * stride_a_inner, m_out, 0.0).to(tl.float32)
    i_block = (tl.program_id(0) % tl.cdiv(n_outer, BLOCK_N)).to(tl.int64)
    tl.store(p_dots + i_block * n_rows + o_r, tl.sum(b_s * b_a, 1), m_r)
    b_gates = tl.load(p_gates + o_r, m_r, 0.0).to(tl.float32)
    b_out = b_s * b_gates[:, None]
    tl.store(p_out + o_r[:, None] * n_outer + o_n[None, :], b_out.to(p_out.dtype.element_ty), m_out)
