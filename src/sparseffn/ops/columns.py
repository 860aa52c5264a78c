"""The K largest columns of each row (equation 6). Shapes: see ops/README.md.

`torch.topk` leaves the choice among equal values to the algorithm; here ties go to the lowest index, on every device and at
every size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparseffn.errors import UserError
from sparseffn.ops import _torch_kernels
from sparseffn.ops.backends import call
from sparseffn.ops.library import define


def check_topk(scores: Tensor, k: int, ordered: bool) -> None:
    """That there are so many; raises as `topk` documents."""
    if scores.dim() == 0 or not scores.is_floating_point():
        raise UserError(
            f"`scores` must be floating, (..., n); got {scores.dtype} in shape {tuple(scores.shape)}; fix: cast them"
        )
    n = scores.shape[-1]
    if not 1 <= k <= n:
        raise UserError(f"`k` must be between 1 and the number of entries {n}; got {k}; fix: choose from 1 to n")


def topk_plain(scores: Tensor, k: int, ordered: bool) -> Tensor:
    """By a sort, which is stable where top-K is not."""
    return scores.detach().sort(dim=-1, descending=True, stable=True).indices[..., :k].contiguous()


def topk_eager(scores: Tensor, k: int, ordered: bool) -> Tensor:
    """By top-K of integers that no two entries share."""
    return _torch_kernels.topk(scores.detach(), k, ordered)


def _fake(scores, k, ordered):
    return scores.new_empty(*scores.shape[:-1], k, dtype=torch.int64)


_topk = define(
    "topk",
    "Tensor scores, int k, bool ordered",
    "Tensor indices",
    check=check_topk,
    plain=topk_plain,
    eager=topk_eager,
    fake=_fake,
)


def topk_below_autograd(scores: Tensor, k: int) -> Tensor:
    """The same for another operation's kernel, by the kernel of the tensor's device."""
    return _topk.overload(scores, k, True)


def topk(scores: Tensor, k: int, *, ordered: bool = True, backend: str = "auto") -> Tensor:
    """Indices of the `k` largest entries of the last dimension, ties to the lowest index.

    Args:
        scores: `(..., n)`, any floating dtype. Minus infinity is allowed and comes last, NaN first.
        k: how many, 1 to n.
        ordered: largest first; False leaves the order to the backend, which is faster where K is large.
        backend: see `ops.backends`.

    Returns:
        int64 indices `(..., k)`; not differentiable.

    Raises:
        UserError: `k` is outside 1..n, or `scores` are integers or a single number.
    """
    return call(_topk, (scores, k, ordered), backend)
