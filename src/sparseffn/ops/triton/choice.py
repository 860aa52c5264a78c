"""The K largest numbers of a row, by their threshold and without a sort (equation 6), and the survivors of an inner top-K.

Each float32 becomes an integer that sorts alike. The K-th largest of a row is found bit by bit, by counting who is not smaller:
32 counts, whatever K and the width. Of those that equal it the first ones are chosen, so that ties go to the lowest position.
Names: p_ pointer (None: not there), b_ block of values, o_ offsets, m_ mask, i_ index. Shapes: see ops/README.md.
"""

# Kernels call each other when compiled, never as Python functions, which is what their types say.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

BATCH_SIZES = ["n_rows"]


@triton.jit
def sortable(b_score):
    """An int32 that sorts as the float32 does, a NaN the largest, -0 as 0. No float gets the lowest int32, which marks what is
    outside.
    """
    b_bits = tl.where(b_score == b_score, b_score, float("inf")).to(tl.int32, bitcast=True)
    # Adding 0 would do, but be fused with a product before it, whose underflow then keeps its sign.
    b_bits = tl.where(b_bits == -2147483648, 0, b_bits)
    return tl.where(b_score == b_score, b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit
def load_keys(p_scores, p_gates, o_r, m_r, o_n, N: tl.constexpr, SIZE: tl.constexpr):
    """What a stretch of some rows is ranked by; with gates each number times that of its SIZE neighbours."""
    m_in = m_r[:, None] & (o_n < N)[None, :]
    b_score = tl.load(p_scores + o_r[:, None] * N + o_n[None, :], m_in, 0.0).to(tl.float32)
    if p_gates is not None:
        b_score = b_score * tl.load(p_gates + o_r[:, None] * (N // SIZE) + (o_n // SIZE)[None, :], m_in, 0.0)
    return tl.where(m_in, sortable(b_score), -2147483648)


@triton.jit
def count_above(
    p_scores, p_gates, o_r, m_r, b_bound, N: tl.constexpr, SIZE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """How many of each row are ranked above its bound."""
    b_count = tl.zeros([BLOCK_R], tl.int32)
    for i_n in range(0, N, BLOCK_N):
        b_key = load_keys(p_scores, p_gates, o_r, m_r, i_n + tl.arange(0, BLOCK_N), N, SIZE)
        b_count += tl.sum((b_key > b_bound[:, None]).to(tl.int32), 1)
    return b_count


@triton.jit
def find_limits(
    p_scores, p_gates, o_r, m_r,
    N: tl.constexpr, K: tl.constexpr, SIZE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The K-th largest of each row, as it is ranked, and how many of those that equal it are among the K."""
    b_limit = tl.full([BLOCK_R], -2147483648, tl.int32)
    for i_bit in range(32):
        # The first bit is the sign, which the lowest number has.
        b_higher = b_limit ^ (tl.full([BLOCK_R], 1, tl.int32) << (31 - i_bit))
        b_count = count_above(p_scores, p_gates, o_r, m_r, b_higher - 1, N, SIZE, BLOCK_R, BLOCK_N)
        b_limit = tl.where(b_count >= K, b_higher, b_limit)
    return b_limit, K - count_above(p_scores, p_gates, o_r, m_r, b_limit, N, SIZE, BLOCK_R, BLOCK_N)


@triton.jit
def choose(b_key, b_limit, b_equal, b_first):
    """Who of a stretch is chosen, of those that equal the limit at most `b_equal`, and as which of the row's.

    Then what is left of `b_equal`, and the place of the next stretch's first.
    """
    m_equal = b_key == b_limit[:, None]
    b_rank = tl.cumsum(m_equal.to(tl.int32), 1)
    m_chosen = (b_key > b_limit[:, None]) | (m_equal & (b_rank <= b_equal[:, None]))
    b_place = b_first[:, None] + tl.cumsum(m_chosen.to(tl.int32), 1) - 1
    return m_chosen, b_place, b_equal - tl.sum(m_equal.to(tl.int32), 1), b_first + tl.sum(m_chosen.to(tl.int32), 1)


@triton.jit(do_not_specialize=BATCH_SIZES)
def topk_kernel(
    p_scores, p_indices, n_rows, N: tl.constexpr, K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """The positions of each row's K largest, in their order in the row."""
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < n_rows
    b_limit, b_equal = find_limits(p_scores, None, o_r, m_r, N, K, 1, BLOCK_R, BLOCK_N)
    b_first = tl.zeros([BLOCK_R], tl.int32)
    for i_n in range(0, N, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        b_key = load_keys(p_scores, None, o_r, m_r, o_n, N, 1)
        m_chosen, b_place, b_equal, b_first = choose(b_key, b_limit, b_equal, b_first)
        tl.store(p_indices + o_r[:, None] * K + b_place, o_n.to(tl.int64)[None, :], m_chosen & m_r[:, None])


@triton.jit(do_not_specialize=BATCH_SIZES)
def ordered_topk_kernel(
    p_scores, p_indices, n_rows, N: tl.constexpr, K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """The same, the largest first, of rows that one stretch holds: the K of a router are few, and taken one by one."""
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r, o_n = o_r < n_rows, tl.arange(0, BLOCK_N)
    b_key = load_keys(p_scores, None, o_r, m_r, o_n, N, 1).to(tl.int64) * BLOCK_N + (BLOCK_N - 1 - o_n)[None, :]
    for i_k in range(K):
        b_best = tl.max(b_key, 1)
        tl.store(p_indices + o_r * K + i_k, BLOCK_N - 1 - (b_best & (BLOCK_N - 1)), m_r)
        b_key = tl.where(b_key == b_best[:, None], -(2**62), b_key)


@triton.jit(do_not_specialize=BATCH_SIZES)
def survivors_kernel(
    p_a, p_gates, p_keep, p_hidden, p_units, p_positions, p_survivors, n_rows,
    SIZE: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Of the N coefficients `gates a` of each token the K largest, in their order; SIZE belong to one selection.

    `units` are a, and zeros for all others; `positions` says where the survivors are, `-1 - position` where dropout removed
    one; `survivors` are their hidden numbers, those of each of the PARTS products behind the other's.
    """
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < n_rows
    b_limit, b_equal = find_limits(p_a, p_gates, o_r, m_r, N, K, SIZE, BLOCK_R, BLOCK_N)
    b_first = tl.zeros([BLOCK_R], tl.int32)
    for i_n in range(0, N, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        o_in, m_in = o_r[:, None] * N + o_n[None, :], m_r[:, None] & (o_n < N)[None, :]
        b_key = load_keys(p_a, p_gates, o_r, m_r, o_n, N, SIZE)
        m_chosen, b_place, b_equal, b_first = choose(b_key, b_limit, b_equal, b_first)
        m_chosen = m_chosen & m_in
        b_units = tl.load(p_a + o_in, m_chosen, 0.0)
        tl.store(p_units + o_in, b_units.to(p_units.dtype.element_ty), m_in)
        if p_hidden is not None:
            b_position = tl.zeros([BLOCK_R, BLOCK_N], tl.int32) + o_n[None, :]
            if p_keep is not None:
                b_position = tl.where(tl.load(p_keep + o_in, m_chosen, 0) != 0, b_position, -1 - b_position)
            tl.store(p_positions + o_r[:, None] * K + b_place, b_position, m_chosen)
            o_hidden = o_r[:, None] * (N * PARTS) + (o_n // SIZE * (PARTS * SIZE) + o_n % SIZE)[None, :]
            for i_part in tl.static_range(PARTS):
                b_hidden = tl.load(p_hidden + o_hidden + i_part * SIZE, m_chosen, 0.0)
                tl.store(p_survivors + (o_r[:, None] * PARTS + i_part) * K + b_place, b_hidden, m_chosen)


@triton.jit(do_not_specialize=BATCH_SIZES)
def spread_kernel(
    p_positions, p_survivors, p_hidden, p_keep, n_rows,
    SIZE: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr, BITS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Each token's survivors among zeros again, and which of its units they are; positions are searched by halving.

    BITS: of K, as a binary number.
    """
    n_blocks: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    o_r = (tl.program_id(0) // n_blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_n = (tl.program_id(0) % n_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_in = (o_r < n_rows)[:, None] & (o_n < N)[None, :]
    p_row = p_positions + o_r[:, None] * K
    # How many survivors are before each unit.
    b_before = tl.zeros([BLOCK_R, BLOCK_N], tl.int32)
    for i_bit in range(BITS):
        b_next = b_before + (tl.full([BLOCK_R, BLOCK_N], 1, tl.int32) << (BITS - 1 - i_bit))
        b_position = tl.load(p_row + b_next - 1, m_in & (b_next <= K), N)
        b_position = tl.where(b_position < 0, -1 - b_position, b_position)
        b_before = tl.where(b_position < o_n[None, :], b_next, b_before)
    m_kept = m_in & (tl.load(p_row + b_before, m_in & (b_before < K), N) == o_n[None, :])
    tl.store(p_keep + o_r[:, None] * N + o_n[None, :], m_kept, m_in)
    o_hidden = o_r[:, None] * (N * PARTS) + (o_n // SIZE * (PARTS * SIZE) + o_n % SIZE)[None, :]
    for i_part in tl.static_range(PARTS):
        b_hidden = tl.load(p_survivors + (o_r[:, None] * PARTS + i_part) * K + b_before, m_kept, 0.0)
        tl.store(p_hidden + o_hidden + i_part * SIZE, b_hidden, m_in)
