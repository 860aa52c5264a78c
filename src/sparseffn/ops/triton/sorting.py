"""Selections in stable order of their expert: a counting sort in three launches, the same from run to run.

`count_kernel` counts each expert's selections block by block, `scan_kernel` sums an expert's counts of the blocks before, and
`place_kernel` puts every selection at its expert's start, plus those of the blocks before, plus those before it in its own.
An index of no expert counts as expert E, behind all others: its rows belong to nobody.
Names: p_ pointer, b_ block of values, o_ offsets, m_ mask, i_ index of the program. Shapes: see ops/README.md.
"""

# Kernels call each other when compiled, never as Python functions, which is what their types say.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

# Sizes that change from batch to batch: a value of 1 or a multiple of 16 must not compile another kernel.
BATCH_SIZES = ["n_rows", "n_blocks"]


@triton.jit
def experts_of(p_indices, o_r, n_rows, N_EXPERTS: tl.constexpr):
    """int32: the expert of each selection, E for an index of none, E + 1 beyond the selections."""
    b_index = tl.load(p_indices + o_r, o_r < n_rows, 0)
    b_expert = tl.where((b_index >= 0) & (b_index < N_EXPERTS), b_index, N_EXPERTS).to(tl.int32)
    return tl.where(o_r < n_rows, b_expert, N_EXPERTS + 1)


@triton.jit(do_not_specialize=BATCH_SIZES)
def count_kernel(p_indices, p_counts, n_rows, n_blocks, N_EXPERTS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr):
    """`counts[e, b]`: selections of expert e in block b."""
    i_block = tl.program_id(0).to(tl.int64)
    b_expert = experts_of(p_indices, i_block * BLOCK_R + tl.arange(0, BLOCK_R), n_rows, N_EXPERTS)
    for i_e in range(0, N_EXPERTS + 1, BLOCK_E):
        o_e = i_e + tl.arange(0, BLOCK_E)
        b_count = tl.sum((b_expert[:, None] == o_e[None, :]).to(tl.int32), 0)
        tl.store(p_counts + o_e.to(tl.int64) * n_blocks + i_block, b_count, o_e <= N_EXPERTS)


@triton.jit(do_not_specialize=BATCH_SIZES)
def scan_kernel(p_counts, p_totals, n_blocks, BLOCK_B: tl.constexpr):
    """`counts[e, b]` becomes the sum over the blocks before b; `totals[e]` is that over all."""
    i_expert = tl.program_id(0).to(tl.int64)
    b_total = tl.zeros([BLOCK_B], tl.int32)
    for i_b in range(0, n_blocks, BLOCK_B):
        o_b = i_b + tl.arange(0, BLOCK_B)
        p_c = p_counts + i_expert * n_blocks + o_b
        b_count = tl.load(p_c, o_b < n_blocks, 0)
        tl.store(p_c, tl.sum(b_total) + tl.cumsum(b_count, 0) - b_count, o_b < n_blocks)
        b_total += b_count
    tl.store(p_totals + i_expert, tl.sum(b_total))


@triton.jit(do_not_specialize=BATCH_SIZES)
def place_kernel(
    p_indices, p_counts, p_totals, p_order, p_offsets, n_rows, n_blocks,
    N_EXPERTS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """`order[p] = r` with p the place of selection r; the first block also writes where each expert's rows begin."""
    i_block = tl.program_id(0).to(tl.int64)
    o_r = i_block * BLOCK_R + tl.arange(0, BLOCK_R)
    b_expert = experts_of(p_indices, o_r, n_rows, N_EXPERTS)
    b_place = tl.zeros([BLOCK_R], tl.int32)
    b_passed = tl.zeros([BLOCK_E], tl.int32)
    for i_e in range(0, N_EXPERTS + 1, BLOCK_E):
        o_e = i_e + tl.arange(0, BLOCK_E)
        b_total = tl.load(p_totals + o_e, o_e <= N_EXPERTS, 0)
        b_place += tl.sum(tl.where(o_e[None, :] < b_expert[:, None], b_total[None, :], 0), 1)
        b_start = tl.sum(b_passed) + tl.cumsum(b_total, 0) - b_total
        tl.store(p_offsets + o_e, b_start.to(tl.int64), (o_e <= N_EXPERTS) & (i_block == 0))
        b_passed += b_total
    # Few at a time: a square of all pairs would not fit into registers.
    for i_j in range(0, BLOCK_R, BLOCK_J):
        o_j = i_block * BLOCK_R + i_j + tl.arange(0, BLOCK_J)
        b_other = experts_of(p_indices, o_j, n_rows, N_EXPERTS)
        m_before = (b_other[None, :] == b_expert[:, None]) & (o_j[None, :] < o_r[:, None])
        b_place += tl.sum(m_before.to(tl.int32), 1)
    m_r = o_r < n_rows
    b_place += tl.load(p_counts + b_expert.to(tl.int64) * n_blocks + i_block, m_r, 0)
    tl.store(p_order + b_place, o_r, m_r)
