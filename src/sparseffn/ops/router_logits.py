"""Scores of a router: `x @ selector.T` in float32 or wider, also under autocast. Shapes: see ops/README.md."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseffn.errors import UserError
from sparseffn.ops._checks import require_one_device
from sparseffn.ops.backends import call
from sparseffn.ops.library import Kept, define


def check_router(x: Tensor, selector: Tensor) -> None:
    """That x `[T, D]` and the selector `[E, D]` fit together; raises as `router_logits` documents."""
    if x.dim() != 2 or selector.dim() != 2 or x.shape[1] != selector.shape[1]:
        raise UserError(
            f"`x` and `selector` must be [T, D] and [E, D]; got {tuple(x.shape)} and {tuple(selector.shape)}; "
            "fix: flatten leading dimensions first"
        )
    if not x.is_floating_point() or not selector.is_floating_point():
        raise UserError(f"`x` and `selector` must be floating; got {x.dtype} and {selector.dtype}; fix: cast them")
    require_one_device(x, selector)


def router_logits_plain(x: Tensor, selector: Tensor) -> Tensor:
    """The same by PyTorch's product."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.linear(x.to(wide), selector.to(wide))


def _fake(x, selector):
    return x.new_empty(x.shape[0], selector.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))


_router_logits = define(
    "router_logits",
    "Tensor x, Tensor selector",
    "Tensor logits",
    check=check_router,
    plain=router_logits_plain,
    fake=_fake,
    flops=lambda x, selector: 2 * x[0] * x[1] * selector[0],
    kept=Kept(
        returns="",
        fake=_fake,
        backward="Tensor grad_logits, Tensor x, Tensor selector, bool[]? needed=None",
        gradients=("x", "selector"),
    ),
)


def router_logits(x: Tensor, selector: Tensor, *, backend: str = "auto") -> Tensor:
    """`x @ selector.T` in float32 (float64 for float64 x): routing must not depend on a layer's dtype.

    Args:
        x: `[T, D]`, any floating dtype.
        selector: `[E, D]`, any floating dtype.
        backend: see `ops.backends`.

    Returns:
        `[T, E]`, float32 or wider, also under autocast.

    Raises:
        UserError: ranks or widths do not fit together, a dtype is not floating, or the devices differ.
    """
    return call(_router_logits, (x, selector), backend)
