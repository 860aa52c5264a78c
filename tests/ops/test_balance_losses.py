"""Balancing losses of Switch and of the sparsely gated mixture: values, gradients, transforms, padding, bad input."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparseffn import ops
from sparseffn.errors import UserError

T, E, K = 6, 5, 2
MASKS = {"all": None, "some": torch.tensor([True, False, True, True, False, True]), "none": torch.zeros(6, dtype=torch.bool)}
GENERATOR = torch.Generator().manual_seed(0)
INDICES = torch.randint(E, (T, K), generator=GENERATOR)


def leaf(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=GENERATOR, dtype=torch.float64).requires_grad_()


def switch(logits: Tensor, weights: Tensor, mask: Tensor | None) -> Tensor:
    """Equations 15 to 17, selection by selection."""
    f = torch.zeros(E, dtype=torch.float64)
    for e, weight in zip(INDICES.flatten().tolist(), weights.flatten().tolist(), strict=True):
        f[e] += weight != 0
    p = logits.softmax(dim=1) if mask is None else logits.softmax(dim=1)[mask]
    return E * (f / f.sum() * p.mean(dim=0)).sum()


def variation(weights: Tensor) -> Tensor:
    """Equation 14, selection by selection."""
    rows = [weights[e == INDICES].sum() for e in range(E)]
    mean = sum(rows) / E
    return sum((load - mean) ** 2 for load in rows) / E / mean**2


@pytest.mark.parametrize("mask", ["all", "some"])
def test_switch_balance_and_its_gradients(mask: str) -> None:
    """Against the equations; first and second derivatives against finite differences, forward mode too."""
    logits, weights, chosen = leaf(T, E), leaf(T, K), MASKS[mask]
    with torch.no_grad():
        weights[0] = 0.0
    torch.testing.assert_close(ops.switch_balance(logits, INDICES, weights, chosen, 0.5), 0.5 * switch(logits, weights, chosen))

    def scaled(x: Tensor) -> Tensor:
        return ops.switch_balance(x, INDICES, weights, chosen, 0.5)

    assert torch.autograd.gradcheck(scaled, logits, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(scaled, logits)
    assert torch.autograd.grad(scaled(logits), weights, allow_unused=True) == (None,)


def test_load_variation_and_its_gradients() -> None:
    """Against the equation; first and second derivatives against finite differences, forward mode too."""
    weights = leaf(T, K)
    torch.testing.assert_close(ops.load_variation(weights, INDICES, E, 0.1), 0.1 * variation(weights))

    def scaled(w: Tensor) -> Tensor:
        return ops.load_variation(w, INDICES, E, 0.1)

    assert torch.autograd.gradcheck(scaled, weights, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(scaled, weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loads_of_nothing_have_the_gradient_of_the_composition(dtype: torch.dtype) -> None:
    """Where the mean is as good as zero its square is clamped, and passes nothing on."""
    for size in (0.0, 1e-12):
        weights = (torch.rand(T, K, dtype=dtype) * size).requires_grad_()
        found = [ops.load_variation(weights, INDICES, E, 1.0)]
        found.append(torch.ops.sparseffn.load_variation_plain(weights, INDICES, E, 1.0))
        grads = [torch.autograd.grad(loss, weights)[0] for loss in found]
        torch.testing.assert_close(*found)
        torch.testing.assert_close(*grads)
        assert all(grad.isfinite().all() for grad in grads)


def test_loads_of_half_precision_are_summed_in_float32() -> None:
    """A sum of bfloat16 would stop growing at 256; of float16, the least square would be 0."""
    indices = torch.arange(2000)[:, None] % 2
    for dtype in (torch.bfloat16, torch.float16):
        weights = (1.0 + indices).to(dtype).requires_grad_()
        loss = ops.load_variation(weights, indices, 2, 1.0)
        (grad,) = torch.autograd.grad(loss, weights)
        assert loss.dtype == torch.float32 and float(loss.detach()) == pytest.approx(1 / 9) and grad.dtype == dtype
        assert float(ops.load_variation(torch.zeros(4, 1, dtype=dtype), indices[:4], 2, 1.0)) == 0.0


def test_nothing_to_balance() -> None:
    """No tokens, padding alone, nothing selected: zero or near it, and no gradient that is no number."""
    none, no_weights = torch.zeros(0, K, dtype=torch.int64), torch.zeros(0, K).requires_grad_()
    assert float(ops.switch_balance(torch.zeros(0, E), none, no_weights, None, 1.0)) == 0.0
    assert float(ops.load_variation(no_weights, none, E, 1.0).detach()) == 0.0
    logits = leaf(T, E)
    for weights, mask in ((torch.zeros(T, K), None), (torch.zeros(T, K), MASKS["none"]), (torch.ones(T, K), MASKS["none"])):
        loss = ops.switch_balance(logits, INDICES, weights, mask, 1.0)
        (grad,) = torch.autograd.grad(loss, logits)
        assert float(loss.detach()) == 0.0 and not grad.any()


def test_transforms_and_compilation() -> None:
    """vmap is a loop; a compiled graph calls the operations."""
    logits, weights, indices = leaf(2, T, E), leaf(2, T, K), torch.stack((INDICES, INDICES.flip(0)))

    def both(x: Tensor, w: Tensor, i: Tensor) -> Tensor:
        return ops.switch_balance(x, i, w, MASKS["some"], 2.0) + ops.load_variation(w, i, E, 3.0)

    looped = torch.stack([both(*row) for row in zip(logits, weights, indices, strict=True)])
    torch.testing.assert_close(torch.func.vmap(both)(logits, weights, indices), looped)
    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    given = logits[0].detach().requires_grad_(), weights[0].detach().requires_grad_(), INDICES
    found = [torch.autograd.grad(run(*given), given[:2]) for run in (compiled, both)]
    torch.testing.assert_close(*found)


LOGITS, WEIGHTS = torch.ones(T, E), torch.ones(T, K)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ops.switch_balance(LOGITS[0], INDICES, WEIGHTS, None, 1.0), "`logits` must be"),
        (lambda: ops.switch_balance(LOGITS, INDICES, WEIGHTS, torch.ones(2).bool(), 1.0), "`mask` bool"),
        (lambda: ops.switch_balance(LOGITS, INDICES[:4], WEIGHTS[:4], None, 1.0), "those of the 6 tokens .* got 4 rows"),
        (lambda: ops.switch_balance(LOGITS, INDICES + E, WEIGHTS, None, 1.0), "`indices` must be between 0 and 4, an expert"),
        (lambda: ops.switch_balance(LOGITS, INDICES, WEIGHTS.to("meta"), None, 1.0), "on one device"),
        (lambda: ops.switch_balance(LOGITS, INDICES, [1.0], None, 1.0), "`weights` must be a tensor"),  # pyright: ignore
        (lambda: ops.load_variation(WEIGHTS[:, :1], INDICES, E, 1.0), "`weights` alike"),
        (lambda: ops.load_variation(INDICES, INDICES, E, 1.0), "`weights` must be floating"),
        (lambda: ops.load_variation(WEIGHTS, INDICES, 0, 1.0), "`n_experts` at least 1"),
        (lambda: ops.load_variation(WEIGHTS, INDICES - E, E, 1.0), "`indices` must be between 0 and 4, an expert"),
    ],
    ids=["rank", "mask", "tokens", "no-such-expert", "device", "list", "shape", "integers", "no-experts", "negative"],
)
def test_bad_input_is_named(call: Callable[[], object], words: str) -> None:
    """By a user's error, before a kernel sees an address."""
    with pytest.raises(UserError, match=words):
        call()
