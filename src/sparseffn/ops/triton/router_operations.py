"""`route`, `router_logits` and `choose` on Triton kernels; arguments as in the schemas of the files of ops/ so named.

Two launches forward: the logits, then top-K and gates. Four backward. Shapes: see ops/README.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparseffn.ops.choose import check_choose, choose_backward_eager, choose_eager
from sparseffn.ops.plain import with_noise
from sparseffn.ops.route import check_route
from sparseffn.ops.router_logits import check_router
from sparseffn.ops.triton import router
from sparseffn.ops.triton.launch import FUSION, check_tensors, device_of, parts_of, start, sum_parts, whole, with_lines
from sparseffn.ops.triton.tuning import MIN_BLOCK, cdiv, next_power_of_2

# Sides of the tiles of the three small products, and the elements that one program ranks.
TOKENS, _EXPERTS, WIDTH = 32, 32, 64
_RANKED = 2048
# Of the selector's gradient, which spilled in float16 on sm_80 with the usual four.
SELECTOR_WARPS = 8


def router_logits(x: Tensor, selector: Tensor) -> Tensor:
    """`x @ selector.T` in float32, never in TF32; one launch."""
    check_router(x, selector)
    check_tensors(x=x, selector=selector)
    x, selector = with_lines(x), with_lines(selector)
    (n_tokens, n_width), n_experts = x.shape, selector.shape[0]
    logits = x.new_empty(n_tokens, n_experts, dtype=torch.float32)
    block_e = min(_EXPERTS, max(MIN_BLOCK, next_power_of_2(n_experts)))
    strides = {"X_ROW": x.stride(0), "SELECTOR_ROW": selector.stride(0)}
    sizes = {"D": n_width, "N_EXPERTS": n_experts, "BLOCK_T": TOKENS, "BLOCK_E": block_e, "BLOCK_D": WIDTH}
    wide = x.dtype != selector.dtype or x.dtype == torch.float32
    n_programs = cdiv(n_tokens, TOKENS) * cdiv(n_experts, block_e)
    with device_of(x):
        arguments = (x, selector, logits, n_tokens)
        start(router.route_logits_kernel, n_programs, *arguments, WIDE=wide, **sizes, **strides, **FUSION)
    return logits


# It keeps nothing but its arguments.
router_logits_kept = router_logits


def router_logits_backward(
    grad_logits: Tensor, x: Tensor, selector: Tensor, needed: Sequence[bool] | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the selector, those that are needed."""
    of_x, of_selector = needed or (True, True)
    grad, x, selector = grad_logits.contiguous(), with_lines(x), with_lines(selector)
    (n_tokens, n_width), n_experts = x.shape, selector.shape[0]
    grad_x = x.new_empty(x.shape if of_x else 0)
    grad_selector = selector.new_empty(selector.shape) if of_selector else x.new_empty(0)
    block_e = min(_EXPERTS, max(MIN_BLOCK, next_power_of_2(n_experts)))
    sizes = {"D": n_width, "N_EXPERTS": n_experts, "BLOCK_T": TOKENS, "BLOCK_E": block_e, "BLOCK_D": WIDTH, **FUSION}
    n_stretches = cdiv(n_width, WIDTH)
    with device_of(x):
        if of_x:
            arguments = (grad, selector, grad_x, n_tokens)
            n_programs = cdiv(n_tokens, TOKENS) * n_stretches
            start(router.route_bwd_x_kernel, n_programs, *arguments, SELECTOR_ROW=selector.stride(0), **sizes)
        if not of_selector:
            return grad_x, grad_selector
        n_programs = n_stretches * cdiv(n_experts, block_e)
        n_parts = parts_of(n_tokens, 1, n_programs)
        parts = grad.new_empty(n_parts * selector.numel()) if n_parts > 1 else grad_selector
        arguments = (grad, x, parts, n_tokens, n_parts)
        options = {"X_ROW": x.stride(0), "num_warps": SELECTOR_WARPS}
        start(router.route_bwd_selector_kernel, n_parts * n_programs, *arguments, **options, **sizes)
        if n_parts > 1:
            sum_parts(parts, (grad_selector,), n_parts)
    return grad_x, grad_selector


