"""The operations as their equations read: slow, obvious, the truth that every kernel is held against.

Shapes: see ops/README.md. Nothing here is tuned.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from sparseffn.ops.activations import ACTIVATIONS


def expert_up(x: Tensor, weight: Tensor, tokens: Tensor, offsets: Tensor) -> Tensor:
    """`u[r] = x[tokens[r]] @ weight[e(r)]`, rows of expert e at offsets[e]..offsets[e+1] (equation 26, gathered)."""
    bounds = offsets.tolist()
    rows = [x[tokens[r]] @ weight[e] for e, (start, stop) in enumerate(itertools.pairwise(bounds)) for r in range(start, stop)]
    return torch.stack(rows) if rows else x.new_zeros(0, weight.shape[2]) + 0 * (x.sum() + weight.sum())


def expert_down(a: Tensor, weight: Tensor, gates: Tensor, tokens: Tensor, offsets: Tensor, n_tokens: int) -> Tensor:
    """`y[t] = sum over rows r of token t of gates[r] a[r] @ weight[e(r)]` (equations 12 and 26)."""
    bounds = offsets.tolist()
    y = [0 * (a.sum() + gates.sum() + weight.sum()).to(a.dtype) + a.new_zeros(weight.shape[2]) for _ in range(n_tokens)]
    for e, (start, stop) in enumerate(itertools.pairwise(bounds)):
        for r in range(start, stop):
            t = int(tokens[r])
            y[t] = y[t] + gates[r].to(a.dtype) * (a[r] @ weight[e])
    return torch.stack(y) if y else a.new_zeros(0, weight.shape[2]) + 0 * (a.sum() + gates.sum().to(a.dtype) + weight.sum())


def expert_mlp(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: Tensor,
    indices: Tensor,
    keep: Tensor | None,
    keep_scale: float,
    activation: str,
    inner_k: int | None = None,
) -> Tensor:
    """`y[t] = sum over selections (e, s) of s drop * act(x[t] @ keys[e]) @ values[e]` (equation 12).

    With `inner_k` only the largest coefficients of a token, over all of its selections, take part.
    """
    y = []
    zero = 0 * (x.sum() + keys.sum() + values.sum() + gates.sum().to(x.dtype))
    for t in range(x.shape[0]):
        alphas = []
        for slot, e in enumerate(indices[t].tolist()):
            u = ACTIVATIONS[activation](x[t] @ keys[e])
            if keep is not None:
                u = u * keep[t, slot].to(u.dtype) * keep_scale
            alphas.append(gates[t, slot].to(x.dtype) * u)
        alpha = torch.cat(alphas)
        if inner_k is not None:
            best = alpha.detach().sort(descending=True, stable=True).indices[:inner_k]
            alpha = alpha * torch.zeros_like(alpha).index_fill(0, best, 1.0)
        y.append(zero + alpha @ torch.cat([values[e] for e in indices[t].tolist()]))
    return torch.stack(y) if y else x * (keys.sum() + values.sum() + gates.sum().to(x.dtype))


@torch.no_grad()
def routed_mlp(
    x: Tensor, selector: Tensor, keys: Tensor, values: Tensor, k: int, gate: str, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """`expert_mlp` of the K largest of `selector x` (equation 11), weighted as the variant does (table of section 1.3)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    logits = router_logits(x.to(wide), selector.to(wide))
    indices = logits.sort(dim=1, descending=True, stable=True).indices[:, :k]
    chosen = logits.gather(1, indices)
    if gate == "sigmoid":
        gates = 1 / (1 + torch.exp(-chosen))
    else:
        over = logits if gate == "softmax" else chosen
        gates = torch.exp(chosen) / torch.exp(over).sum(dim=1, keepdim=True)
    return expert_mlp(x, keys, values, gates, indices, None, 1.0, activation), indices, gates


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


def sinkhorn(scores: Tensor, mask: Tensor, n_rounds: int, sign: float) -> Tensor:
    """`x + a` after rounds of `b_t = -lse_e(x + a)`, `a_e = log(T / E) - lse_t(x + b)` from a = 0.

    `sign` is +1 for that, and -1 for the released code, which subtracts inside both log-sum-exps.
    """
    x = scores[mask]
    n_tokens, n_experts = x.shape
    a = x.new_zeros(n_experts)
    for _ in range(n_rounds):
        b = -torch.logsumexp(x + sign * a, dim=1)
        if n_tokens:
            a = torch.log(x.new_tensor(n_tokens / n_experts)) - torch.logsumexp(x + sign * b[:, None], dim=0)
    return scores + a


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
