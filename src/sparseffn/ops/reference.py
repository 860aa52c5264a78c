"""The operations as their equations read: slow, obvious, the truth that every kernel is held against.

Shapes: see ops/README.md. Nothing here is tuned, but that experts are taken apart once.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from sparseffn.ops.activations import SWIGLU_ALPHA, SWIGLU_LIMIT, hidden_units


def route(x: Tensor, selector: Tensor, k: int, gate: str, keep: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Logits `W3 x`, the K largest that are kept, ties to the lowest index, and their gates (equations 11, 15, 22-25).

    Gates of chosen experts that are not kept are 0.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    logits = router_logits(x.to(wide), selector.to(wide))
    gates, indices = choose(logits, k, gate, keep)
    return logits, indices, gates


def choose(
    logits: Tensor, k: int, gate: str, keep: Tensor | None = None, ranks: Tensor | None = None, spread: Tensor | None = None,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The K largest logits, or ranks, that are kept, ties to the lowest index, and the gates of logits with their noise.

    Gates of chosen experts that are not kept are 0 (equations 13, 14, 22-25).
    """
    if spread is not None:
        assert noise is not None, "check_choose has looked"
        logits = logits + noise * torch.log1p(torch.exp(spread))
    kept = torch.ones_like(logits, dtype=torch.bool) if keep is None else keep
    ranks = torch.where(kept, (logits if ranks is None else ranks).detach(), -torch.inf)
    indices = ranks.sort(dim=1, descending=True, stable=True).indices[:, :k]
    chosen, alive = logits.gather(1, indices), kept.gather(1, indices)
    match gate:
        case "sigmoid":
            gates = torch.sigmoid(chosen)
        case "softmax":
            gates = logits.softmax(dim=1).gather(1, indices)
        case _:
            # Of a token that has no expert left, whose row is all -inf, nothing is taken.
            shares = torch.where(alive, chosen, -torch.inf).softmax(dim=1)
            gates = torch.where(alive.any(dim=1, keepdim=True), shares, 0.0)
    return torch.where(alive, gates, 0.0), indices


def experts(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: Tensor,
    indices: Tensor,
    gate_keys: Tensor | None = None,
    key_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
    value_bias: Tensor | None = None,
    keep: Tensor | None = None,
    keep_scale: float = 1.0,
    activation: str = "relu",
    alpha: float = SWIGLU_ALPHA,
    limit: float = SWIGLU_LIMIT,
    inner_k: int | None = None,
) -> Tensor:
    """`y[t] = sum_k gates[t, k] (a_k @ values[e] + value_bias[e])` with `e = indices[t, k]` (equation 12).

    `a_k = act(x[t] @ keys[e] + key_bias[e])`, gated times `x[t] @ gate_keys[e] + gate_bias[e]`; units that `keep` leaves are
    scaled. With `inner_k` only the largest coefficients `gate a` of a token, over all of its selections, take part.
    """
    weights = (keys, values, gate_keys, key_bias, gate_bias, value_bias)
    # Nothing, with a gradient of zeros for whatever no token selects.
    nothing = sum((w[:0].sum() for w in weights if w is not None), gates[:0].sum().to(x.dtype))
    # The gradient of every `keys[e]` would be as large as all keys.
    apart = [[None] * keys.shape[0] if w is None else w.unbind() for w in weights]
    keys_of, values_of, gate_keys_of, key_bias_of, gate_bias_of, value_bias_of = apart
    y = []
    for t, (x_t, gates_t) in enumerate(zip(x.unbind(), gates.to(x.dtype).unbind(), strict=True)):
        chosen, coefficients = indices[t].tolist(), []
        for slot, (e, gate) in enumerate(zip(chosen, gates_t.unbind(), strict=True)):
            h = _affine(x_t, keys_of[e], key_bias_of[e])
            up = None if gate_keys is None else _affine(x_t, gate_keys_of[e], gate_bias_of[e])
            a = hidden_units(activation, h, up, alpha=alpha, limit=limit)
            if keep is not None:
                a = torch.where(keep[t, slot], a * keep_scale, 0.0)
            coefficients.append(gate * a)
        coefficient = torch.cat(coefficients)
        if inner_k is not None:
            best = coefficient.detach().sort(descending=True, stable=True).indices[:inner_k]
            coefficient = torch.zeros_like(coefficient).index_copy(0, best, coefficient[best])
        y_t = coefficient @ torch.cat([values_of[e] for e in chosen])
        if value_bias is not None:
            y_t = y_t + sum(gate * value_bias_of[e] for e, gate in zip(chosen, gates_t.unbind(), strict=True))
        y.append(nothing + y_t)
    return torch.stack(y) if y else x + nothing


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x @ weight if bias is None else x @ weight + bias


