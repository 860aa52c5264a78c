"""What a layer's statistics need of a batch: who was selected how often, and the entropy of what the router would choose.

    counts[i] = tokens that selected unit i,  sums[i] = their weights                  of each unit
    loss = scale sum_e p[e] log p[e],  p = mean over the tokens of softmax(logits)     equation 21 of arXiv 2310.10837

Two operations and not twenty of PyTorch's: on a GPU a training step with statistics launches four kernels more.
Shapes: see ops/README.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparseffn.errors import UserError
from sparseffn.ops._checks import check_selections, require_one_device, require_tensors
from sparseffn.ops.backends import call
from sparseffn.ops.batch_group import BatchGroup
from sparseffn.ops.library import Kept, define

# Stands for minus infinity where a gradient has to pass: exp of it is 0, and 0 times it is 0.
NEVER = -1e30


def check_counts(indices: Tensor, weights: Tensor, n_units: int) -> None:
    """That they fit together; raises as `routing_counts` documents."""
    check_selections(indices, weights, n_units, size="n_units", what="a unit")


def check_entropy(logits: Tensor, mask: Tensor | None, scale: float) -> None:
    """That they fit together; raises as `batch_entropy` documents."""
    if logits.dim() != 2 or (mask is not None and (mask.shape != logits.shape[:1] or mask.dtype != torch.bool)):
        of_mask = None if mask is None else (mask.dtype, tuple(mask.shape))
        raise UserError(
            f"`logits` must be [T, E] and `mask` bool [T] or None; got {tuple(logits.shape)} and {of_mask}; "
            "fix: flatten leading dimensions first"
        )
    if logits.dtype not in (torch.float32, torch.float64):
        raise UserError(f"`logits` must be float32 or float64; got {logits.dtype}; fix: cast them")
    require_one_device(logits, mask)


def routing_counts_plain(indices: Tensor, weights: Tensor, n_units: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same by PyTorch's operations."""
    magnitudes = weights.detach().abs().to(torch.promote_types(weights.dtype, torch.float32))
    used = (magnitudes != 0).long()
    # What is of no unit goes to one more, which is cut off: a GPU's scatter would end the process.
    places = torch.where(indices < 0, n_units, indices.clamp(max=n_units)).flatten()
    # Behind the units' counts the number of tokens, and zero.
    tail = used.new_zeros(2).index_fill(0, used.new_zeros(1), indices.shape[0])
    counts = used.new_zeros(n_units + 1).scatter_add(0, places, used.flatten())
    sums = magnitudes.new_zeros(n_units + 1).scatter_add(0, places, magnitudes.flatten())
    return torch.cat((counts[:-1], tail)), sums[:-1].clone(), used.sum(1)


def _fake_counts(indices, weights, n_units):
    wide = torch.promote_types(weights.dtype, torch.float32)
    totals = indices.new_empty(n_units + 2)
    return totals, weights.new_empty(n_units, dtype=wide), indices.new_empty(indices.shape[0])


_routing_counts = define(
    "routing_counts",
    "Tensor indices, Tensor weights, int n_units",
    "Tensor totals, Tensor sums, Tensor active",
    check=check_counts,
    plain=routing_counts_plain,
    fake=_fake_counts,
)


def routing_counts(indices: Tensor, weights: Tensor, n_units: int) -> tuple[Tensor, Tensor, Tensor]:
    """Count a selection; without gradient.

    Args:
        indices: int64 `[T, K]`, 0 to `n_units` - 1.
        weights: `[T, K]`; a weight of exactly 0 selects nothing.
        n_units: number of units to select from.

    Returns:
        int64 `[n_units + 2]`: tokens that selected each unit, then the number of tokens and a zero; float `[n_units]`: sums of
        the absolute weights; int64 `[T]`: units that each token selected.

    Raises:
        UserError: shapes, dtypes or devices do not fit together, or an index is that of no unit (on a GPU it counts for its
            token alone).
    """
    require_tensors(weights=weights)
    return call(_routing_counts, (indices, weights.detach(), n_units))


