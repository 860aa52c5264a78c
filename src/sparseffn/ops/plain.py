"""`route`, `choose` and `experts` as PyTorch's transforms differentiate and batch them: plain operations that read no values on
the host.

Every expert computes every token, those that did not select it as zeros, so that neither an overflow nor a token that is not
finite reaches a result or a gradient that does not depend on it. Memory grows with T K G and not with weights gathered by
token. Shapes: see ops/README.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseffn.ops.activations import SWIGLU_ALPHA, SWIGLU_LIMIT, hidden_units
from sparseffn.ops.counts import NEVER


def upcast(composition: Callable[..., Any]) -> Callable[..., Any]:
    """A composition of half precision computed in float32, as kernels compute it: else it would select others than they do."""

    @functools.wraps(composition)
    def run(*arguments: Any, **named: Any) -> Any:
        dtype = (*arguments, *named.values())[0].dtype
        wide = torch.promote_types(dtype, torch.float32)
        if dtype == wide:
            return composition(*arguments, **named)

        def cast(a: Any, to: torch.dtype) -> Any:
            return a.to(to) if isinstance(a, Tensor) and a.is_floating_point() else a

        found = composition(*(cast(a, wide) for a in arguments), **{name: cast(a, wide) for name, a in named.items()})
        return tuple(cast(a, dtype) for a in found) if isinstance(found, tuple) else cast(found, dtype)

    return run


def route_plain(x: Tensor, selector: Tensor, k: int, gate: str, keep: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Logits `[T, E]`, the K largest of each token that are kept, ties to the lowest index, and their gates."""
    wide = torch.promote_types(x.dtype, torch.float32)
    logits_TE = x.to(wide) @ selector.to(wide).t()
    gates_TK, indices_TK = choose_plain(logits_TE, k, gate, keep)
    return logits_TE, indices_TK, gates_TK


def choose_plain(
    logits: Tensor, k: int, gate: str, keep: Tensor | None = None, ranks: Tensor | None = None, spread: Tensor | None = None,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gates and indices `[T, K]` of the K largest logits, or ranks, of each token that are kept, ties to the lowest index."""
    noisy_TE = with_noise(logits, spread, noise)
    ranked_TE = ranked(noisy_TE if ranks is None else ranks, keep)
    # A sort is stable, top-K is not.
    indices_TK = ranked_TE.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return gates_plain(noisy_TE, indices_TK, gate, None if keep is None else keep.gather(1, indices_TK)), indices_TK


def with_noise(logits_TE: Tensor, spread_TE: Tensor | None, noise_TE: Tensor | None) -> Tensor:
    """Logits with noise whose size is softplus of another router's (equation 13); without it as they are."""
    return logits_TE if spread_TE is None or noise_TE is None else logits_TE + noise_TE * F.softplus(spread_TE)


def ranked(scores_TE: Tensor, keep_TE: Tensor | None) -> Tensor:
    """What a choice is made by, without gradient: dropped experts come last."""
    return scores_TE.detach() if keep_TE is None else scores_TE.detach().masked_fill(~keep_TE, -torch.inf)


def gates_plain(logits_TE: Tensor, indices_TK: Tensor, gate: str, alive_TK: Tensor | None = None) -> Tensor:
    """Weights `[T, K]` of chosen experts, exactly 0 where bool `alive_TK` is False: what routers of given logits use, too.

    Dropped experts keep their share of a softmax over all experts, and have none in one over the chosen.
    """
    chosen_TK = logits_TE.gather(1, indices_TK)
    dropped_TK = None if alive_TK is None else ~alive_TK
    match gate:
        case "sigmoid":
            gates_TK = chosen_TK.sigmoid()
        case "softmax":
            gates_TK = logits_TE.softmax(dim=1).gather(1, indices_TK)
        case "renormalised":
            shown_TK = chosen_TK if dropped_TK is None else chosen_TK.masked_fill(dropped_TK, NEVER)
            gates_TK = shown_TK.softmax(dim=1)
        case _:
            raise AssertionError(f"{gate} is no gate")
    return gates_TK if dropped_TK is None else gates_TK.masked_fill(dropped_TK, 0.0)


@upcast
def experts_plain(
    x: Tensor, keys: Tensor, values: Tensor, gates: Tensor, indices: Tensor, gate_keys: Tensor | None = None,
    key_bias: Tensor | None = None, gate_bias: Tensor | None = None, value_bias: Tensor | None = None,
    keep: Tensor | None = None, keep_scale: float = 1.0, activation: str = "relu", alpha: float = SWIGLU_ALPHA,
    limit: float = SWIGLU_LIMIT, inner_k: int | None = None,
) -> Tensor:  # fmt: skip
    """`y[t] = sum_k gates[t, k] (a_k @ values[e] + value_bias[e])` with `e = indices[t, k]`; arguments as the operation's."""
    n_experts = keys.shape[0]
    chosen = [indices == e for e in range(n_experts)]
    # Of a token that did not select the expert nothing is computed but zeros.
    rows = [torch.where(mask_TK.any(dim=1, keepdim=True), x, 0.0) for mask_TK in chosen]
    a_TKG = x.new_zeros(*indices.shape, keys.shape[2])
    for e, (mask_TK, x_TD) in enumerate(zip(chosen, rows, strict=True)):
        h_TG = _product(x_TD, keys, key_bias, e)
        up_TG = None if gate_keys is None else _product(x_TD, gate_keys, gate_bias, e)
        a_TG = hidden_units(activation, h_TG, up_TG, alpha=alpha, limit=limit)
        a_TKG = torch.where(mask_TK[:, :, None], a_TG[:, None, :], a_TKG)
    if keep is not None:
        a_TKG = torch.where(keep, a_TKG * keep_scale, 0.0)
    coefficients_TKG = gates[:, :, None] * a_TKG
    if inner_k is not None:
        coefficients_TKG = _largest(coefficients_TKG, inner_k)
    y_TD = torch.zeros_like(x, dtype=gates.dtype)
    for e, mask_TK in enumerate(chosen):
        u_TG = torch.where(mask_TK[:, :, None], coefficients_TKG, 0.0).sum(dim=1)
        y_e = (u_TG.to(x.dtype) @ values[e]).to(y_TD.dtype)
        if value_bias is not None:
            y_e = y_e + torch.where(mask_TK, gates, 0.0).sum(dim=1, keepdim=True) * value_bias[e]
        y_TD = y_TD + torch.where(mask_TK.any(dim=1, keepdim=True), y_e, 0.0)
    return y_TD.to(x.dtype)


def _product(x_TD: Tensor, weight: Tensor, bias: Tensor | None, e: int) -> Tensor:
    return x_TD @ weight[e] if bias is None else x_TD @ weight[e] + bias[e]


def _largest(coefficients_TKG: Tensor, inner_k: int) -> Tensor:
    """A token's inner_k largest coefficients, zero elsewhere; ties to the lowest position."""
    flat_TU = coefficients_TKG.flatten(1)
    best = flat_TU.detach().sort(dim=1, descending=True, stable=True).indices[:, :inner_k]
    survives_TU = torch.zeros_like(flat_TU, dtype=torch.bool).scatter(1, best, True)
    return torch.where(survives_TU, flat_TU, 0.0).view_as(coefficients_TKG)
