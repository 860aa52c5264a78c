"""The router's kernels: logits, then the K largest with their gates, and the gradients (equation 11).

Logits are float32: of two half precision tensors the exact products are summed in float32, float32 is multiplied in float32,
never in TF32. Names: p_ pointer (None: not there), b_ block of values, o_ offsets, m_ mask, i_ index. Shapes: ops/README.md.
"""

# Kernels call each other when compiled, never as Python functions, which is what their types say.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from sparseffn.ops.triton.choice import sortable
from sparseffn.ops.triton.sums import load_rows

BATCH_SIZES = ["n_tokens", "n_parts"]


@triton.jit(do_not_specialize=BATCH_SIZES)
def route_logits_kernel(
    p_x, p_selector, p_logits, n_tokens, D: tl.constexpr, N_EXPERTS: tl.constexpr, X_ROW: tl.constexpr,
    SELECTOR_ROW: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """`logits = x selector^T`. WIDE: factors are made float32 first, else both have one half precision."""
    n_blocks: tl.constexpr = (N_EXPERTS + BLOCK_E - 1) // BLOCK_E
    o_t = (tl.program_id(0) // n_blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_e = (tl.program_id(0) % n_blocks) * BLOCK_E + tl.arange(0, BLOCK_E)
    m_t, m_e = o_t < n_tokens, o_e < N_EXPERTS
    b_sum = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for i_d in range(0, D, BLOCK_D):
        o_d = i_d + tl.arange(0, BLOCK_D)
        m_d = o_d < D
        b_x = tl.load(p_x + o_t[:, None] * X_ROW + o_d[None, :], m_t[:, None] & m_d[None, :], 0.0)
        b_w = tl.load(p_selector + o_e[None, :] * SELECTOR_ROW + o_d[:, None], m_d[:, None] & m_e[None, :], 0.0)
        if WIDE:
            b_x, b_w = b_x.to(tl.float32), b_w.to(tl.float32)
        b_sum = tl.dot(b_x, b_w, b_sum, input_precision="ieee")
    tl.store(p_logits + o_t[:, None] * N_EXPERTS + o_e[None, :], b_sum, m_t[:, None] & m_e[None, :])


@triton.jit
def softplus(b_x):
    """`log(1 + exp(x))`, of very negative x exp(x) and not 0."""
    b_exp = tl.exp(-tl.abs(b_x))
    # What 1 + exp rounds off is put right by the ratio of what was added to what arrived.
    b_sum = 1 + b_exp
    b_added = b_sum - 1
    b_log = tl.where(b_added == 0, b_exp, tl.log(b_sum) * (b_exp / tl.where(b_added == 0, 1.0, b_added)))
    return tl.maximum(b_x, 0.0) + b_log


@triton.jit(do_not_specialize=BATCH_SIZES)
def route_fwd_kernel(
    p_logits, p_keep, p_ranks, p_spread, p_noise, p_indices, p_gates, p_shares, n_tokens,
    N_EXPERTS: tl.constexpr, K: tl.constexpr, GATE: tl.constexpr, LOGITS_ROW: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The K largest logits of each token, ties to the lowest index, a NaN before all, and their gates.

    With ranks these decide who is chosen. Of experts that are not kept the rank is minus infinity, and the gate is 0. Noise is
    added to the logits first.
    """
    o_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_e, o_k = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    m_t, m_e = o_t < n_tokens, o_e < N_EXPERTS
    o_logits, m_logits = o_t[:, None] * N_EXPERTS + o_e[None, :], m_t[:, None] & m_e[None, :]
    b_logits = tl.load(p_logits + o_t[:, None] * LOGITS_ROW + o_e[None, :], m_logits, 0.0)
    if p_noise is not None:
        b_spread = tl.load(p_spread + o_t[:, None] * LOGITS_ROW + o_e[None, :], m_logits, 0.0)
        b_logits += tl.load(p_noise + o_logits, m_logits, 0.0) * softplus(b_spread)
    b_score = b_logits
    if p_ranks is not None:
        b_score = tl.load(p_ranks + o_logits, m_logits, 0.0)
    if p_keep is not None:
        m_keep = tl.load(p_keep + o_logits, m_logits, 0) != 0
        b_score = tl.where(m_keep, b_score, -float("inf"))
    b_rank = tl.where(m_e[None, :], sortable(b_score).to(tl.int64) * BLOCK_E + (BLOCK_E - 1 - o_e)[None, :], -(2**62))
    b_indices = tl.zeros([BLOCK_T, BLOCK_K], tl.int32)
    b_chosen = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    b_alive = tl.zeros([BLOCK_T, BLOCK_K], tl.int32)
    for i_k in range(K):
        b_best = tl.max(b_rank, 1)
        m_best = b_rank == b_best[:, None]
        b_expert = tl.sum(tl.where(m_best, o_e[None, :], 0), 1)
        b_logit = tl.sum(tl.where(m_best, b_logits, 0.0), 1)
        b_indices = tl.where(o_k[None, :] == i_k, b_expert[:, None], b_indices)
        b_chosen = tl.where(o_k[None, :] == i_k, b_logit[:, None], b_chosen)
        if p_keep is not None:
            b_is_alive = tl.sum(tl.where(m_best & m_keep, 1, 0), 1)
            b_alive = tl.where(o_k[None, :] == i_k, b_is_alive[:, None], b_alive)
        b_rank = tl.where(m_best, -(2**62), b_rank)
    m_k = o_k < K
    if GATE == "sigmoid":
        b_gates = tl.sigmoid(b_chosen)
    else:
        if GATE == "softmax":
            b_all, m_all = b_logits, m_e[None, :]
        elif p_keep is not None:
            b_all, m_all = b_chosen, m_k[None, :] & (b_alive != 0)
        else:
            b_all, m_all = b_chosen, m_k[None, :]
        b_most = tl.max(tl.where(m_all, b_all, -float("inf")), 1)
        b_exp = tl.where(m_all, tl.exp(b_all - b_most[:, None]), 0.0)
        b_shares = b_exp / tl.sum(b_exp, 1)[:, None]
        if GATE == "softmax":
            b_gates = tl.exp(b_chosen - b_most[:, None]) / tl.sum(b_exp, 1)[:, None]
            if p_shares is not None:
                tl.store(p_shares + o_logits, b_shares, m_logits)
        else:
            b_gates = b_shares
    if p_keep is not None:
        b_gates = tl.where(b_alive != 0, b_gates, 0.0)
    o_out = o_t[:, None] * K + o_k[None, :]
    m_out = m_t[:, None] & m_k[None, :]
    tl.store(p_indices + o_out, b_indices.to(tl.int64), m_out)
    tl.store(p_gates + o_out, b_gates, m_out)


@triton.jit(do_not_specialize=BATCH_SIZES)
def route_bwd_logits_kernel(
    p_grad_logits, p_grad_gates, p_indices, p_gates, p_shares, p_spread, p_noise, p_grad_scores, p_grad_spread, n_tokens,
    N_EXPERTS: tl.constexpr, K: tl.constexpr, GATE: tl.constexpr, LOGITS_ROW: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradient of the logits, from those of the gates and of the logits themselves; with noise also of its spread."""
    o_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_e, o_k = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    m_t, m_e = o_t < n_tokens, o_e < N_EXPERTS
    o_logits = o_t[:, None] * N_EXPERTS + o_e[None, :]
    b_out = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    if p_grad_gates is not None:
        o_gates, m_gates = o_t[:, None] * K + o_k[None, :], m_t[:, None] & (o_k < K)[None, :]
        # A gate that is 0 passes nothing on, whatever arrives there: nothing selected a dropped expert.
        b_gate = tl.load(p_gates + o_gates, m_gates, 0.0)
        b_grad = tl.load(p_grad_gates + o_gates, m_gates & (b_gate != 0), 0.0)
        b_dot = tl.sum(b_grad * b_gate, 1)
        if GATE == "softmax":
            # Of those that nobody asked for. Where a share is nearly 1, g s - s (g s) would cancel.
            b_out -= tl.load(p_shares + o_logits, m_t[:, None] & m_e[None, :], 0.0) * b_dot[:, None]
        for i_k in range(K):
            b_expert = tl.load(p_indices + o_t * K + i_k, m_t, 0)
            b_w = tl.load(p_gates + o_t * K + i_k, m_t, 0.0)
            b_g = tl.load(p_grad_gates + o_t * K + i_k, m_t, 0.0)
            if GATE == "sigmoid":
                b_one = b_g * b_w * (1 - b_w)
            else:
                b_one = b_w * (b_g - b_dot)
            m_one = (b_expert[:, None] == o_e[None, :]) & (b_w != 0)[:, None]
            b_out = tl.where(m_one, b_one[:, None], b_out)
    if p_grad_logits is not None:
        b_out += tl.load(p_grad_logits + o_logits, m_t[:, None] & m_e[None, :], 0.0)
    tl.store(p_grad_scores + o_logits, b_out, m_t[:, None] & m_e[None, :])
    if p_noise is not None:
        b_spread = tl.load(p_spread + o_t[:, None] * LOGITS_ROW + o_e[None, :], m_t[:, None] & m_e[None, :], 0.0)
        b_noise = tl.load(p_noise + o_logits, m_t[:, None] & m_e[None, :], 0.0)
        tl.store(p_grad_spread + o_logits, b_out * b_noise * tl.sigmoid(b_spread), m_t[:, None] & m_e[None, :])


@triton.jit(do_not_specialize=BATCH_SIZES)
def route_bwd_x_kernel(
    p_grad_scores, p_selector, p_out, n_tokens, D: tl.constexpr, N_EXPERTS: tl.constexpr, SELECTOR_ROW: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`out = grad selector`, from the gradient of the logits."""
    n_blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    o_t = (tl.program_id(0) // n_blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_d = (tl.program_id(0) % n_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_t, m_d = o_t < n_tokens, o_d < D
    b_sum = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for i_e in range(0, N_EXPERTS, BLOCK_E):
        o_e = i_e + tl.arange(0, BLOCK_E)
        m_e = o_e < N_EXPERTS
        b_grad = tl.load(p_grad_scores + o_t[:, None] * N_EXPERTS + o_e[None, :], m_t[:, None] & m_e[None, :], 0.0)
        b_w = load_rows(p_selector, o_e, m_e, o_d, m_d, SELECTOR_ROW, 1)
        b_sum = tl.dot(b_grad, b_w, b_sum, input_precision="ieee")
    tl.store(p_out + o_t[:, None] * D + o_d[None, :], b_sum.to(p_out.dtype.element_ty), m_t[:, None] & m_d[None, :])


@triton.jit(do_not_specialize=BATCH_SIZES)
def route_bwd_selector_kernel(
    p_grad_scores, p_x, p_out, n_tokens, n_parts, D: tl.constexpr, N_EXPERTS: tl.constexpr, X_ROW: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`out[part] = grad^T x` over a stretch of the tokens."""
    n_blocks_d: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    n_blocks: tl.constexpr = n_blocks_d * ((N_EXPERTS + BLOCK_E - 1) // BLOCK_E)
    i_part = (tl.program_id(0) // n_blocks).to(tl.int64)
    i_tile = tl.program_id(0) % n_blocks
    o_e = (i_tile // n_blocks_d) * BLOCK_E + tl.arange(0, BLOCK_E)
    o_d = (i_tile % n_blocks_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_e, m_d = o_e < N_EXPERTS, o_d < D
    n_steps = (n_tokens + n_parts * BLOCK_T - 1) // (n_parts * BLOCK_T)
    i_start = i_part * n_steps * BLOCK_T
    i_stop = tl.minimum(n_tokens, i_start + n_steps * BLOCK_T)
    b_sum = tl.zeros([BLOCK_E, BLOCK_D], tl.float32)
    for i_t in range(i_start, i_stop, BLOCK_T):
        o_t = i_t + tl.arange(0, BLOCK_T)
        m_t = o_t < i_stop
        b_grad = tl.load(p_grad_scores + o_t[None, :] * N_EXPERTS + o_e[:, None], m_t[None, :] & m_e[:, None], 0.0)
        b_x = load_rows(p_x, o_t, m_t, o_d, m_d, X_ROW, 1)
        b_sum = tl.dot(b_grad, b_x, b_sum, input_precision="ieee")
    p_o = p_out + i_part * (N_EXPERTS * D) + o_e[:, None] * D + o_d[None, :]
    tl.store(p_o, b_sum.to(p_out.dtype.element_ty), m_e[:, None] & m_d[None, :])
