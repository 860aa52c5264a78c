"""What else holds of the backend, checked where Triton interprets its kernels; each function raises if it does not."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from differentiable import experts, route
from torch import Tensor

from sparseffn import ops
from sparseffn.errors import UserError
from sparseffn.ops import balance_losses, counts
from sparseffn.ops.columns import topk_plain
from sparseffn.ops.triton import launch, operations, products, router_operations, tuning

CPU = torch.device("cpu")
T, D, G, E, K = 20, 12, 40, 4, 2


def leaves(*, gated: bool = False) -> dict[str, Tensor]:
    """x, selector and weights of a small layer."""
    generator = torch.Generator().manual_seed(1)
    sizes = {"x": (T, D), "selector": (E, D), "keys": (E, D, G), "values": (E, G, D)}
    sizes |= {"gate_keys": (E, D, G)} if gated else {}
    return {name: torch.randn(*size, generator=generator).requires_grad_() for name, size in sizes.items()}


def layer(x: Tensor, selector: Tensor, keys: Tensor, values: Tensor, gate_keys: Tensor | None = None, k: int = K) -> Tensor:
    """A mixture's forward: route, then experts."""
    _, indices, gates = route(x, selector, k, "sigmoid")
    return experts(x, keys, values, gates, indices, gate_keys)


def expect(words: str, call: Callable[[], object]) -> None:
    """The call must raise a UserError that says so."""
    try:
        call()
    except UserError as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"nothing was raised; expected: {words}")


def float64_is_refused() -> None:
    """By the launcher, with the remedy."""
    words = "must be float32, bfloat16 or float16 for backend 'triton'; got torch.float64; fix: cast it, or use backend 'torch'"
    given = {name: leaf.detach().double() for name, leaf in leaves().items()}
    with torch.no_grad():
        expect(f"`x` {words}", lambda: operations.route(given["x"], given["selector"], K, "sigmoid"))
        indices, gates = torch.zeros(T, K, dtype=torch.int64), torch.ones(T, K, dtype=torch.float64)
        expect(f"`x` {words}", lambda: operations.experts(given["x"], given["keys"], given["values"], gates, indices))
    zeros = torch.zeros(2, 3, dtype=torch.int64)
    expect(f"`weights` {words}", lambda: operations.weighted_rows(torch.ones(7, 5), zeros, torch.ones(2, 3).double()))


def cpu_is_refused() -> None:
    """By the backend, also where kernels are interpreted: what was asked for by name would be computed by another."""
    assert ops.explain_backend(CPU)[0] != "triton"
    x, selector, *_ = leaves().values()
    expect(
        "cannot run on cpu: it needs a CUDA or ROCm device",
        lambda: ops.route(x, selector, k=1, gate="sigmoid", backend="triton"),
    )


def sort_is_stable() -> None:
    """Over several blocks of selections, experts and sums; what is of no expert comes last, in order."""
    generator = torch.Generator().manual_seed(3)
    for n_tokens, k, n_experts in ((0, 2, 3), (1, 1, 1), (100, 4, 5), (700, 2, 70), (300, 1, 31), (257, 3, 1)):
        indices = torch.randint(-1, n_experts + 1, (n_tokens, k), generator=generator)
        key = torch.where((indices < 0) | (indices >= n_experts), n_experts, indices).flatten()
        ordered, order = key.sort(stable=True)
        with mock.patch.object(launch, "SORT_BLOCKS", 2):
            rows = launch.sort_rows(indices, n_experts)
        assert torch.equal(rows.order, order), (n_tokens, k, n_experts)
        assert torch.equal(rows.offsets, torch.searchsorted(ordered, torch.arange(n_experts + 1))), (n_tokens, k, n_experts)


def bad(n: int) -> Tensor:
    """Indices of none of n; the large ones are good, or negative, in 32 bits."""
    return torch.tensor([-1, n, 2**31, 2**32, 2**40, -(2**32)])


