"""Balancing losses of a batch's routing, two kernels forward and one backward each on a GPU. Shapes: see ops/README.md.

    f . p      N_E sum_e f[e] p[e]               Switch, equations 15-17 of arXiv 2310.10837
    CV^2       var_e(load) / mean_e(load)^2      sparsely gated, equation 14

p is the mean over tokens of softmax(logits), f the share of all selections that an expert receives, load its summed weights.
The third, the entropy of p, is `batch_entropy` in counts.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparseffn.errors import UserError
from sparseffn.ops._checks import check_selections, require_one_device, require_tensors
from sparseffn.ops.backends import call
from sparseffn.ops.batch_group import BatchGroup
from sparseffn.ops.counts import check_entropy, log_shares, mean_softmax_backward
from sparseffn.ops.library import Kept, define

# A mean load whose square is less counts as this.
LEAST_SQUARE = 1e-20


def check_switch(logits: Tensor, indices: Tensor, weights: Tensor, mask: Tensor | None, scale: float) -> None:
    """That they fit together; raises as `switch_balance` documents."""
    check_entropy(logits, mask, scale)
    check_selections(indices, weights, logits.shape[1])
    if indices.shape[0] != logits.shape[0]:
        raise UserError(
            f"`indices` must be those of the {logits.shape[0]} tokens of `logits`; got {indices.shape[0]} rows; "
            "fix: pass what was chosen by these logits"
        )
    require_one_device(logits, indices)


def check_variation(weights: Tensor, indices: Tensor, n_experts: int, scale: float) -> None:
    """That they fit together; raises as `load_variation` documents."""
    check_selections(indices, weights, n_experts)


def switch_plain(
    logits: Tensor, indices: Tensor, weights: Tensor, mask: Tensor | None, scale: float, group: BatchGroup | None = None
) -> Tensor:
    """By PyTorch's operations; also where other processes hold a part of the batch."""
    return switch_kept(logits, indices, weights, mask, scale, group)[0]


def switch_kept(
    logits: Tensor, indices: Tensor, weights: Tensor, mask: Tensor | None, scale: float, group: BatchGroup | None = None
) -> tuple[Tensor, Tensor]:
    """The loss and its slopes over p, which backward reads."""
    n_experts = logits.shape[1]
    if group is None and logits.shape[0] == 0:
        return scale * logits.sum(), logits.new_zeros(n_experts)
    chosen = (weights.detach() != 0).to(logits.dtype)
    counts_E = logits.new_zeros(n_experts).scatter_add(0, indices.flatten(), chosen.flatten())
    if group is not None:
        counts_E = group.sum(counts_E)
    share_E = counts_E / counts_E.sum().clamp_min(1.0)
    loss = n_experts * (share_E * log_shares(logits, mask, group).exp()).sum()
    return scale * loss, n_experts * share_E


def variation_plain(
    weights: Tensor, indices: Tensor, n_experts: int, scale: float, group: BatchGroup | None = None
) -> Tensor:  # fmt: skip
    """By PyTorch's operations; also where other processes hold a part of the batch."""
    return variation_kept(weights, indices, n_experts, scale, group)[0]


