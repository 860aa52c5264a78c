"""Top-K with ties broken by the lowest index (equation 6), on every device and at every size.

`torch.topk` leaves the choice among equal values to the algorithm.
"""
# Annotations stay real objects here: torch.library reads them to infer the schema.

import torch
from torch import Tensor

from sparseffn.errors import UserError
from sparseffn.ops.backends import kernel, runs_eagerly


@torch.library.custom_op("sparseffn::topk", mutates_args=())
def _topk(scores: Tensor, k: int, ordered: bool, backend: str) -> Tensor:
    return kernel("topk", scores, backend)(scores, k, ordered)


@_topk.register_fake
def _(scores: Tensor, k: int, ordered: bool, backend: str) -> Tensor:
    return scores.new_empty(*scores.shape[:-1], k, dtype=torch.int64)


def topk(scores: Tensor, k: int, *, ordered: bool = True, backend: str = "auto") -> Tensor:
    """Indices of the `k` largest entries of the last dimension, ties to the lowest index.

    Args:
        scores: `(..., n)`, any floating dtype. Minus infinity is allowed and comes last.
        k: how many, 1 to n.
        ordered: largest first; False leaves the order to the backend, which is faster where K is large.
        backend: see `ops.backends`.

    Returns:
        int64 indices `(..., k)`; not differentiable.

    Raises:
        UserError: `k` is outside 1..n, or `scores` are integers or a single number.
    """
    if scores.dim() == 0 or not scores.is_floating_point():
        raise UserError(
            f"`scores` must be floating, (..., n); got {scores.dtype} in shape {tuple(scores.shape)}; fix: cast them"
        )
    n = scores.shape[-1]
    if not 1 <= k <= n:
        raise UserError(f"`k` must be between 1 and the number of entries {n}; got {k}; fix: choose from 1 to n")
    scores = scores.detach()
    if runs_eagerly(scores):
        return kernel("topk", scores, backend)(scores, k, ordered)
    return torch.ops.sparseffn.topk(scores, k, ordered, backend)
