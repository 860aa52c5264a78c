"""Kernels of `ops/balance.py` and `ops/capacity.py`: Sinkhorn's rounds, and places in the experts' queues.

Each `[T, E]` of the scores is a sequence. A round reads all scores once and leaves each stretch of tokens' terms, from
which whoever comes next makes the experts' sums: a launch a round. Names: p_ pointer (None: not there), b_ block of
values, o_ offsets, m_ mask, i_ index. Shapes: ops/README.md.
"""

# Kernels call each other when compiled, never as Python functions, which is what their types say.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

BATCH_SIZES = ["n_tokens", "n_parts", "n_blocks", "n_rows"]


@triton.jit
def expert_terms(p_terms, n_parts, N_EXPERTS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_E: tl.constexpr):
    """`a_e = log(T / E) - lse_t(...)` from the stretches' largest, sums and numbers of tokens, and T."""
    o_b, o_e = tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_E)
    b_most = tl.full([BLOCK_E], -1e30, tl.float32)
    b_sum = tl.zeros([BLOCK_E], tl.float32)
    b_tokens = tl.zeros([BLOCK_B], tl.float32)
    for i_b in range(0, n_parts, BLOCK_B):
        p_b = p_terms + (i_b + o_b).to(tl.int64) * (2 * N_EXPERTS + 1)
        m_b = i_b + o_b < n_parts
        m_in = m_b[:, None] & (o_e < N_EXPERTS)[None, :]
        b_part = tl.load(p_b[:, None] + o_e[None, :], m_in, -1e30)
        b_higher = tl.maximum(b_most, tl.max(b_part, 0))
        b_scaled = tl.load(p_b[:, None] + N_EXPERTS + o_e[None, :], m_in, 0.0) * tl.exp(b_part - b_higher[None, :])
        b_sum = b_sum * tl.exp(b_most - b_higher) + tl.sum(b_scaled, 0)
        b_most = b_higher
        b_tokens += tl.load(p_b + 2 * N_EXPERTS, m_b, 0.0)
    n_taken = tl.sum(b_tokens, 0)
    # One logarithm of a ratio near 1, where the difference of two would cancel.
    b_a = tl.log(tl.maximum(n_taken, 1.0) / (N_EXPERTS * tl.where(b_sum > 0, b_sum, 1.0))) - b_most
    return tl.where(n_taken > 0, b_a, 0.0)