def variation_kept(
    weights: Tensor, indices: Tensor, n_experts: int, scale: float, group: BatchGroup | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The loss and its slopes over the loads, `scale` included; loads are summed in float32 or wider."""
    wide = weights.to(torch.promote_types(weights.dtype, torch.float32))
    load_E = wide.new_zeros(n_experts).scatter_add(0, indices.flatten(), wide.flatten())
    if group is not None:
        load_E = group.sum(load_E)
    variance, mean = torch.var_mean(load_E, correction=0)
    square = mean.square()
    clamped = square.clamp_min(LEAST_SQUARE)
    # The square of what is clamped would be no normal number.
    through_mean = torch.where(square >= LEAST_SQUARE, variance / clamped * (mean / clamped), 0.0)
    slope_E = ((load_E - mean) / clamped - through_mean) * (2 * scale / n_experts)
    return scale * (variance / clamped), slope_E


def variation_backward(grad_loss: Tensor, weights: Tensor, indices: Tensor, slopes: Tensor) -> Tensor:
    """Gradient of the weights."""
    return (grad_loss * slopes[indices]).to(weights.dtype).contiguous()


def _fake_switch(logits, indices, weights, mask, scale):
    return logits.new_empty(())


def _fake_switch_kept(logits, indices, weights, mask, scale):
    return logits.new_empty(()), logits.new_empty(logits.shape[1])


def _fake_variation(weights, indices, n_experts, scale):
    return weights.new_empty((), dtype=torch.promote_types(weights.dtype, torch.float32))


def _fake_variation_kept(weights, indices, n_experts, scale):
    loss = _fake_variation(weights, indices, n_experts, scale)
    return loss, loss.new_empty(n_experts)


_switch_balance = define(
    "switch_balance",
    "Tensor logits, Tensor indices, Tensor weights, Tensor? mask, float scale",
    "Tensor loss",
    check=check_switch,
    plain=switch_plain,
    fake=_fake_switch,
    kernel=switch_plain,
    kept=Kept(
        returns="Tensor slopes",
        fake=_fake_switch_kept,
        backward="Tensor grad_loss, Tensor logits, Tensor? mask, float scale, Tensor slopes",
        gradients=("logits",),
        kernels=(switch_kept, mean_softmax_backward),
    ),
)

_load_variation = define(
    "load_variation",
    "Tensor weights, Tensor indices, int n_experts, float scale",
    "Tensor loss",
    check=check_variation,
    plain=variation_plain,
    fake=_fake_variation,
    kernel=variation_plain,
    kept=Kept(
        returns="Tensor slopes",
        fake=_fake_variation_kept,
        backward="Tensor grad_loss, Tensor weights, Tensor indices, Tensor slopes",
        gradients=("weights",),
        kernels=(variation_kept, variation_backward),
    ),
)


def switch_balance(
    logits: Tensor,
    indices: Tensor,
    weights: Tensor,
    mask: Tensor | None,
    scale: float,
    *,
    group: BatchGroup | None = None,
) -> Tensor:
    """`scale N_E sum_e f[e] p[e]` of a batch, f its experts' shares of the selections, p their mean probabilities (eq. 15-17).

    Args:
        logits: `[T, E]`, float32 or float64.
        indices: int64 `[T, K]`, 0 to E - 1.
        weights: `[T, K]`, any floating dtype; a selection of weight 0 does not count. Without gradient, as f is.
        mask: bool `[T]`, False for tokens that p does not count; None: all do.
        scale: the weight of the loss.
        group: the processes that the batch is spread over; None: this one.

    Returns:
        Scalar, differentiable in the logits; `scale` where all experts are used alike, 0 for no tokens.

    Raises:
        UserError: shapes, dtypes or devices do not fit together, or an index is that of no expert (on a GPU it does not count).
    """
    require_tensors(weights=weights)
    if group is not None:
        check_switch(logits, indices, weights, mask, scale)
        return switch_plain(logits, indices, weights, mask, scale, group)
    return call(_switch_balance, (logits, indices, weights.detach(), mask, scale))


def load_variation(
    weights: Tensor, indices: Tensor, n_experts: int, scale: float, *, group: BatchGroup | None = None
) -> Tensor:  # fmt: skip
    """`scale CV^2` of the experts' loads, sums of their weights over a batch: variance over squared mean (equation 14).

    Args:
        weights: `[T, K]`, any floating dtype.
        indices: int64 `[T, K]`, 0 to `n_experts` - 1.
        n_experts: experts, those that nobody selected among them.
        scale: the weight of the loss.
        group: the processes that the batch is spread over; None: this one.

    Returns:
        Scalar in float32 or wider, differentiable in the weights; 0 where all loads are equal.

    Raises:
        UserError: shapes, dtypes or devices do not fit together, or an index is that of no expert (on a GPU it does not count).
    """
    if group is not None:
        check_variation(weights, indices, n_experts, scale)
        return variation_plain(weights, indices, n_experts, scale, group)
    return call(_load_variation, (weights, indices, n_experts, scale))
