"""Sinkhorn-balanced scores (S-BASE) and the balanced assignment (BASE, equation 19). Shapes: see ops/README.md."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparseffn.errors import UserError
from sparseffn.ops._checks import check_mask, require_tensors
from sparseffn.ops.assignment import assign_balanced
from sparseffn.ops.backends import call
from sparseffn.ops.counts import NEVER
from sparseffn.ops.library import Kept, define, gradient_like, kernels_missing


def _rounds(scores: Tensor, mask: Tensor, n_rounds: int, sign: float) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """a, and the terms of each round's log-sum-exps over experts and over tokens."""
    left_out = ~mask.unsqueeze(-1)
    *batch, _, n_experts = scores.shape
    log_share = torch.log(mask.sum(-1).clamp_min(1).to(scores.dtype) / n_experts)[..., None, None]
    rows, columns, a_1E = [], [], scores.new_zeros(*batch, 1, n_experts)
    for _ in range(n_rounds):
        rows.append(scores + sign * a_1E)
        b_T1 = -torch.logsumexp(rows[-1], dim=-1, keepdim=True)
        columns.append(torch.where(left_out, NEVER, scores + sign * b_T1))
        a_1E = log_share - torch.logsumexp(columns[-1], dim=-2, keepdim=True)
    return a_1E, rows, columns


def _taking_part(scores: Tensor, mask: Tensor | None) -> Tensor:
    """A token that is not finite is left out, or no other would be finite."""
    finite = scores.detach().isfinite().all(dim=-1)
    return finite if mask is None else mask & finite


def _where_any(mask: Tensor, terms_1E: Tensor) -> Tensor:
    """An expert's terms, none for a sequence of which no token takes part."""
    return torch.where(mask.any(dim=-1)[..., None, None], terms_1E, 0.0)


def sinkhorn_plain(scores: Tensor, mask: Tensor | None, n_rounds: int, sign: float) -> Tensor:
    """See `sinkhorn`; masked tokens take no part and get the experts' terms added all the same."""
    if 0 in scores.shape[:-1]:
        return scores.clone(memory_format=torch.contiguous_format)
    mask = _taking_part(scores, mask)
    a_1E, _, _ = _rounds(scores, mask, n_rounds, sign)
    return (scores + _where_any(mask, a_1E)).contiguous()


def _sinkhorn_backward(grad: Tensor, scores: Tensor, mask: Tensor | None, n_rounds: int, sign: float) -> Tensor:
    """Gradient of the scores; the few rounds are computed again, which is cheaper than keeping their tensors."""
    if 0 in scores.shape[:-1]:
        return gradient_like(scores)
    mask = _taking_part(scores, mask)
    _, rows, columns = _rounds(scores, mask, n_rounds, sign)
    grad_scores, grad_a, taking_part = grad, _where_any(mask, grad.sum(dim=-2, keepdim=True)), mask.unsqueeze(-1)
    for row_TE, column_TE in zip(reversed(rows), reversed(columns), strict=True):
        by_column = torch.where(taking_part, column_TE.softmax(dim=-2) * -grad_a, 0.0)
        by_row = torch.where(taking_part, row_TE.softmax(dim=-1) * (-sign * by_column.sum(dim=-1, keepdim=True)), 0.0)
        grad_scores = grad_scores + by_column + by_row
        grad_a = sign * by_row.sum(dim=-2, keepdim=True)
    return gradient_like(scores).copy_(grad_scores)


def check_sinkhorn(scores: Tensor, mask: Tensor | None, n_rounds: int, sign: float) -> None:
    """That they fit together; raises as `sinkhorn` documents."""
    if scores.dim() < 2 or n_rounds < 0:
        raise UserError(f"`scores` must be [..., tokens, n_experts], `n_rounds` >= 0; got {tuple(scores.shape)}, {n_rounds}")
    if not scores.is_floating_point():
        raise UserError(f"`scores` must be floating; got {scores.dtype}; fix: cast them")
    check_mask(mask, scores, scores.dim() - 1)


