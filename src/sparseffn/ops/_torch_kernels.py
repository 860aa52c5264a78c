"""The operations in plain PyTorch, for every device that PyTorch runs on.

Expert products: one matrix product per expert over its sorted rows; no weights are gathered per token and nothing of size
tokens x experts x d exists. Shapes: see ops/README.md.
"""

from __future__ import annotations

import functools
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseffn.ops._checks import check_rows
from sparseffn.ops.assignment import assign_balanced

# The mode of embedding_bag that adds up.
_SUM = 0


def _grouped_mm(rows_RM: Tensor, weight_EML: Tensor, bounds: list[int]) -> Tensor:
    out_RL = rows_RM.new_empty(rows_RM.shape[0], weight_EML.shape[2])
    for e, (start, stop) in enumerate(itertools.pairwise(bounds)):
        if start < stop:
            torch.mm(rows_RM[start:stop], weight_EML[e], out=out_RL[start:stop])
    return out_RL


def _grouped_outer(left_RM: Tensor, right_RL: Tensor, bounds: list[int]) -> Tensor:
    """`sum over rows of expert e of left[r] right[r]^T`, the gradient of the expert matrices; zero without rows."""
    out_EML = left_RM.new_empty(len(bounds) - 1, left_RM.shape[1], right_RL.shape[1])
    for e, (start, stop) in enumerate(itertools.pairwise(bounds)):
        if start < stop:
            torch.mm(left_RM[start:stop].t(), right_RL[start:stop], out=out_EML[e])
        else:
            out_EML[e].zero_()
    return out_EML


def _sum_rows(rows_RD: Tensor, tokens_R: Tensor, n_tokens: int) -> Tensor:
    """Sum of each token's rows, in float32 or wider."""
    wide = torch.promote_types(rows_RD.dtype, torch.float32)
    total_TD = rows_RD.new_zeros(n_tokens, rows_RD.shape[1], dtype=wide)
    return total_TD.index_add_(0, tokens_R, rows_RD.to(wide)).to(rows_RD.dtype)


def _scale(rows_RG: Tensor, gates_R: Tensor) -> Tensor:
    """Rows times their gates, rounded once."""
    return (rows_RG * gates_R[:, None]).to(rows_RG.dtype)


def expert_up(x: Tensor, weight: Tensor, tokens: Tensor, offsets: Tensor) -> Tensor:
    """See `ops.expert_up`."""
    return _grouped_mm(x.index_select(0, tokens), weight, offsets.tolist())


