"""A router's choice and weights from logits that are there: for what a method does to them before (noise, balancing).

Where nothing is done to them, logits, choice and gates are one operation, `route`. Shapes: see ops/README.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparseffn.errors import UserError
from sparseffn.ops._checks import require_one_device
from sparseffn.ops.backends import call
from sparseffn.ops.columns import topk_below_autograd
from sparseffn.ops.library import Kept, define, gradient_like
from sparseffn.ops.plain import choose_plain, gates_plain, ranked, with_noise
from sparseffn.ops.route import GateName, check_choice


def check_choose(
    logits: Tensor, k: int, gate: str, keep: Tensor | None = None, ranks: Tensor | None = None, spread: Tensor | None = None,
    noise: Tensor | None = None,
) -> None:  # fmt: skip
    """That they fit together; raises as `choose` documents."""
    if logits.dim() != 2 or logits.dtype not in (torch.float32, torch.float64):
        raise UserError(
            f"`logits` must be [T, E] in float32 or float64; got {logits.dtype} in shape {tuple(logits.shape)}; "
            "fix: flatten leading dimensions, cast them"
        )
    check_choice(k, gate, keep, logits, logits.shape[1])
    for name, given in (("ranks", ranks), ("spread", spread), ("noise", noise)):
        if given is not None and (given.shape != logits.shape or given.dtype != logits.dtype):
            raise UserError(
                f"`{name}` must be as `logits`, {logits.dtype} in shape {tuple(logits.shape)}; got {given.dtype} in shape "
                f"{tuple(given.shape)}; fix: give one number an expert"
            )
    if (spread is None) != (noise is None):
        raise UserError("`spread` and `noise` must be given together; got one of them; fix: leave out both, or give the other")
    require_one_device(logits, ranks, spread, noise)


def choose_eager(
    logits: Tensor, k: int, gate: str, keep: Tensor | None = None, ranks: Tensor | None = None, spread: Tensor | None = None,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """By the kernel of `topk`."""
    noisy_TE = with_noise(logits, spread, noise)
    indices_TK = topk_below_autograd(ranked(noisy_TE if ranks is None else ranks, keep), k)
    return gates_plain(noisy_TE, indices_TK, gate, None if keep is None else keep.gather(1, indices_TK)), indices_TK


def choose_backward_eager(
    grad_gates: Tensor, logits: Tensor, k: int, gate: str, spread: Tensor | None, noise: Tensor | None, gates: Tensor,
    indices: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of the logits and of the spread, which is empty without noise."""
    # A gate that is 0 passes nothing on: the gradient of a dropped expert counts for nothing.
    grad_TK = grad_gates.where(gates != 0, 0.0)
    match gate:
        case "sigmoid":
            grad_TK = torch.ops.aten.sigmoid_backward(grad_TK, gates)
        case "renormalised":
            grad_TK = torch.ops.aten._softmax_backward_data(grad_TK, gates, 1, gates.dtype)
        case _:
            pass
    grad_TE = gradient_like(logits).zero_().scatter_add_(1, indices, grad_TK)
    if gate == "softmax":
        shares_TE = with_noise(logits, spread, noise).softmax(1)
        grad_TE.copy_(torch.ops.aten._softmax_backward_data(grad_TE, shares_TE, 1, logits.dtype))
    if spread is None or noise is None:
        return grad_TE, logits.new_empty(0)
    grad_spread_TE = torch.ops.aten.softplus_backward(grad_TE * noise, spread, 1, 20)
    return grad_TE, gradient_like(spread).copy_(grad_spread_TE)


def _fake(logits, k, gate, keep=None, ranks=None, spread=None, noise=None):
    return logits.new_empty(logits.shape[0], k), logits.new_empty(logits.shape[0], k, dtype=torch.int64)


_choose = define(
    "choose",
    "Tensor logits, int k, str gate, Tensor? keep=None, Tensor? ranks=None, Tensor? spread=None, Tensor? noise=None",
    "Tensor gates, Tensor indices",
    check=check_choose,
    plain=choose_plain,
    eager=choose_eager,
    fake=_fake,
    kernel=choose_eager,
    kept=Kept(
        returns="",
        fake=_fake,
        backward="Tensor grad_gates, Tensor logits, int k, str gate, Tensor? spread, Tensor? noise, Tensor gates, "
        "Tensor indices",
        gradients=("logits", "spread"),
        kernels=(choose_eager, choose_backward_eager),
    ),
)


def choose(
    logits: Tensor,
    *,
    k: int,
    gate: GateName,
    keep: Tensor | None = None,
    ranks: Tensor | None = None,
    spread: Tensor | None = None,
    noise: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Weights and indices of the k largest logits of each token, as `route` chooses and weights them.

    Args:
        logits: `[T, E]`, float32 or float64.
        k: experts of a token, 1 to E; ties go to the lowest index.
        gate: sigmoid of each chosen logit, its share of a softmax over all of them, or over the k chosen (renormalised).
        keep: bool `[T, E]`, False for experts that a token may not choose; None: all may be.
        ranks: `[T, E]`, by which the k are chosen in place of the logits, which still weight them; without gradient.
        spread: `[T, E]`, with `noise`: choice and gates are of `logits + noise * softplus(spread)` (equation 13).
        noise: `[T, E]`, drawn from a unit normal; without gradient.
        backend: see `ops.backends`.

    Returns:
        gates `[T, K]` in the logits' dtype, exactly 0 for experts that are not kept, and indices int64 `[T, K]`, largest first.

    Raises:
        UserError: shapes, dtypes or devices do not fit together, `k` is out of range, the gate is unknown, or one of `spread`
            and `noise` is missing.
    """
    ranks, noise = (t.detach() if isinstance(t, Tensor) else t for t in (ranks, noise))
    return call(_choose, (logits, k, gate, keep, ranks, spread, noise), backend)
