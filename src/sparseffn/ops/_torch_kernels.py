"""Sums of rows and choices of the largest in plain PyTorch, for every device that it runs on; experts and routers: `plain.py`.

Shapes: see ops/README.md.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor


def weighted_rows(values: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """See `ops.weighted_rows`."""
    return F.embedding_bag(indices, values, per_sample_weights=weights.to(values.dtype), mode="sum")


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
