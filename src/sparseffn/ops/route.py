"""A router's scores, choice and weights in one operation (equations 11 and 22 of arXiv 2310.10837): logits, top-K, gates.

Logits are float32 or wider whatever the dtype of the layer, under autocast too: routing must not depend on it.
Shapes: see ops/README.md.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sparseffn.errors import UserError, unknown_name
from sparseffn.ops._checks import require_one_device
from sparseffn.ops.backends import call
from sparseffn.ops.library import Kept, define
from sparseffn.ops.plain import route_plain
from sparseffn.ops.router_logits import check_router

GateName = Literal["sigmoid", "softmax", "renormalised"]
GATES: tuple[GateName, ...] = ("sigmoid", "softmax", "renormalised")


def check_route(x: Tensor, selector: Tensor, k: int, gate: str, keep: Tensor | None = None) -> None:
    """That they fit together; raises as `route` documents."""
    check_router(x, selector)
    check_choice(k, gate, keep, x, selector.shape[0])


def check_choice(k: int, gate: str, keep: Tensor | None, rows: Tensor, n_experts: int) -> None:
    """That k, the gate and who is kept fit to one row a token and so many experts; raises as `route` documents."""
    if not 1 <= k <= n_experts:
        raise UserError(f"`k` must be between 1 and the number of experts {n_experts}; got {k}; fix: lower k")
    if gate not in GATES:
        raise unknown_name("gate", gate, GATES)
    if keep is None:
        return
    shape = rows.shape[0], n_experts
    if keep.shape != shape or keep.dtype != torch.bool:
        raise UserError(
            f"`keep` must be bool [T, E] = {shape}; got {keep.dtype} in shape {tuple(keep.shape)}; "
            "fix: compare what is drawn with the rate of dropout"
        )
    require_one_device(rows, keep)


def _fake(x, selector, k, gate, keep=None):
    wide = torch.promote_types(x.dtype, torch.float32)
    logits = x.new_empty(x.shape[0], selector.shape[0], dtype=wide)
    return logits, x.new_empty(x.shape[0], k, dtype=torch.int64), x.new_empty(x.shape[0], k, dtype=wide)


def _fake_kept(x, selector, k, gate, keep=None):
    logits, indices, gates = _fake(x, selector, k, gate)
    return logits, indices, gates, torch.empty_like(logits) if gate == "softmax" else logits.new_empty(0)


_route = define(
    "route",
    "Tensor x, Tensor selector, int k, str gate, Tensor? keep=None",
    "Tensor logits, Tensor indices, Tensor gates",
    check=check_route,
    plain=route_plain,
    fake=_fake,
    flops=lambda x, selector, *_: 2 * x[0] * x[1] * selector[0],
    kept=Kept(
        returns="Tensor shares",
        fake=_fake_kept,
        backward="Tensor? grad_logits, Tensor? grad_gates, Tensor x, Tensor selector, int k, str gate, Tensor indices, "
        "Tensor gates, Tensor shares, bool[]? needed=None",
        gradients=("x", "selector"),
    ),
)


def route(
    x: Tensor, selector: Tensor, *, k: int, gate: GateName, keep: Tensor | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits `s = selector x`, the k largest of each token, and their weights.

    Args:
        x: `[T, D]`, any floating dtype.
        selector: `[E, D]`, any floating dtype.
        k: experts of a token, 1 to E; ties go to the lowest index.
        gate: sigmoid of each chosen logit, its share of a softmax over all of them, or over the k chosen (renormalised).
        keep: bool `[T, E]`, False for experts that a token may not choose (expert dropout, equation 22); None: all may be.
        backend: see `ops.backends`.

    Returns:
        logits `[T, E]`, float32 or wider, of experts that `keep` leaves out too; indices int64 `[T, K]`, largest logit first;
        gates `[T, K]` in the logits' dtype. A logit that is NaN is chosen first, so that its token's output shows it. Dropped
        experts rank last, by index: where fewer than k are left, they fill the last places with gates of exactly 0. In a
        softmax over all experts each of them still counts, in one over the chosen none does.

    Raises:
        UserError: ranks, widths, dtypes or devices do not fit together, `k` is out of range, the gate is unknown,
            or `keep` is not bool `[T, E]`.
    """
    return call(_route, (x, selector, k, gate) if keep is None else (x, selector, k, gate, keep), backend)