@triton.jit(do_not_specialize=BATCH_SIZES)
def sinkhorn_round_kernel(
    p_scores, p_mask, p_before, p_terms, n_tokens, n_parts, SIGN: tl.constexpr,
    N_EXPERTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """One stretch of a sequence's tokens: `b_t = -lse_e(x + a)`, and the terms of `lse_t(x + b)`. p_before has those of a."""
    i_sequence, i_part = (tl.program_id(0) // n_parts).to(tl.int64), tl.program_id(0) % n_parts
    o_e = tl.arange(0, BLOCK_E)
    m_e, i_first = (o_e < N_EXPERTS)[None, :], i_sequence * n_tokens
    b_a = tl.zeros([BLOCK_E], tl.float32)
    if p_before is not None:
        b_a = expert_terms(p_before + i_sequence * n_parts * (2 * N_EXPERTS + 1), n_parts, N_EXPERTS, BLOCK_B, BLOCK_E)
    b_most = tl.full([BLOCK_E], -1e30, tl.float32)
    b_sum = tl.zeros([BLOCK_E], tl.float32)
    b_taken = tl.zeros([BLOCK_T], tl.float32)
    for i_t in range(i_part * BLOCK_T, n_tokens, n_parts * BLOCK_T):
        o_in = i_t + tl.arange(0, BLOCK_T)
        m_t, o_t = o_in < n_tokens, i_first + o_in
        if p_mask is not None:
            m_t = m_t & (tl.load(p_mask + o_t, m_t, 0) != 0)
        b_x = tl.load(p_scores + o_t[:, None] * N_EXPERTS + o_e[None, :], m_t[:, None] & m_e, 0.0)
        # A token that is not finite takes no part.
        m_t = m_t & (tl.sum((tl.abs(b_x) < float("inf")).to(tl.int32), 1) == BLOCK_E)
        b_x = tl.where(m_t[:, None], b_x, 0.0)
        b_row = tl.where(m_e, b_x + SIGN * b_a[None, :], -1e30)
        b_top = tl.max(b_row, 1)
        b_lse = b_top + tl.log(tl.sum(tl.where(m_e, tl.exp(b_row - b_top[:, None]), 0.0), 1))
        b_column = tl.where(m_t[:, None], b_x - SIGN * b_lse[:, None], -1e30)
        b_higher = tl.maximum(b_most, tl.max(b_column, 0))
        b_exp = tl.where(m_t[:, None], tl.exp(b_column - b_higher[None, :]), 0.0)
        b_sum = b_sum * tl.exp(b_most - b_higher) + tl.sum(b_exp, 0)
        b_most = b_higher
        b_taken += m_t.to(tl.float32)
    p_part = p_terms + tl.program_id(0).to(tl.int64) * (2 * N_EXPERTS + 1)
    tl.store(p_part + o_e, b_most, o_e < N_EXPERTS)
    tl.store(p_part + N_EXPERTS + o_e, b_sum, o_e < N_EXPERTS)
    tl.store(p_part + 2 * N_EXPERTS, tl.sum(b_taken, 0))


@triton.jit(do_not_specialize=BATCH_SIZES)
def sinkhorn_fwd_kernel(
    p_scores, p_terms, p_balanced, n_tokens, n_parts, n_blocks,
    N_EXPERTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """`x + a` for a block of a sequence's tokens, from the last round's terms."""
    i_sequence, o_e = (tl.program_id(0) // n_blocks).to(tl.int64), tl.arange(0, BLOCK_E)
    o_t = (tl.program_id(0) % n_blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    m_x = (o_t < n_tokens)[:, None] & (o_e < N_EXPERTS)[None, :]
    o_x = (i_sequence * n_tokens + o_t)[:, None] * N_EXPERTS + o_e[None, :]
    b_a = expert_terms(p_terms + i_sequence * n_parts * (2 * N_EXPERTS + 1), n_parts, N_EXPERTS, BLOCK_B, BLOCK_E)
    tl.store(p_balanced + o_x, tl.load(p_scores + o_x, m_x, 0.0) + b_a[None, :], m_x)


@triton.jit(do_not_specialize=BATCH_SIZES)
def over_capacity_kernel(
    p_indices, p_weights, p_mask, p_over, n_tokens, n_rows, FACTOR: tl.constexpr, N_EXPERTS: tl.constexpr, BLOCK_R: tl.constexpr
):  # fmt: skip
    """Which of an expert's selections stand behind place FACTOR T / N_EXPERTS in its queue; those of weight 0 do not wait."""
    i_expert, o_r = tl.program_id(0), tl.arange(0, BLOCK_R)
    n_counted = n_tokens.to(tl.int64)
    if p_mask is not None:
        b_counted = tl.zeros([BLOCK_R], tl.int64)
        for i_t in range(0, n_tokens, BLOCK_R):
            b_counted += (tl.load(p_mask + i_t + o_r, i_t + o_r < n_tokens, 0) != 0).to(tl.int64)
        n_counted = tl.sum(b_counted, 0)
    # As the host computes it: a float32 would lose a place.
    capacity = tl.full([], FACTOR, tl.float64) * n_counted.to(tl.float64) / tl.full([], N_EXPERTS, tl.float64)
    n_waiting = tl.zeros([], tl.int64)
    for i_r in range(0, n_rows, BLOCK_R):
        o_in = i_r + o_r
        b_expert = tl.load(p_indices + o_in, o_in < n_rows, -1)
        m_waits = (b_expert == i_expert) & ~(tl.load(p_weights + o_in, o_in < n_rows, 0.0) <= 0)
        b_place = n_waiting + tl.cumsum(m_waits.to(tl.int64), 0)
        # An index of no expert is the first program's to answer.
        m_own = (b_expert == i_expert) | ((i_expert == 0) & ((b_expert < 0) | (b_expert >= N_EXPERTS)))
        tl.store(p_over + o_in, m_waits & (b_place.to(tl.float64) > capacity), m_own & (o_in < n_rows))
        n_waiting += tl.sum(m_waits.to(tl.int64), 0)
