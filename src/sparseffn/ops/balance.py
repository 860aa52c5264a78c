"""Sinkhorn-balanced scores (S-BASE) and the balanced assignment (BASE, equation 19). Shapes: see ops/README.md."""
# Annotations stay real objects here: torch.library reads them to infer the schema.

import torch
from torch import Tensor

from sparseffn.errors import UserError
from sparseffn.ops._checks import check_finite, require_one_device
from sparseffn.ops.backends import direct_kernel, kernel


@torch.library.custom_op("sparseffn::sinkhorn", mutates_args=())
def _sinkhorn(scores: Tensor, mask: Tensor, n_rounds: int, sign: float, backend: str) -> Tensor:
    check_finite(scores, "scores")
    return kernel("sinkhorn", scores, backend)(scores, mask, n_rounds, sign)


@_sinkhorn.register_fake
def _(scores: Tensor, mask: Tensor, n_rounds: int, sign: float, backend: str) -> Tensor:
    return torch.empty_like(scores)


@torch.library.custom_op("sparseffn::sinkhorn_backward", mutates_args=())
def _sinkhorn_backward(grad: Tensor, scores: Tensor, mask: Tensor, n_rounds: int, sign: float, backend: str) -> Tensor:
    return kernel("sinkhorn_backward", scores, backend)(grad, scores, mask, n_rounds, sign)


@_sinkhorn_backward.register_fake
def _(grad: Tensor, scores: Tensor, mask: Tensor, n_rounds: int, sign: float, backend: str) -> Tensor:
    return torch.empty_like(scores)


def _save_sinkhorn(ctx, inputs, output) -> None:
    scores, mask, ctx.n_rounds, ctx.sign, ctx.backend = inputs
    ctx.save_for_backward(scores, mask)


def _differentiate_sinkhorn(ctx, grad):
    scores, mask = ctx.saved_tensors
    grad_scores = torch.ops.sparseffn.sinkhorn_backward(grad, scores, mask, ctx.n_rounds, ctx.sign, ctx.backend)
    return grad_scores, None, None, None, None


_sinkhorn.register_autograd(_differentiate_sinkhorn, setup_context=_save_sinkhorn)


def sinkhorn(
    scores: Tensor,
    mask: Tensor | None = None,
    *,
    n_rounds: int = 3,
    released: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Scores `x + a` after rounds of `b_t = -lse_e(x + a)`, `a_e = log(T / E) - lse_t(x + b)`, from a = 0.

    Selecting by them balances the load over the whole batch (Clark 2022).

    Args:
        scores: `[T, E]` logits x, finite.
        mask: bool `[T]`, True for tokens that take part; None means all.
        n_rounds: rounds, the paper's code uses 3.
        released: subtract a and b inside the log-sum-exps, as the released code does; that does not balance.
        backend: see `ops.backends`.

    Returns:
        `[T, E]`, differentiable.

    Raises:
        UserError: `scores` is no floating matrix, `mask` is no bool vector for it, or `n_rounds` is negative.
        NonFiniteError: a score is NaN or infinite.
    """
    if scores.dim() != 2 or n_rounds < 0:
        raise UserError(f"`scores` must be [tokens, n_experts], `n_rounds` >= 0; got {tuple(scores.shape)}, {n_rounds}")
    if not scores.is_floating_point():
        raise UserError(f"`scores` must be floating; got {scores.dtype}; fix: cast them")
    if mask is None:
        mask = torch.ones(scores.shape[0], dtype=torch.bool, device=scores.device)
    elif mask.shape != scores.shape[:1] or mask.dtype != torch.bool:
        raise UserError(
            f"`mask` must be bool, one a token, shape {tuple(scores.shape[:1])}; "
            f"got {mask.dtype} in shape {tuple(mask.shape)}; fix: flatten it, compare with 0"
        )
    require_one_device(scores, mask)
    sign = -1.0 if released else 1.0
    direct = direct_kernel("sinkhorn", backend)
    if direct is not None:
        check_finite(scores, "scores")
        return direct(scores, mask, n_rounds, sign)
    return torch.ops.sparseffn.sinkhorn(scores, mask, n_rounds, sign, backend)


@torch.library.custom_op("sparseffn::balanced_assignment", mutates_args=())
def _balanced_assignment(scores: Tensor, backend: str) -> Tensor:
    return kernel("balanced_assignment", scores, backend)(scores)


@_balanced_assignment.register_fake
def _(scores: Tensor, backend: str) -> Tensor:
    return scores.new_empty(scores.shape[0], dtype=torch.int64)


_balanced_assignment.register_autograd(lambda ctx, grad: (None, None))


def balanced_assignment(scores: Tensor, *, backend: str = "auto") -> Tensor:
    """The expert of each token so that every expert gets floor(T/E) or ceil(T/E) and the total score is maximal.

    Args:
        scores: `[T, E]`, finite.
        backend: see `ops.backends`.

    Returns:
        int64 `[T]`. Computed on the host, in O(T E) memory.

    Raises:
        UserError: `scores` is not a floating matrix with at least one expert.
        NonFiniteError: a score is NaN or infinite.
    """
    if scores.dim() != 2 or scores.shape[1] == 0:
        raise UserError(f"`scores` must be [tokens, n_experts] with an expert; got {tuple(scores.shape)}")
    if not scores.is_floating_point():
        raise UserError(f"`scores` must be floating; got {scores.dtype}; fix: cast them")
    return torch.ops.sparseffn.balanced_assignment(scores.detach(), backend)
