"""What our causal language models return in transformers, and their loss.

    training:    loss = cross_entropy + balance_loss
    evaluation:  loss = cross_entropy, so that exp(eval_loss) is the perplexity; balance_loss is reported beside it

Transformers' `Trainer` counts the labels of all micro-batches and processes of an update and passes the number as
`num_items_in_batch`; it then adds up the losses of micro-batches. A micro-batch's balancing loss is weighted by its share of
these labels: added up, they are the mean over the update.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils.generic import ModelOutput

from sparseffn.ffn import RoutingStats

# Of a label that is no target.
IGNORED = -100

NOT_AT_INFERENCE = ["past_key_values", "cross_entropy", "balance_loss"]
"""`keys_to_ignore_at_inference` of our configs: what `Trainer` must not collect as predictions."""


@dataclass
class SparseCausalLMOutput(ModelOutput):
    """Output of a causal language model with sparse feedforward blocks; what was not asked for is None."""

    loss: Tensor | None = None
    """What is minimised, see above; with labels."""
    logits: Tensor | None = None
    """`[B, L, vocab_size]`."""
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    """Input of every layer, and the output of the last norm: `[B, L, d_model]` each."""
    cross_entropy: Tensor | None = None
    """Nats a predicted token, without the balancing loss; with labels."""
    balance_loss: Tensor | None = None
    """Sum of the layers' balancing losses, weights included; in training or with labels, for methods that have one."""


def causal_lm_loss(
    model: torch.nn.Module,
    logits: Tensor,
    labels: Tensor | None,
    stats: Sequence[RoutingStats],
    *,
    num_items_in_batch: Tensor | int | None = None,
    shift_labels: Tensor | None = None,
    **others: Any,
) -> SparseCausalLMOutput:
    """Logits with their losses; `past_key_values` and `hidden_states` are for the caller to fill in.

    Args:
        model: whether it trains decides what `loss` is.
        logits: `[B, L, vocab_size]`.
        labels: int64 `[B, L]`, the tokens themselves, -100 where nothing is to be predicted; None: no loss.
        stats: of each layer; none where they were not asked for.
        num_items_in_batch: labels of the whole update; the loss is then a part of the update's mean.
        shift_labels: the target of each position, in place of `labels` a position later.
        others: further arguments of transformers' losses, for the cross-entropy.
    """
    # Theirs is viewed as one row.
    shift_labels = None if shift_labels is None else shift_labels.contiguous()
    n_items = torch.as_tensor(num_items_in_batch, device=logits.device) if num_items_in_batch is not None else None
    balance = torch.stack([layer.balance_loss.float() for layer in stats]).sum() if stats else None
    if labels is None and shift_labels is None:
        return SparseCausalLMOutput(logits=logits, balance_loss=balance)
    cross_entropy = ForCausalLMLoss(
        logits, labels, logits.shape[-1], num_items_in_batch=n_items, shift_labels=shift_labels, **others
    )
    if balance is not None and n_items is not None:
        targets = labels[..., 1:] if shift_labels is None and labels is not None else shift_labels
        assert targets is not None, "one of them was given"
        balance = balance * (targets.ne(IGNORED).sum() / n_items).to(balance)
    return SparseCausalLMOutput(
        loss=cross_entropy + balance if balance is not None and model.training else cross_entropy,
        logits=logits,
        cross_entropy=cross_entropy,
        balance_loss=balance,
    )