def bad_experts_add_nothing() -> None:
    """Nor do they reach a weight's gradient, with an inner top-K or without; the other selections are as without them."""
    given = {name: leaf for name, leaf in leaves(gated=True).items() if name != "selector"}
    generator = torch.Generator().manual_seed(2)
    indices = torch.rand(T, E, generator=generator).topk(K, dim=1).indices
    gates = torch.rand(T, K, generator=generator)
    spoiled = torch.zeros(T, K, dtype=torch.bool)
    spoiled[::3, 0] = spoiled[1, 1] = spoiled[4] = True
    bad_indices = bad(E)[torch.arange(T * K).view(T, K) % 6]
    for inner_k in (None, 7):
        found = []
        for wrong in (bad_indices, indices):
            weights = torch.where(spoiled, 0.0, gates) if wrong is indices else gates.clone()
            x, keys, values, gate_keys = given.values()
            chosen, weights = torch.where(spoiled, wrong, indices), weights.requires_grad_()
            y = experts(x, keys, values, weights, chosen, gate_keys, None, None, None, None, 1.0, "silu", 1.0, 1.0, inner_k)
            grads = torch.autograd.grad(y.square().mean(), [*given.values(), weights])
            found.append([y, *grads[:-1], torch.where(spoiled, 0.0, grads[-1])])
            if wrong is not indices:
                assert bool((grads[-1][spoiled] == 0).all()), "a selection of no expert has a gate's gradient"
        for got, wanted in zip(*found, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def bad_matrices_add_nothing() -> None:
    """A row of no matrix is zeros, has a gradient of zeros and reaches no matrix' gradient."""
    x, weight, grad = torch.randn(12, 5), torch.randn(3, 5, 4), torch.randn(12, 4)
    sel = torch.arange(12) % 3
    sel[::2] = bad(3)
    good = (sel >= 0) & (sel < 3)
    leaves = [t.clone().requires_grad_() for t in (x, weight)]
    y = torch.einsum("nm,nml->nl", leaves[0], leaves[1][torch.where(good, sel, 0)]) * good[:, None]
    wanted = [y, *torch.autograd.grad(y, leaves, grad)]
    for got, right in zip(
        (operations.cvmm(x, sel, weight), *operations.cvmm_backward(grad, x, sel, weight)), wanted, strict=True
    ):
        torch.testing.assert_close(got, right)


def bad_rows_add_nothing() -> None:
    """An index too high or negative is never read through; output and gradients are as without its pair."""
    values, weights, grad = torch.randn(7, 5), torch.randn(4, 3), torch.randn(4, 5)
    indices = torch.tensor([[0, 1, 0], [0, 3, 0], [4, 0, 0], [6, 0, 0]])
    indices.view(-1)[[0, 2, 3, 5, 7, 8]] = bad(7)
    good = (indices >= 0) & (indices < 7)
    leaves = [t.clone().requires_grad_() for t in (values, weights)]
    y = torch.einsum("tk,tkd->td", leaves[1] * good, leaves[0][torch.where(good, indices, 0)])
    torch.testing.assert_close(operations.weighted_rows(values, indices, weights), y)
    wanted = torch.autograd.grad(y, leaves, grad)
    for got, right in zip(operations.weighted_rows_backward(grad, values, indices, weights), wanted, strict=True):
        torch.testing.assert_close(got, right)


def nan_stays_in_its_row() -> None:
    """A token that is not finite spoils its own output alone, in training and evaluation, whatever the activation."""
    for activation in ("relu", "silu", "gelu_tanh", "relu2"):
        given = leaves(gated=True)
        x = given["x"].detach().clone()
        x[3, 2], x[7, 0] = torch.nan, torch.inf
        _, indices, gates = route(x, given["selector"], K, "softmax")
        rest = (given["gate_keys"], None, None, None, None, 1.0, activation)
        y = experts(x, given["keys"], given["values"], gates, indices, *rest)
        finite = y.isfinite().all(dim=1)
        assert not bool(finite[3]) and not bool(finite[7]) and int(finite.sum()) == T - 2, f"{activation}: {finite}"


def nan_is_chosen_first() -> None:
    """And of equal logits the lowest index; zero and minus zero are equal."""
    x = torch.eye(4)
    selector = torch.tensor([[0.0, 1.0, 2.0, -torch.inf], [1.0, 1.0, torch.nan, 3.0], [-0.0, 1.0, 2.0, torch.inf]]).t()
    with torch.no_grad():
        logits, indices, _ = operations.route(torch.eye(4)[:3], torch.zeros(4, 4), 4, "sigmoid")
        assert indices.tolist() == [[0, 1, 2, 3]] * 3 and not logits.any()
    logits = torch.tensor([[1.0, torch.nan, 3.0, 1.0], [-torch.inf, -0.0, 0.0, -1.0], [torch.inf, 1.0, torch.nan, torch.nan]])
    with mock.patch.object(router_operations, "router_logits", lambda x, selector: logits):
        _, indices, _ = operations.route(x[:3], selector[:1].expand(4, 3).new_zeros(4, 4), 4, "sigmoid")
    assert indices.tolist() == [[1, 2, 0, 3], [1, 2, 3, 0], [2, 3, 0, 1]]


def largest_are_those_of_a_stable_sort() -> None:
    """In rows longer than a stretch; ties, zeros of both signs, infinities and NaN of both signs among them."""
    generator = torch.Generator().manual_seed(6)
    for n, k in ((1, 1), (5, 3), (40, 40), (70, 9), (200, 90)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16) if n == 40 else (torch.float32,):
            scores = torch.randn(4, n, generator=generator).to(dtype)
            scores[0] = scores[0].round()
            scores[1, ::3], scores[1, 1::3] = -0.0, 0.0
            scores[2] = -torch.inf
            scores[2, 3:4], scores[2, 4:5], scores[0, 2:3] = torch.nan, torch.inf, -torch.nan
            with mock.patch.object(launch, "CHOICE_BLOCK", 2048 if n < 100 else 128):
                found = operations.topk(scores.view(2, 2, n), k, False)
            wanted = topk_plain(scores, k, False).sort(dim=1).values
            assert torch.equal(found.flatten(0, 1), wanted), (n, k, dtype)
            few = min(k, 9)
            assert torch.equal(operations.topk(scores, few, True), topk_plain(scores, few, True)), (n, k, dtype)
    assert operations.topk(torch.empty(0, 7), 3, False).shape == (0, 3)
    # What others compute: long rows, many in order.
    for scores, k, ordered in ((torch.randn(2, 2100).requires_grad_(), 3, True), (torch.randn(2, 90), 70, True)):
        found = operations.topk(scores, k, ordered)
        assert torch.equal(found, topk_plain(scores, k, ordered)) and not found.requires_grad
    for scores, k in ((torch.ones(2, 2100).int(), 3), (torch.ones(2, 2100), 0), (torch.ones(()), 1)):
        for ordered in (True, False):
            expect("fix: c", lambda scores=scores, k=k, ordered=ordered: operations.topk(scores, k, ordered))


def survivors_are_found_in_stretches() -> None:
    """Of a token's units, more than a program looks at at once: output and gradients have the bits of one stretch."""
    given = {name: leaf for name, leaf in leaves(gated=True).items() if name != "selector"}
    generator = torch.Generator().manual_seed(7)
    n = 6
    indices, gates = torch.rand(n, E, generator=generator).topk(K, dim=1).indices, torch.rand(n, K, generator=generator)
    keep = torch.rand(n, K, G, generator=generator) > 0.5
    runs = []
    x, keys, values, gate_keys = given.values()
    for block in (2048, 64):
        with mock.patch.object(launch, "CHOICE_BLOCK", block):
            y = experts(x[:n], keys, values, gates, indices, gate_keys, None, None, None, keep, 2.0, "relu", 1.0, 1.0, 50)
            runs.append([y, *torch.autograd.grad(y.square().sum(), list(given.values()))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def statistics_are_right() -> None:
    """Counts, summed weights, entropies and their gradients, over several blocks of tokens; indices of no unit do not count."""
    generator = torch.Generator().manual_seed(4)
    for n_tokens, n_units, k in ((0, 4, 2), (1, 1, 1), (150, 5, 2), (70, 40, 3), (130, 5000, 2)):
        indices = torch.randint(n_units, (n_tokens, k), generator=generator)
        weights = torch.randn(n_tokens, k, generator=generator) * (torch.rand(n_tokens, k, generator=generator) > 0.3)
        spoiled = torch.rand(n_tokens, k, generator=generator) > 0.7
        wrong = torch.where(spoiled, bad(n_units)[torch.arange(n_tokens * k).view(n_tokens, k) % 6], indices)
        totals, sums, active = operations.routing_counts(wrong, weights, n_units)
        of_good = counts.routing_counts_plain(indices, weights.masked_fill(spoiled, 0.0), n_units)
        torch.testing.assert_close((totals, sums), of_good[:2])
        # What a token selected is counted by its weights alone.
        assert torch.equal(active, (weights != 0).sum(1))
        logits = torch.randn(n_tokens, min(n_units, 40), generator=generator) * 3
        for mask in (None, torch.rand(n_tokens, generator=generator) > 0.4, torch.zeros(n_tokens, dtype=torch.bool)):
            wide = logits.double().requires_grad_()
            loss = counts.batch_entropy_plain(wide, mask, 0.3)
            (grad,) = torch.autograd.grad(loss, wide, torch.tensor(1.7).double())
            ours, kept = operations.batch_entropy_kept(logits, mask, 0.3)
            torch.testing.assert_close(ours, loss.detach().float())
            back = operations.batch_entropy_backward(torch.tensor(1.7), logits, mask, 0.3, kept)
            torch.testing.assert_close(back, grad.float(), rtol=1e-4, atol=1e-7)


def balancing_losses_are_right() -> None:
    """Switch's and the variation of loads, with their gradients, over several blocks; indices of no expert do not count."""
    generator = torch.Generator().manual_seed(4)
    for n_tokens, n_units, k in ((0, 4, 2), (1, 1, 1), (150, 5, 2), (70, 40, 3)):
        indices = torch.randint(n_units, (n_tokens, k), generator=generator)
        weights = torch.rand(n_tokens, k, generator=generator) * (torch.rand(n_tokens, k, generator=generator) > 0.3)
        spoiled = torch.rand(n_tokens, k, generator=generator) > 0.7
        wrong = torch.where(spoiled, bad(n_units)[torch.arange(n_tokens * k).view(n_tokens, k) % 6], indices)
        # What is of no expert counts for none: among the good it is a weight of zero.
        good = weights.masked_fill(spoiled, 0.0)
        # Rows of wider ones, as those of the noisy router.
        logits = (torch.randn(n_tokens, 2 * n_units, generator=generator) * 3).chunk(2, dim=1)[0]
        for mask in (None, torch.rand(n_tokens, generator=generator) > 0.4, torch.zeros(n_tokens, dtype=torch.bool)):
            wide = logits.double().requires_grad_()
            loss = balance_losses.switch_plain(wide, indices, good.double(), mask, 0.3)
            (grad,) = torch.autograd.grad(loss, wide, torch.tensor(1.7).double())
            given = (logits, wrong, weights) if n_tokens else (logits, indices, weights)
            ours, kept = operations.switch_balance_kept(*given, mask, 0.3)
            torch.testing.assert_close(ours, loss.detach().float())
            back = operations.switch_balance_backward(torch.tensor(1.7), logits, mask, 0.3, kept)
            torch.testing.assert_close(back, grad.float(), rtol=1e-4, atol=1e-7)
        for size in (1.0, 1e-12):
            wide = (good * size).double().requires_grad_()
            loss = balance_losses.variation_plain(wide, indices, n_units, 0.3)
            (grad,) = torch.autograd.grad(loss, wide, torch.tensor(1.7).double())
            given = (weights * size, wrong) if n_tokens else (weights, indices)
            ours, kept = operations.load_variation_kept(*given, n_units, 0.3)
            torch.testing.assert_close(ours, loss.detach().float(), rtol=1e-5, atol=1e-6)
            back = operations.load_variation_backward(torch.tensor(1.7), *given, kept)
            torch.testing.assert_close(back, grad.float().masked_fill(spoiled, 0.0), rtol=1e-4, atol=1e-6)


def results_have_equal_bits() -> None:
    """Output and gradients of two runs, sums split over rows."""
    runs = []
    for _ in range(2):
        given = leaves(gated=True)
        with mock.patch.object(launch, "PART_ROWS", 4):
            y = layer(**given)
            runs.append([y, *torch.autograd.grad(y.square().sum(), list(given.values()))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def logits_are_never_tf32() -> None:
    """Whatever precision PyTorch is set to; the experts' products follow it."""
    before = torch.get_float32_matmul_precision()
    given, seen = leaves(), {}

    def spy(kernel: Any, *arguments: object, **options: Any) -> None:
        seen[kernel.fn.__name__] = options.get("PRECISION")
        real(kernel, *arguments, **options)

    real = launch.start
    try:
        torch.set_float32_matmul_precision("high")
        with mock.patch.multiple("sparseffn.ops.triton.expert_operations", start=spy), torch.no_grad():
            layer(**given)
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen["experts_up_fwd_kernel"] == "tf32", seen
    from pathlib import Path

    source = Path(router_operations.router.__file__ or "").read_text()
    assert source.count("tl.dot(") == source.count('input_precision="ieee"') == 3


def float32_precision_is_passed_on() -> None:
    """SPARSEFFN_TRITON_FLOAT32 reaches the kernels."""
    given, seen = leaves(), []

    def spy(kernel: Any, *arguments: object, **options: Any) -> None:
        seen.append((kernel is products.experts_up_fwd_kernel, options.get("PRECISION")))

    for asked in ("tf32x3", "tf32", "ieee"):
        seen.clear()
        patched = mock.patch.multiple("sparseffn.ops.triton.expert_operations", start=spy)
        with mock.patch.dict(os.environ, {tuning.FLOAT32_VARIABLE: asked}), patched, torch.no_grad():
            layer(**given)
        assert (True, asked) in seen, seen