def log_shares(logits: Tensor, mask: Tensor | None, group: BatchGroup | None = None) -> Tensor:
    """Log of the mean over tokens of the softmax, in log space (equation 20); over those of all processes of a group."""
    log_p_TE = logits.log_softmax(dim=1)
    if mask is None:
        # Made on the device: a tensor from a number would be copied there, which waits for it.
        n_tokens = logits.new_full((), logits.shape[0])
    else:
        log_p_TE = log_p_TE.masked_fill(~mask[:, None], NEVER)
        n_tokens = mask.sum().clamp_min(1).to(logits.dtype)
    if group is not None:
        return _log_shares_of_all(log_p_TE, mask, group)
    return log_p_TE.logsumexp(dim=0) - n_tokens.log()


def _log_shares_of_all(log_p_TE: Tensor, mask: Tensor | None, group: BatchGroup) -> Tensor:
    """The same of every process's tokens: log-sum-exps and numbers of tokens, in one collective."""
    n_tokens = log_p_TE.new_full((), log_p_TE.shape[0]) if mask is None else mask.sum().to(log_p_TE.dtype)
    # Of no tokens it is minus infinity.
    sums_E = log_p_TE.logsumexp(dim=0).clamp_min(NEVER)
    stacked = group.stack(torch.cat((sums_E, n_tokens[None])))
    return stacked[:, :-1].logsumexp(dim=0) - stacked[:, -1].sum().clamp_min(1.0).log()


def batch_entropy_plain(logits: Tensor, mask: Tensor | None, scale: float, group: BatchGroup | None = None) -> Tensor:
    """By PyTorch's operations; also where other processes hold a part of the batch."""
    return batch_entropy_kept(logits, mask, scale, group)[0]


def batch_entropy_kept(
    logits: Tensor, mask: Tensor | None, scale: float, group: BatchGroup | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The loss and its slopes over p, which backward reads."""
    if group is None and logits.shape[0] == 0:
        return scale * logits.sum(), logits.new_zeros(logits.shape[1])
    log_p_E = log_shares(logits, mask, group)
    return scale * (log_p_E.exp() * log_p_E).sum(), 1 + log_p_E


def mean_softmax_backward(grad_loss: Tensor, logits: Tensor, mask: Tensor | None, scale: float, slopes: Tensor) -> Tensor:
    """Gradient of the logits of `scale` times a loss with these `[E]` slopes over p, the mean of their softmax."""
    s_TE = logits.softmax(dim=1)
    n_tokens = logits.shape[0] if mask is None else mask.sum().clamp_min(1)
    grad_TE = s_TE * (slopes - (s_TE * slopes).sum(dim=1, keepdim=True)) * (grad_loss * scale / n_tokens)
    return (grad_TE if mask is None else grad_TE.masked_fill(~mask[:, None], 0.0)).contiguous()


def _fake_entropy(logits, mask, scale):
    return logits.new_empty(())


def _fake_entropy_kept(logits, mask, scale):
    return logits.new_empty(()), logits.new_empty(logits.shape[1])


_batch_entropy = define(
    "batch_entropy",
    "Tensor logits, Tensor? mask, float scale",
    "Tensor loss",
    check=check_entropy,
    plain=batch_entropy_plain,
    fake=_fake_entropy,
    kernel=batch_entropy_plain,
    kept=Kept(
        returns="Tensor slopes",
        fake=_fake_entropy_kept,
        backward="Tensor grad_loss, Tensor logits, Tensor? mask, float scale, Tensor slopes",
        gradients=("logits",),
        kernels=(batch_entropy_kept, mean_softmax_backward),
    ),
)


def batch_entropy(logits: Tensor, mask: Tensor | None, scale: float, *, group: BatchGroup | None = None) -> Tensor:
    """`scale` times minus the entropy of the batch's mean distribution over experts (equations 20, 21).

    Args:
        logits: `[T, E]`, float32 or wider.
        mask: bool `[T]`, False for tokens that do not count; None: all do.
        scale: the weight of a loss.
        group: the processes that the batch is spread over; None: this one.

    Returns:
        Scalar; 0 for no tokens.

    Raises:
        UserError: shapes, dtypes or devices do not fit together.
    """
    if group is not None:
        check_entropy(logits, mask, scale)
        return batch_entropy_plain(logits, mask, scale, group)
    return call(_batch_entropy, (logits, mask, scale))