def check_assignment(scores: Tensor) -> None:
    """Raises as `balanced_assignment` documents."""
    if scores.dim() != 2 or scores.shape[1] == 0:
        raise UserError(f"`scores` must be [tokens, n_experts] with an expert; got {tuple(scores.shape)}")
    if not scores.is_floating_point():
        raise UserError(f"`scores` must be floating; got {scores.dtype}; fix: cast them")


def _like_scores(scores: Tensor, mask: Tensor | None, n_rounds: int, sign: float) -> Tensor:
    return scores.new_empty(scores.shape)


_ARGUMENTS = "Tensor scores, Tensor? mask, int n_rounds, float sign"

_sinkhorn = define(
    "sinkhorn",
    _ARGUMENTS,
    "Tensor balanced",
    check=check_sinkhorn,
    plain=sinkhorn_plain,
    fake=_like_scores,
    kernel=sinkhorn_plain,
    kept=Kept(
        returns="",
        fake=_like_scores,
        backward=f"Tensor grad_balanced, {_ARGUMENTS}",
        gradients=("scores",),
        kernels=(sinkhorn_plain, _sinkhorn_backward),
    ),
)


def sinkhorn(
    scores: Tensor,
    mask: Tensor | None = None,
    *,
    n_rounds: int = 3,
    released: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Scores `x + a` after rounds of `b_t = -lse_e(x + a)`, `a_e = log(T / E) - lse_t(x + b)`, from a = 0.

    Selecting by them balances the load over all T tokens (Clark 2022). A token whose scores are not finite takes no part.

    Args:
        scores: `[..., T, E]` logits x; each `[T, E]` is balanced by itself.
        mask: bool `[..., T]`, True for tokens that take part; None means all.
        n_rounds: rounds, the paper's code uses 3.
        released: subtract a and b inside the log-sum-exps, as the released code does; that does not balance.
        backend: see `ops.backends`.

    Returns:
        `[..., T, E]`, differentiable.

    Raises:
        UserError: `scores` are no floating matrices, `mask` is not bool or not one a token, or `n_rounds` is negative.
    """
    return call(_sinkhorn, (scores, mask, n_rounds, -1.0 if released else 1.0), backend)


def _assign(scores: Tensor) -> Tensor:
    """Where there is no kernel: by that of the CPU, or by NumPy."""
    if scores.device.type != "cpu" or kernels_missing() is None:
        return _balanced_assignment.overload(scores.cpu()).to(scores.device)
    return assign_on_host(scores)


def assign_on_host(scores: Tensor) -> Tensor:
    """See `balanced_assignment`; by NumPy."""
    return torch.from_numpy(assign_balanced(scores.detach().double().cpu().numpy())).to(scores.device)


def _batches(info: Any, in_dims: tuple[int], scores: Tensor) -> tuple[Tensor, int]:
    """One batch after the other: an assignment is no sum over anything."""
    return torch.stack([_balanced_assignment.overload(s) for s in scores.unbind(in_dims[0])]), 0


_balanced_assignment = define(
    "balanced_assignment",
    "Tensor scores",
    "Tensor assigned",
    check=check_assignment,
    plain=_assign,
    eager=assign_on_host,
    fake=lambda scores: scores.new_empty(scores.shape[0], dtype=torch.int64),
    kernel=_assign,
    vmap=_batches,
)


def balanced_assignment(scores: Tensor, *, backend: str = "auto") -> Tensor:
    """The expert of each token so that every expert gets floor(T/E) or ceil(T/E) and the total score is maximal.

    Args:
        scores: `[T, E]`; NaN and infinity count as zero and as the largest numbers.
        backend: see `ops.backends`.

    Returns:
        int64 `[T]`. Computed on the host, in O(T E) memory.

    Raises:
        UserError: `scores` is not a floating matrix with at least one expert.
    """
    require_tensors(scores=scores)
    return call(_balanced_assignment, (scores.detach().nan_to_num(),), backend)
