"""Keys and gate keys that are stored as one tensor, and their gradients in one memory.

Autograd joins the gradients of two halves by a copy. In a large layer (1.6 GB of gated experts, 512 tokens, two cores) that
took a third of the backward, most of it for memory that is new to the process.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparseffn.errors import UserError
from sparseffn.ops._checks import is_watched


def halves(both: Tensor, *, dim: int, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """Both halves of a weight as views: its first and last lines along `dim`, or its even and odd ones.

    In training on a CPU, `experts` writes the gradients of such keys and gate keys into one tensor in the order of `both`,
    whichever of its dimensions lies innermost, which is then its gradient. Even and odd numbers of the innermost dimension, and
    what lies on other devices, are joined by a copy.

    Args:
        both: `[..., 2 G, ...]`, 2 G along `dim`.
        dim: where the halves are, counted from the end if negative.
        interleaved: whether one half's lines lie between those of the other.

    Raises:
        UserError: `dim` is none of the weight's, or of odd size.
    """
    if not -both.dim() <= dim < both.dim() or both.shape[dim] % 2:
        raise UserError(f"`both` must have an even size in dimension {dim}; got a tensor of shape {tuple(both.shape)}")
    dim %= both.dim()
    if (
        both.requires_grad
        and torch.is_grad_enabled()
        and not is_watched((both,))
        and torch.ops.aten.is_non_overlapping_and_dense(both)
    ):
        return _Halves.apply(both, dim, interleaved)
    return _views(both, dim, interleaved)


def _views(both: Tensor, dim: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    first, second = both.unflatten(dim, (-1, 2)).unbind(dim + 1) if interleaved else both.chunk(2, dim=dim)
    return first, second


def _joined(first: Tensor, second: Tensor, dim: int, interleaved: bool) -> Tensor:
    if not interleaved:
        return torch.cat((first, second), dim)
    # Not by `flatten`, which batched gradients do not know.
    return torch.stack((first, second), dim + 1).reshape(_shape_of_both(first, dim))


class _Halves(torch.autograd.Function):
    """Both views, whose gradients are joined without a copy where they lie in memory as the views do."""

    @staticmethod
    def forward(ctx: Any, both: Tensor, dim: int, interleaved: bool) -> tuple[Tensor, Tensor]:
        ctx.dim, ctx.interleaved, ctx.strides = dim, interleaved, both.stride()
        return _views(both, dim, interleaved)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        first, second = grads
        whole = None
        if not torch.is_grad_enabled() and not is_watched(grads):
            whole = _shared(first, second, ctx.dim, ctx.interleaved, ctx.strides)
        return _joined(first, second, ctx.dim, ctx.interleaved) if whole is None else whole, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor]:
        return _views(tangents[0], ctx.dim, ctx.interleaved)


def _shared(first: Tensor, second: Tensor, dim: int, interleaved: bool, strides: tuple[int, ...]) -> Tensor | None:
    """The tensor without gaps whose halves these are, if there is one."""
    try:
        memory = first.untyped_storage()
    # What batched gradients say, which have none.
    except NotImplementedError:
        return None
    if memory.nbytes() != 2 * first.nbytes:
        return None
    whole = torch.empty(0, dtype=first.dtype, device=first.device).set_(memory, 0, _shape_of_both(first, dim), strides)
    pairs = zip(_views(whole, dim, interleaved), (first, second), strict=True)
    return whole if all(_are_same(*pair) for pair in pairs) else None


def _shape_of_both(half: Tensor, dim: int) -> list[int]:
    return [2 * size if d == dim else size for d, size in enumerate(half.shape)]


def _are_same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same numbers in memory."""
    return a.data_ptr() == b.data_ptr() and a.stride() == b.stride() and a.shape == b.shape
