"""The other compiled kernels against their references: routes, weighted rows, top-K, product keys, assignment."""

from __future__ import annotations

import pytest
import torch
from expert_cases import CASES, Options
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseffn import ops
from sparseffn.ops.cpu import build
from sparseffn.ops.spec import check_against_truth

pytestmark = [
    pytest.mark.skipif(build.unavailable() is not None, reason="no compiled kernels here"),
    pytest.mark.usefixtures("poison"),
]

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@DTYPES
@pytest.mark.parametrize(
    ("n_tokens", "n_values", "width", "k"),
    [(1, 9, 100, 4), (3, 7, 33, 7), (63, 40, 20, 5), (300, 50, 36, 9), (150, 3000, 17, 3), (0, 5, 4, 2)],
    ids=["one", "few", "odd", "sorted", "sparse", "no-tokens"],
)
def test_weighted_rows_are_near_the_truth(n_tokens: int, n_values: int, width: int, k: int, dtype: torch.dtype) -> None:
    """Output and both gradients on every path; repeated rows add up."""
    values = torch.randn(n_values, width).to(dtype)
    indices = torch.randint(n_values, (n_tokens, k))
    weights, grad = torch.randn(n_tokens, k).to(dtype), torch.randn(n_tokens, width).to(dtype)
    found = []
    for backend, wide in (("cpu", None), ("torch", None), ("reference", torch.float64)):
        leaves = [t.detach().to(wide or dtype).requires_grad_() for t in (values, weights)]
        y = ops.weighted_rows(leaves[0], indices, leaves[1], backend=backend)
        found.append([y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))])
    for name, got, plain, true in zip(("", ".values", ".weights"), *found, strict=True):
        check_against_truth(f"weighted_rows{name}", got, plain, true, dtype)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 300), st.booleans(), st.integers(0, 10**6), st.data())
def test_topk_agrees_with_a_stable_sort(n: int, ties: bool, seed: int, data: st.DataObject) -> None:
    """Every K, few and many, ordered and not; with ties and infinities."""
    k = data.draw(st.integers(1, n))
    scores = torch.randn(3, n, generator=torch.Generator().manual_seed(seed))
    scores = scores.round() if ties else scores
    scores[1, : n // 2] = -torch.inf
    wanted = (scores + 0.0).sort(dim=-1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(ops.topk(scores, k, backend="cpu"), wanted)
    unordered = ops.topk(scores.double(), k, ordered=False, backend="cpu")
    assert torch.equal(unordered.sort(dim=-1).values, wanted.sort(dim=-1).values)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(0, 10**6), st.data())
def test_product_key_topk_is_exact(n_a: int, n_b: int, seed: int, data: st.DataObject) -> None:
    """The sums are the K largest of all, largest first, and belong to their indices."""
    k = data.draw(st.integers(1, n_a * n_b))
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 3, n_a, generator=generator), torch.randn(2, 3, n_b, generator=generator)
    sums, indices = ops.product_key_topk(a, b, k, backend="cpu")
    wanted, _ = ops.product_key_topk(a, b, k, backend="reference")
    assert torch.equal(sums, wanted)
    assert torch.equal(b.gather(-1, indices // n_a) + a.gather(-1, indices % n_a), sums)


@pytest.mark.parametrize(("n_tokens", "width", "n_experts"), [(1, 8, 3), (300, 33, 5), (200, 64, 130)])
def test_router_logits_agree(n_tokens: int, width: int, n_experts: int) -> None:
    """Against the reference in float64, both sides of the switch to PyTorch's product."""
    x, selector = torch.randn(n_tokens, width), torch.randn(n_experts, width)
    truth = ops.router_logits(x.double(), selector.double(), backend="reference")
    got, plain = (ops.router_logits(x, selector, backend=b) for b in ("cpu", "torch"))
    check_against_truth("router_logits", got, plain, truth, torch.float32)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 60), st.integers(1, 9), st.booleans(), st.integers(0, 10**6))
def test_assignment_is_as_good_as_the_other(n_tokens: int, n_experts: int, ties: bool, seed: int) -> None:
    """Balanced, and of the total of the NumPy form, which the tests of `ops` hold against SciPy."""
    scores = torch.randn(n_tokens, n_experts, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3
    scores = scores.round() if ties else scores
    got, wanted = (ops.balanced_assignment(scores, backend=b) for b in ("cpu", "torch"))
    low, extra = divmod(n_tokens, n_experts)
    loads = got.bincount(minlength=n_experts)
    assert int(loads.min()) >= low and int(loads.max()) <= low + (extra > 0)
    totals = [float(scores.gather(1, a[:, None]).sum()) for a in (got, wanted)]
    assert totals[0] == pytest.approx(totals[1], abs=1e-9)


def test_products_of_pytorch_stand_beside_kernels_of_experts() -> None:
    """Both may use tiles, whose shapes are a thread's: neither's results depend on whether the other ran."""
    torch.manual_seed(0)
    a, b = torch.randn(100, 200, dtype=torch.bfloat16), torch.randn(200, 300, dtype=torch.bfloat16)
    problem = CASES["wide"].draw(Options("out-in"), torch.bfloat16)
    product, found = a @ b, problem.results("cpu")
    for _ in range(3):
        again = problem.results("cpu")
        assert all(torch.equal(again[name], wanted) for name, wanted in found.items())
        assert torch.equal(a @ b, product)
