"""What statistics count of a selection, and the entropy of a batch: values, gradients, transforms, padding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparseffn import ops
from sparseffn.errors import UserError
from sparseffn.ops import _checks

MASKS = {"all": None, "some": torch.tensor([True, False, True, True, False, True]), "none": torch.zeros(6, dtype=torch.bool)}


def entropy(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Equations 20 and 21, literally."""
    shares = logits.softmax(dim=1) if mask is None else logits.softmax(dim=1)[mask]
    p = shares.mean(dim=0)
    return (p * p.log()).sum()


def drawn() -> Tensor:
    """Logits of six tokens and five experts."""
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("n_units", [4, 6000])
def test_counts_are_those_of_a_loop(n_units: int) -> None:
    """A weight of exactly 0 selects nothing; behind the counts stand the number of tokens and zero."""
    indices, weights = torch.tensor([[0, 3], [3, 1], [0, 0]]), torch.tensor([[0.5, -2.0], [0.0, 1.0], [1.0, 0.25]])
    totals, sums, active = ops.routing_counts(indices, weights.requires_grad_(), n_units)
    assert totals.dtype == active.dtype == torch.int64 and not sums.requires_grad
    assert totals[:4].tolist() == [3, 1, 0, 1] and not totals[4:-2].any() and totals[-2:].tolist() == [3, 0]
    assert sums[:4].tolist() == [1.75, 1.0, 0.0, 2.0] and active.tolist() == [2, 1, 2]


def test_no_tokens_count_nothing() -> None:
    """Zeros, and an entropy of 0."""
    totals, sums, active = ops.routing_counts(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2), 3)
    assert not totals.any() and not sums.any() and active.shape == (0,)
    assert float(ops.batch_entropy(torch.zeros(0, 3), None, 1.0)) == 0.0


@pytest.mark.parametrize("mask", ["all", "some"])
def test_entropy_and_its_gradients(mask: str) -> None:
    """Against the equations; first and second derivatives against finite differences, forward mode too."""
    logits, chosen = drawn(), MASKS[mask]
    torch.testing.assert_close(ops.batch_entropy(logits, chosen, 0.5), 0.5 * entropy(logits, chosen))

    def scaled(x: Tensor) -> Tensor:
        return ops.batch_entropy(x, chosen, 0.5)

    assert torch.autograd.gradcheck(scaled, logits, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(scaled, logits)


def test_padding_alone_has_no_entropy_and_no_gradient() -> None:
    """Nothing is divided by zero tokens."""
    logits = drawn()
    loss = ops.batch_entropy(logits, MASKS["none"], 1.0)
    (grad,) = torch.autograd.grad(loss, logits)
    assert float(loss.detach()) == 0.0 and not grad.any()


def test_transforms_and_compilation() -> None:
    """vmap is a loop; a compiled graph calls the operations."""
    logits = torch.stack([drawn(), drawn() + 1.0 * torch.arange(5)])
    looped = torch.stack([ops.batch_entropy(x, None, 2.0) for x in logits])
    torch.testing.assert_close(torch.func.vmap(lambda x: ops.batch_entropy(x, None, 2.0))(logits), looped)
    indices, weights = torch.tensor([[[0, 2]], [[1, 1]]]), torch.ones(2, 1, 2)
    counted = torch.func.vmap(lambda i, w: ops.routing_counts(i, w, 3)[0])(indices, weights)
    assert counted.tolist() == [[1, 0, 1, 1, 0], [0, 2, 0, 1, 0]]

    def both(x: Tensor) -> Tensor:
        return ops.batch_entropy(x, None, 1.0) + ops.routing_counts(indices[0], x[:1, :2], 3)[1].sum()

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    leaf = drawn()
    torch.testing.assert_close(compiled(leaf), both(leaf))
    for run in (compiled, both):
        (grad,) = torch.autograd.grad(run(leaf), leaf)
        torch.testing.assert_close(grad, torch.autograd.grad(entropy(leaf, None), leaf)[0])


def test_only_the_host_looks() -> None:
    """On another device the host would wait, and an assert left to the device would lose its context."""
    indices = torch.tensor([3, -1])
    with pytest.raises(UserError, match="`indices` must be between 0 and 2"):
        _checks.check_indices(indices, "a unit", 3)
    elsewhere = indices.to("meta")
    with torch.profiler.profile() as seen:
        _checks.check_indices(elsewhere, "a unit", 3)
    assert not seen.key_averages()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ops.routing_counts(torch.zeros(3, 2).long(), torch.ones(3, 1), 4), "`indices` must be int64"),
        (lambda: ops.routing_counts(torch.zeros(3, 2), torch.ones(3, 2), 4), "got torch.float32"),
        (lambda: ops.routing_counts(torch.zeros(3, 2).long(), torch.ones(3, 2), 0), "`n_units` at least 1"),
        (lambda: ops.routing_counts(torch.full((3, 2), 4), torch.ones(3, 2), 4), "`indices` must be between 0 and 3, a unit"),
        (lambda: ops.batch_entropy(torch.ones(3), None, 1.0), "`logits` must be"),
        (lambda: ops.batch_entropy(torch.ones(3, 2), torch.ones(2).bool(), 1.0), "`mask` bool"),
        (lambda: ops.batch_entropy(torch.ones(3, 2), torch.ones(3).bool().to("meta"), 1.0), "on one device"),
    ],
    ids=["weights", "integers", "no-units", "no-such-unit", "rank", "mask", "device"],
)
def test_bad_input_is_named(call: Callable[[], object], words: str) -> None:
    """By a user's error, before a kernel sees an address."""
    with pytest.raises(UserError, match=words):
        call()