def route(x: Tensor, selector: Tensor, k: int, gate: str, keep: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """What `ops.route` documents, where nothing is kept for a backward."""
    return _route(x, selector, k, gate, keep, keep_shares=False)[:3]


def route_kept(
    x: Tensor, selector: Tensor, k: int, gate: str, keep: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same, and of a softmax over all logits the shares, which its backward needs; else an empty tensor."""
    return _route(x, selector, k, gate, keep, keep_shares=gate == "softmax")


def _route(
    x: Tensor, selector: Tensor, k: int, gate: str, keep: Tensor | None, *, keep_shares: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_route(x, selector, k, gate, keep)
    logits = router_logits(x, selector)
    shares = logits.new_empty(logits.shape if keep_shares else 0)
    gates, indices = _choose(logits, k, gate, keep, shares=shares if keep_shares else None)
    return logits, indices, gates, shares


def _choose(
    logits: Tensor, k: int, gate: str, keep: Tensor | None, *, ranks: Tensor | None = None, spread: Tensor | None = None,
    noise: Tensor | None = None, shares: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gates and indices; the softmax over all logits goes to `shares`."""
    n_tokens = logits.shape[0]
    gates, indices = logits.new_empty(n_tokens, k), logits.new_empty(n_tokens, k, dtype=torch.int64)
    with device_of(logits):
        n_programs, sizes = _ranks(logits, k, gate)
        arguments = (logits, whole(keep), whole(ranks), spread, whole(noise), indices, gates, shares, n_tokens)
        start(router.route_fwd_kernel, n_programs, *arguments, **sizes)
    return gates, indices


def _ranks(logits: Tensor, k: int, gate: str) -> tuple[int, dict[str, Any]]:
    """Programs and constants of kernels that see all logits of a few tokens."""
    n_tokens, n_experts = logits.shape
    block_e = next_power_of_2(n_experts)
    block_t = max(1, min(TOKENS, _RANKED // block_e))
    blocks = {"BLOCK_T": block_t, "BLOCK_E": block_e, "BLOCK_K": next_power_of_2(k), **FUSION}
    return cdiv(n_tokens, block_t), {"N_EXPERTS": n_experts, "K": k, "GATE": gate, "LOGITS_ROW": logits.stride(0), **blocks}


def route_backward(
    grad_logits: Tensor | None, grad_gates: Tensor | None, x: Tensor, selector: Tensor, k: int, gate: str, indices: Tensor,
    gates: Tensor, shares: Tensor, needed: Sequence[bool] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of x and of the selector, those that are needed."""
    grad_scores = gates.new_empty(x.shape[0], selector.shape[0])
    through_logits, through_gates = whole(grad_logits), whole(grad_gates)
    with device_of(x):
        n_programs, sizes = _ranks(grad_scores, k, gate)
        kept = (indices.contiguous(), gates.contiguous(), shares.contiguous())
        arguments = (through_logits, through_gates, *kept, None, None, grad_scores, None, x.shape[0])
        start(router.route_bwd_logits_kernel, n_programs, *arguments, **sizes)
    return router_logits_backward(grad_scores, x, selector, needed)


def choose(
    logits: Tensor, k: int, gate: str, keep: Tensor | None = None, ranks: Tensor | None = None, spread: Tensor | None = None,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What `ops.choose` documents; one launch."""
    check_choose(logits, k, gate, keep, ranks, spread, noise)
    if logits.dtype == torch.float64:
        return choose_eager(logits, k, gate, keep, ranks, spread, noise)
    logits, spread = _alike(logits, spread)
    return _choose(logits, k, gate, keep, ranks=ranks, spread=spread, noise=noise)


# It keeps nothing but its arguments and what it returns.
choose_kept = choose


def choose_backward(
    grad_gates: Tensor, logits: Tensor, k: int, gate: str, spread: Tensor | None, noise: Tensor | None, gates: Tensor,
    indices: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of the logits and of the spread; one launch, of a softmax over all logits more for these."""
    if logits.dtype == torch.float64:
        return choose_backward_eager(grad_gates, logits, k, gate, spread, noise, gates, indices)
    shares = with_noise(logits, spread, noise).softmax(1) if gate == "softmax" else None
    logits, spread = _alike(logits, spread)
    grad_logits = logits.new_empty(logits.shape)
    grad_spread = logits.new_empty(0 if spread is None else logits.shape)
    with device_of(logits):
        n_programs, sizes = _ranks(logits, k, gate)
        kept = (indices.contiguous(), gates.contiguous(), shares, spread, whole(noise))
        arguments = (None, grad_gates.contiguous(), *kept, grad_logits, grad_spread, logits.shape[0])
        start(router.route_bwd_logits_kernel, n_programs, *arguments, **sizes)
    return grad_logits, grad_spread


def _alike(logits: Tensor, spread: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both with contiguous rows, as far from one another in one as in the other."""
    logits = with_lines(logits)
    if spread is not None and spread.stride() != logits.stride():
        return logits.contiguous(), spread.contiguous()
    return logits, spread
