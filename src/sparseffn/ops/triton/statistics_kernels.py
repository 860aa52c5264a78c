"""Kernels of `ops/counts.py` and `ops/balance_losses.py`: blocks of tokens write sums, a second kernel adds them up in order.

Names: p_ pointer (None: not there), b_ block of values, o_ offsets, m_ mask, i_ index of the program. Shapes: ops/README.md.
"""

# Kernels call each other when compiled, never as Python functions, which is what their types say.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

BATCH_SIZES = ["n_tokens", "n_blocks"]


@triton.jit(do_not_specialize=BATCH_SIZES)
def selection_counts_kernel(
    p_indices, p_weights, p_counts, p_sums, p_active, n_tokens, N_UNITS: tl.constexpr, K: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`counts[b, i]` and `sums[b, i]` of each unit over the tokens of block b, and the units of each token."""
    i_block = tl.program_id(0).to(tl.int64)
    o_t = i_block * BLOCK_T + tl.arange(0, BLOCK_T)
    o_k = tl.arange(0, BLOCK_K)
    m_tk = (o_t < n_tokens)[:, None] & (o_k < K)[None, :]
    b_weights = tl.abs(tl.load(p_weights + o_t[:, None] * K + o_k[None, :], m_tk, 0.0).to(tl.float32))
    tl.store(p_active + o_t, tl.sum((b_weights != 0).to(tl.int64), 1), o_t < n_tokens)
    for i_e in range(0, N_UNITS, BLOCK_E):
        o_e = i_e + tl.arange(0, BLOCK_E)
        b_count = tl.zeros([BLOCK_T, BLOCK_E], tl.int32)
        b_sum = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
        for i_k in range(K):
            b_index = tl.load(p_indices + o_t * K + i_k, o_t < n_tokens, -1)
            b_weight = tl.abs(tl.load(p_weights + o_t * K + i_k, o_t < n_tokens, 0.0).to(tl.float32))
            m_unit = (b_index[:, None] == o_e[None, :]) & (b_weight != 0)[:, None]
            b_count += m_unit.to(tl.int32)
            b_sum += tl.where(m_unit, b_weight[:, None], 0.0)
        o_out = i_block * N_UNITS + o_e
        tl.store(p_counts + o_out, tl.sum(b_count, 0), o_e < N_UNITS)
        tl.store(p_sums + o_out, tl.sum(b_sum, 0), o_e < N_UNITS)


@triton.jit(do_not_specialize=BATCH_SIZES)
def selection_totals_kernel(
    p_counts, p_sums, p_counted, p_out, n_tokens, n_blocks, N_UNITS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_E: tl.constexpr
):  # fmt: skip
    """Both summed over the blocks; behind the counts the number of tokens, and zero."""
    o_e, o_b = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_B)
    b_count = tl.zeros([BLOCK_B, BLOCK_E], tl.int64)
    b_sum = tl.zeros([BLOCK_B, BLOCK_E], tl.float32)
    for i_b in range(0, n_blocks, BLOCK_B):
        o_in = (i_b + o_b).to(tl.int64)[:, None] * N_UNITS + o_e[None, :]
        m_in = (i_b + o_b < n_blocks)[:, None] & (o_e < N_UNITS)[None, :]
        b_count += tl.load(p_counts + o_in, m_in, 0)
        b_sum += tl.load(p_sums + o_in, m_in, 0.0)
    b_total = tl.where(o_e == N_UNITS, n_tokens, tl.sum(b_count, 0))
    tl.store(p_counted + o_e, b_total, o_e < N_UNITS + 2)
    tl.store(p_out + o_e, tl.sum(b_sum, 0), o_e < N_UNITS)


@triton.jit
def shares_of(p_logits, o_t, m_t, N_EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr):
    """Softmax over the experts of a few tokens, zero for the others."""
    o_e = tl.arange(0, BLOCK_E)
    m_e = (o_e < N_EXPERTS)[None, :]
    b_logits = tl.load(p_logits + o_t[:, None] * N_EXPERTS + o_e[None, :], m_t[:, None] & m_e, 0.0)
    b_exp = tl.exp(b_logits - tl.max(tl.where(m_e, b_logits, -float("inf")), 1)[:, None])
    b_exp = tl.where(m_e, b_exp, 0.0)
    return tl.where(m_t[:, None], b_exp / tl.sum(b_exp, 1)[:, None], 0.0)


@triton.jit(do_not_specialize=BATCH_SIZES)
def entropy_shares_kernel(
    p_logits, p_mask, p_sums, n_tokens, n_blocks, N_EXPERTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr
):  # fmt: skip
    """`sums[b, e]`: softmax of the logits, summed over every n_blocks-th tile of tokens; behind them the number of these."""
    i_block, o_e = tl.program_id(0), tl.arange(0, BLOCK_E)
    b_sum = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    b_tokens = tl.zeros([BLOCK_T], tl.float32)
    for i_t in range(i_block * BLOCK_T, n_tokens, n_blocks * BLOCK_T):
        o_t = (i_t + tl.arange(0, BLOCK_T)).to(tl.int64)
        m_t = o_t < n_tokens
        if p_mask is not None:
            m_t = m_t & (tl.load(p_mask + o_t, m_t, 0) != 0)
        b_sum += shares_of(p_logits, o_t, m_t, N_EXPERTS, BLOCK_E)
        b_tokens += m_t.to(tl.float32)
    p_out = p_sums + i_block.to(tl.int64) * (N_EXPERTS + 1)
    tl.store(p_out + o_e, tl.sum(b_sum, 0), o_e < N_EXPERTS)
    tl.store(p_out + N_EXPERTS, tl.sum(b_tokens, 0))


@triton.jit(do_not_specialize=BATCH_SIZES)
def entropy_fwd_kernel(
    p_sums, p_loss, p_slopes, n_blocks, scale, N_EXPERTS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_E: tl.constexpr
):  # fmt: skip
    """`scale sum_e p[e] log p[e]`, and its slopes over p, `1 + log p`."""
    o_b, o_e = tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_E)
    b_sum = tl.zeros([BLOCK_B, BLOCK_E], tl.float32)
    b_tokens = tl.zeros([BLOCK_B], tl.float32)
    for i_b in range(0, n_blocks, BLOCK_B):
        p_b = p_sums + (i_b + o_b).to(tl.int64) * (N_EXPERTS + 1)
        m_b = i_b + o_b < n_blocks
        b_sum += tl.load(p_b[:, None] + o_e[None, :], m_b[:, None] & (o_e < N_EXPERTS)[None, :], 0.0)
        b_tokens += tl.load(p_b + N_EXPERTS, m_b, 0.0)
    b_share = tl.sum(b_sum, 0) / tl.maximum(tl.sum(b_tokens, 0), 1.0)
    # What underflowed adds nothing, neither here nor to a gradient; a NaN stays one.
    b_log = tl.where(b_share == 0, 0.0, tl.log(tl.where(b_share == 0, 1.0, b_share)))
    tl.store(p_loss, scale * tl.sum(tl.where(o_e < N_EXPERTS, b_share * b_log, 0.0), 0))
    tl.store(p_slopes + o_e, 1 + b_log, o_e < N_EXPERTS)


@triton.jit(do_not_specialize=BATCH_SIZES)
def switch_shares_kernel(
    p_logits, p_mask, p_indices, p_weights, p_sums, n_tokens, n_blocks,
    N_EXPERTS: tl.constexpr, K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """As `entropy_shares_kernel`; behind these sums how many selections of these tokens each expert received."""
    i_block, o_e = tl.program_id(0), tl.arange(0, BLOCK_E)
    b_sum = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    b_count = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    b_tokens = tl.zeros([BLOCK_T], tl.float32)
    for i_t in range(i_block * BLOCK_T, n_tokens, n_blocks * BLOCK_T):
        o_t = (i_t + tl.arange(0, BLOCK_T)).to(tl.int64)
        m_in = o_t < n_tokens
        m_t = m_in
        if p_mask is not None:
            m_t = m_in & (tl.load(p_mask + o_t, m_in, 0) != 0)
        for i_k in range(K):
            b_index = tl.load(p_indices + o_t * K + i_k, m_in, -1)
            m_chosen = tl.load(p_weights + o_t * K + i_k, m_in, 0.0) != 0
            b_count += tl.where((b_index[:, None] == o_e[None, :]) & m_chosen[:, None], 1.0, 0.0)
        b_sum += shares_of(p_logits, o_t, m_t, N_EXPERTS, BLOCK_E)
        b_tokens += m_t.to(tl.float32)
    p_out = p_sums + i_block.to(tl.int64) * (2 * N_EXPERTS + 1)
    tl.store(p_out + o_e, tl.sum(b_sum, 0), o_e < N_EXPERTS)
    tl.store(p_out + N_EXPERTS, tl.sum(b_tokens, 0))
    tl.store(p_out + N_EXPERTS + 1 + o_e, tl.sum(b_count, 0), o_e < N_EXPERTS)


@triton.jit(do_not_specialize=BATCH_SIZES)
def switch_fwd_kernel(
    p_sums, p_loss, p_slopes, n_blocks, scale, N_EXPERTS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_E: tl.constexpr
):  # fmt: skip
    """`scale N_E sum_e f[e] p[e]`, and its slopes over p, `N_E f`."""
    o_b, o_e = tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_E)
    b_sum = tl.zeros([BLOCK_B, BLOCK_E], tl.float32)
    b_count = tl.zeros([BLOCK_B, BLOCK_E], tl.int64)
    b_tokens = tl.zeros([BLOCK_B], tl.float32)
    for i_b in range(0, n_blocks, BLOCK_B):
        p_b = p_sums + (i_b + o_b).to(tl.int64) * (2 * N_EXPERTS + 1)
        m_b = i_b + o_b < n_blocks
        m_in = m_b[:, None] & (o_e < N_EXPERTS)[None, :]
        b_sum += tl.load(p_b[:, None] + o_e[None, :], m_in, 0.0)
        b_tokens += tl.load(p_b + N_EXPERTS, m_b, 0.0)
        b_count += tl.load(p_b[:, None] + N_EXPERTS + 1 + o_e[None, :], m_in, 0.0).to(tl.int64)
    b_share = tl.sum(b_sum, 0) / tl.maximum(tl.sum(b_tokens, 0), 1.0)
    b_received = tl.sum(b_count, 0)
    n_received = tl.maximum(tl.sum(b_received, 0), 1)
    b_slope = N_EXPERTS * (b_received.to(tl.float32) / n_received.to(tl.float32))
    tl.store(p_loss, scale * tl.sum(tl.where(o_e < N_EXPERTS, b_slope * b_share, 0.0), 0))
    tl.store(p_slopes + o_e, b_slope, o_e < N_EXPERTS)


@triton.jit(do_not_specialize=BATCH_SIZES)
def load_sums_kernel(
    p_weights, p_indices, p_sums, n_tokens, n_blocks,
    N_EXPERTS: tl.constexpr, K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """`sums[b, e]`: weights of each expert, summed over every n_blocks-th tile of tokens."""
    i_block, o_e = tl.program_id(0), tl.arange(0, BLOCK_E)
    b_sum = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for i_t in range(i_block * BLOCK_T, n_tokens, n_blocks * BLOCK_T):
        o_t = (i_t + tl.arange(0, BLOCK_T)).to(tl.int64)
        for i_k in range(K):
            b_index = tl.load(p_indices + o_t * K + i_k, o_t < n_tokens, -1)
            b_weight = tl.load(p_weights + o_t * K + i_k, o_t < n_tokens, 0.0)
            b_sum += tl.where(b_index[:, None] == o_e[None, :], b_weight[:, None], 0.0)
    tl.store(p_sums + i_block.to(tl.int64) * N_EXPERTS + o_e, tl.sum(b_sum, 0), o_e < N_EXPERTS)


@triton.jit(do_not_specialize=BATCH_SIZES)
def load_fwd_kernel(
    p_sums, p_loss, p_slopes, n_blocks, scale,
    N_EXPERTS: tl.constexpr, LEAST: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """`scale CV^2` of the loads, and its slopes over them."""
    o_b, o_e = tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_E)
    b_sum = tl.zeros([BLOCK_B, BLOCK_E], tl.float32)
    for i_b in range(0, n_blocks, BLOCK_B):
        m_in = (i_b + o_b < n_blocks)[:, None] & (o_e < N_EXPERTS)[None, :]
        b_sum += tl.load(p_sums + (i_b + o_b).to(tl.int64)[:, None] * N_EXPERTS + o_e[None, :], m_in, 0.0)
    b_load = tl.sum(b_sum, 0)
    b_mean = tl.sum(b_load, 0) / N_EXPERTS
    b_off = tl.where(o_e < N_EXPERTS, b_load - b_mean, 0.0)
    b_variance = tl.sum(b_off * b_off, 0) / N_EXPERTS
    b_square = b_mean * b_mean
    b_clamped = tl.maximum(b_square, LEAST)
    b_through = tl.where(b_square >= LEAST, b_variance / b_clamped * (b_mean / b_clamped), 0.0)
    tl.store(p_loss, scale * (b_variance / b_clamped))
    tl.store(p_slopes + o_e, (b_off / b_clamped - b_through) * (2 * scale / N_EXPERTS), o_e < N_EXPERTS)


@triton.jit(do_not_specialize=["n_rows"])
def load_bwd_kernel(
    p_grad_loss, p_indices, p_slopes, p_grad_weights, n_rows, N_EXPERTS: tl.constexpr, BLOCK_R: tl.constexpr
):  # fmt: skip
    """Gradient of the weights."""
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    b_index = tl.load(p_indices + o_r, o_r < n_rows, -1)
    m_good = (b_index >= 0) & (b_index < N_EXPERTS)
    b_slope = tl.load(p_slopes + b_index, m_good, 0.0)
    tl.store(p_grad_weights + o_r, tl.load(p_grad_loss) * b_slope, o_r < n_rows)


@triton.jit(do_not_specialize=BATCH_SIZES)
def shares_bwd_kernel(
    p_grad_loss, p_logits, p_mask, p_slopes, p_grad_logits, n_tokens, scale,
    N_EXPERTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Gradient of the logits of a loss with these slopes over the mean of their softmax."""
    o_t, o_e = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_E)
    m_t, n_counted = o_t < n_tokens, n_tokens.to(tl.float32)
    if p_mask is not None:
        m_t = m_t & (tl.load(p_mask + o_t, m_t, 0) != 0)
        b_counted = tl.zeros([BLOCK_M], tl.float32)
        for i_m in range(0, n_tokens, BLOCK_M):
            o_m = i_m + tl.arange(0, BLOCK_M)
            b_counted += (tl.load(p_mask + o_m, o_m < n_tokens, 0) != 0).to(tl.float32)
        n_counted = tl.maximum(tl.sum(b_counted, 0), 1.0)
    b_share = shares_of(p_logits, o_t, m_t, N_EXPERTS, BLOCK_E)
    b_slope = tl.load(p_slopes + o_e, o_e < N_EXPERTS, 0.0)
    b_grad = b_share * (b_slope[None, :] - tl.sum(b_share * b_slope[None, :], 1)[:, None])
    b_grad = b_grad * (tl.load(p_grad_loss) * scale / n_counted)
    p_g = p_grad_logits + o_t[:, None] * N_EXPERTS + o_e[None, :]
    tl.store(p_g, b_grad, (o_t < n_tokens)[:, None] & (o_e < N_EXPERTS)[None, :])
