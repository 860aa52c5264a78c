"""Losses of our models in transformers: cross-entropy and balancing apart, and micro-batches add up to the whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers", reason="needs transformers: pip install 'sparseffn[hf]'")

from sparseffn.ffn import build
from sparseffn.hf.outputs import causal_lm_loss

VOCAB = 11
# Two of six labels of the first row and one of the second are no targets; first tokens never are.
LABELS = torch.tensor([[3, -100, 5, -100, 2, 7], [1, 4, 4, 9, 10, -100]])


def parts(training: bool) -> tuple[torch.nn.Module, torch.Tensor, list]:
    """A layer, logits, and statistics with a balancing loss."""
    torch.manual_seed(0)
    layer = build("sigma-moe", d_model=8, n_experts=4, expert_size=3, k=2, entropy_weight=0.5).train(training)
    _, stats = layer(torch.randn(2, 6, 8), return_stats=True)
    return layer, torch.randn(2, 6, VOCAB), [stats, stats]


def test_the_balancing_loss_is_added_in_training_alone() -> None:
    """And reported apart always."""
    for training in (True, False):
        layer, logits, stats = parts(training)
        found = causal_lm_loss(layer, logits, LABELS, stats)
        wanted = F.cross_entropy(logits[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten())
        torch.testing.assert_close(found.cross_entropy, wanted)
        torch.testing.assert_close(found.balance_loss, 2 * stats[0].balance_loss)
        assert found.balance_loss.item() < -0.1
        torch.testing.assert_close(found.loss, wanted + found.balance_loss if training else wanted)
        assert found[0] is found.loss and found[1] is found.logits


def test_micro_batches_add_up_to_the_whole() -> None:
    """The cross-entropy exactly, the balancing loss as the mean over tokens."""
    layer, logits, stats = parts(training=True)
    whole = causal_lm_loss(layer, logits, LABELS, stats)
    n_items = LABELS[:, 1:].ne(-100).sum()
    rows = [causal_lm_loss(layer, logits[i : i + 1], LABELS[i : i + 1], stats, num_items_in_batch=n_items) for i in (0, 1)]
    assert [round(row.balance_loss.item() / whole.balance_loss.item() * 7) for row in rows] == [3, 4]
    for name in ("loss", "cross_entropy", "balance_loss"):
        torch.testing.assert_close(sum(row[name] for row in rows), whole[name])


def test_without_labels_there_is_no_loss() -> None:
    """Nor a balancing loss without statistics; targets may be given where they are."""
    layer, logits, stats = parts(training=True)
    bare = causal_lm_loss(layer, logits, None, [])
    assert list(bare) == ["logits"]
    shifted = F.pad(LABELS, (0, 1), value=-100)[:, 1:]
    found = causal_lm_loss(layer, logits, None, stats, shift_labels=shifted, num_items_in_batch=7)
    torch.testing.assert_close(found.loss, causal_lm_loss(layer, logits, LABELS, stats).loss)