def cvmm(x: Tensor, sel: Tensor, weight: Tensor) -> Tensor:
    """`y[n] = x[n] @ weight[sel[n]]` (equation 26)."""
    rows = [row @ weight[e] for row, e in zip(x, sel.tolist(), strict=True)]
    return torch.stack(rows) if rows else x.new_zeros(0, weight.shape[2]) + 0 * (x.sum() + weight.sum())


def router_logits(x: Tensor, selector: Tensor) -> Tensor:
    """`W3 x` for every token."""
    return (x[:, None, :] * selector[None, :, :]).sum(dim=-1)


def weighted_rows(values: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """`y[t] = sum_k weights[t, k] values[indices[t, k]]` (equation 7 over the selected pairs)."""
    return (weights.to(values.dtype)[..., None] * values[indices]).sum(dim=-2)


def topk(scores: Tensor, k: int, ordered: bool) -> Tensor:
    """Indices of the K largest, largest first whatever `ordered` is, ties to the lowest index (equation 6)."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k].contiguous()


def product_key_topk(scores_a: Tensor, scores_b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The K largest of all sums `u[i] = scores_b[i // n_a] + scores_a[i mod n_a]` (equation 8), and their i."""
    sums = (scores_b[..., :, None] + scores_a[..., None, :]).flatten(-2)
    indices = sums.detach().sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return sums.gather(-1, indices), indices.contiguous()


def sinkhorn(scores: Tensor, mask: Tensor | None, n_rounds: int, sign: float) -> Tensor:
    """`x + a` after rounds of `b_t = -lse_e(x + a)`, `a_e = log(T / E) - lse_t(x + b)` from a = 0.

    `sign` is +1 for that, and -1 for the released code, which subtracts inside both log-sum-exps.
    """
    if scores.dim() > 2:
        masks = [None] * len(scores) if mask is None else mask
        balanced = [sinkhorn(x, m, n_rounds, sign) for x, m in zip(scores, masks, strict=True)]
        return torch.stack(balanced) if balanced else scores
    x = scores if mask is None else scores[mask]
    n_tokens, n_experts = x.shape
    a = x.new_zeros(n_experts)
    for _ in range(n_rounds):
        b = -torch.logsumexp(x + sign * a, dim=1)
        if n_tokens:
            a = torch.log(x.new_tensor(n_tokens / n_experts)) - torch.logsumexp(x + sign * b[:, None], dim=0)
    return scores + a


def over_capacity(indices: Tensor, weights: Tensor, n_experts: int, factor: float, mask: Tensor | None = None) -> Tensor:
    """Which selections come when their expert has all that it takes, handed out one by one."""
    n_tokens = indices.shape[0] if mask is None else int(mask.sum())
    taken, over = [0] * n_experts, torch.zeros_like(indices, dtype=torch.bool)
    for t, row in enumerate(indices.tolist()):
        for slot, e in enumerate(row):
            if not weights[t, slot] <= 0:
                taken[e] += 1
                over[t, slot] = taken[e] > factor * len(row) * n_tokens / n_experts
    return over


def balanced_assignment(scores: Tensor) -> Tensor:
    """The assignment of largest total score with floor(T/E) or ceil(T/E) tokens an expert, by trying all of them."""
    n_tokens, n_experts = scores.shape
    low, extra = divmod(n_tokens, n_experts)
    best, best_total = torch.zeros(n_tokens, dtype=torch.int64), -float("inf")
    for choice in itertools.product(range(n_experts), repeat=n_tokens):
        loads = [choice.count(e) for e in range(n_experts)]
        if any(load < low or load > low + (extra > 0) for load in loads):
            continue
        total = float(sum(scores[t, e].double() for t, e in enumerate(choice)))
        if total > best_total:
            best, best_total = torch.tensor(choice, dtype=torch.int64), total
    return best