def expert_up_backward(grad: Tensor, x: Tensor, weight: Tensor, tokens: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the expert matrices."""
    bounds, grad = offsets.tolist(), grad.contiguous()
    grad_x = _sum_rows(_grouped_mm(grad, weight.transpose(1, 2), bounds), tokens, x.shape[0])
    return grad_x, _grouped_outer(x.index_select(0, tokens), grad, bounds)


def expert_down(a: Tensor, weight: Tensor, gates: Tensor, tokens: Tensor, offsets: Tensor, n_tokens: int) -> Tensor:
    """See `ops.expert_down`."""
    return _sum_rows(_grouped_mm(_scale(a, gates), weight, offsets.tolist()), tokens, n_tokens)


def expert_down_backward(
    grad: Tensor, a: Tensor, weight: Tensor, gates: Tensor, tokens: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the activations, of the expert matrices and of the gates."""
    bounds = offsets.tolist()
    grad_rows = grad.index_select(0, tokens)
    grad_scaled = _grouped_mm(grad_rows, weight.transpose(1, 2), bounds)
    grad_weight = _grouped_outer(_scale(a, gates), grad_rows, bounds)
    grad_gates = (grad_scaled.to(gates.dtype) * a.to(gates.dtype)).sum(dim=1)
    return _scale(grad_scaled, gates), grad_weight, grad_gates


def _bag(values: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    return F.embedding_bag(indices, values, per_sample_weights=weights.to(values.dtype), mode="sum")


def weighted_rows(values: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """See `ops.weighted_rows`."""
    check_rows(indices, values.shape[0])
    return _bag(values, indices, weights)


def weighted_rows_backward(grad: Tensor, values: Tensor, indices: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the value table and of the weights."""
    if indices.numel() == 0:
        return torch.zeros_like(values), torch.zeros_like(weights)
    # The table's gradient is summed in float32 or wider; embedding_bag's backward has no half precision on the CPU.
    wide = torch.promote_types(values.dtype, torch.float32)
    n_bags, k = indices.shape
    grad, table, scales, flat = (
        grad.to(wide).contiguous(),
        values.to(wide),
        weights.to(wide).flatten(),
        indices.flatten(),
    )
    offsets = torch.arange(n_bags, device=flat.device) * k
    bag_of_row = torch.arange(n_bags, device=flat.device).repeat_interleave(k)
    sizes = offsets.new_full((n_bags,), k)
    aten = torch.ops.aten
    grad_values = aten._embedding_bag_dense_backward(
        grad, flat, bag_of_row, sizes, offsets.new_empty(0), table.shape[0], False, _SUM, scales, -1
    )
    grad_weights = aten._embedding_bag_per_sample_weights_backward(grad, table, flat, offsets, bag_of_row, _SUM, -1)
    return grad_values.to(values.dtype), grad_weights.view(n_bags, k).to(weights.dtype)


def router_logits(x: Tensor, selector: Tensor) -> Tensor:
    """See `ops.router_logits`."""
    device_type = x.device.type
    # Entering the context costs as much as a small product.
    if not torch.is_autocast_enabled(device_type):
        return F.linear(x, selector)
    with torch.autocast(device_type=device_type, enabled=False):
        return F.linear(x, selector)


def topk(scores: Tensor, k: int, ordered: bool) -> Tensor:
    """See `ops.topk`.

    Each float32 becomes an integer that sorts alike and carries its position in the low bits, so that no two are equal.
    """
    n = scores.shape[-1]
    if scores.dtype == torch.float64:
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k].contiguous()
    # Adding 0 turns -0.0 into 0.0, which must tie with it. Flipping the magnitude bits of negatives makes order monotone.
    # In place, as wide rows are bound by memory: 2048 x 2048 take 20 ms so and 87 ms otherwise.
    # A NaN of either sign comes first, so that what it is chosen for shows it.
    bits = (scores.float() + 0.0).view(torch.int32).masked_fill_(scores.isnan(), 0x7FFFFFFF)
    bits.bitwise_xor_((bits >> 31).bitwise_and_(0x7FFFFFFF))
    position = torch.arange(n - 1, -1, -1, device=scores.device)
    unique = bits.to(torch.int64).mul_(1 << 32).add_(position)
    return unique.topk(k, dim=-1, sorted=ordered).indices


def product_key_topk(scores_a: Tensor, scores_b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `ops.product_key_topk`.

    With both halves sorted, the pair of ranks (i, j) is preceded by at least (i + 1)(j + 1) - 1 pairs with no smaller sum,
    so only pairs with (i + 1)(j + 1) <= K can be among the K largest: about K ln K of the K^2.
    """
    n_a, n_b = scores_a.shape[-1], scores_b.shape[-1]
    top_a, top_b = topk(scores_a, min(k, n_a), True), topk(scores_b, min(k, n_b), True)
    pair_b, pair_a = _rank_pairs(top_a.shape[-1], top_b.shape[-1], k, scores_a.device)
    sums = scores_b.gather(-1, top_b)[..., pair_b] + scores_a.gather(-1, top_a)[..., pair_a]
    best = topk(sums, k, True)
    index_a, index_b = top_a.gather(-1, pair_a[best]), top_b.gather(-1, pair_b[best])
    return sums.gather(-1, best), index_b * n_a + index_a


@functools.lru_cache(maxsize=64)
def _rank_pairs(n_a: int, n_b: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ranks in halves b and a, counted from 0, of the pairs that can be among the K largest.

    Counted on the host and kept, so that a GPU is not waited for.
    """
    pairs = [(j, i) for j in range(n_b) for i in range(min(n_a, k // (j + 1)))]
    # Kept tensors outlive the mode they are made in.
    with torch.inference_mode(False):
        pair_b, pair_a = torch.tensor(pairs, dtype=torch.int64, device=device).unbind(1)
    return pair_b, pair_a


def sinkhorn(scores: Tensor, mask: Tensor, n_rounds: int, sign: float) -> Tensor:
    """See `ops.sinkhorn`; masked tokens take no part and get the experts' terms added all the same."""
    n_experts = scores.shape[1]
    left_out = ~mask[:, None]
    log_share = torch.log(mask.sum().to(scores.dtype) / n_experts)
    a_E = scores.new_zeros(n_experts)
    for _ in range(n_rounds):
        b_T1 = -torch.logsumexp(scores + sign * a_E, dim=1, keepdim=True)
        columns = (scores + sign * b_T1).masked_fill(left_out, -torch.inf)
        a_E = log_share - torch.logsumexp(columns, dim=0)
    return scores + a_E.nan_to_num(0.0) if scores.shape[0] else scores.clone()


def sinkhorn_backward(grad: Tensor, scores: Tensor, mask: Tensor, n_rounds: int, sign: float) -> Tensor:
    """Gradient of the scores; the few rounds are computed again, which is cheaper than keeping their tensors."""
    if scores.shape[0] == 0:
        return grad.clone()
    left_out = ~mask[:, None]
    log_share = torch.log(mask.sum().to(scores.dtype) / scores.shape[1])
    rows, columns, a_E = [], [], scores.new_zeros(scores.shape[1])
    for _ in range(n_rounds):
        rows.append(scores + sign * a_E)
        b_T1 = -torch.logsumexp(rows[-1], dim=1, keepdim=True)
        columns.append((scores + sign * b_T1).masked_fill(left_out, -torch.inf))
        a_E = log_share - torch.logsumexp(columns[-1], dim=0)
    grad_scores, grad_a = grad.clone(), grad.sum(dim=0)
    for row_TE, column_TE in zip(reversed(rows), reversed(columns), strict=True):
        by_column = column_TE.softmax(dim=0) * -grad_a
        by_row = row_TE.softmax(dim=1) * (-sign * by_column.sum(dim=1, keepdim=True))
        grad_scores = grad_scores + by_column + by_row
        grad_a = sign * by_row.sum(dim=0)
    return grad_scores


def balanced_assignment(scores: Tensor) -> Tensor:
    """See `ops.balanced_assignment`; computed on the host."""
    assigned = assign_balanced(scores.detach().double().cpu().numpy())
    return torch.from_numpy(assigned).to(scores.device)
