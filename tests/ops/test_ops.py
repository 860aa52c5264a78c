"""Operations against their references, in float64 with all gradients; compilation; backends."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sparseffn import ops
from sparseffn.errors import UserError
from sparseffn.ops.assignment import assign_balanced
from sparseffn.ops.backends import kernel

F64 = torch.float64


def routed(n_tokens: int, n_experts: int, k: int, kind: str) -> ops.ExpertRows:
    """A selection, sorted: random, one hot expert, or ragged with empty experts."""
    indices = torch.rand(n_tokens, n_experts).topk(k, dim=1).indices
    if kind == "hot":
        indices = indices * 0 + torch.arange(k)
    if kind == "ragged":
        lengths = torch.arange(n_tokens) % 3
        offsets = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
        units = torch.arange(int(offsets[-1])) * 2 % n_experts
        return ops.sort_by_expert(ops.Selection(units, torch.ones(len(units)), offsets, n_experts, None))
    return ops.sort_by_expert(ops.Selection.fixed(indices, torch.ones(n_tokens, k), n_experts))


def agree(function: Callable[..., Tensor], *inputs: Tensor) -> None:
    """The torch backend and the reference give the same output and gradients."""
    results = []
    for backend in ("torch", "reference"):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        y = function(*leaves, backend=backend)
        direction = torch.sin(torch.arange(y.numel(), dtype=y.dtype)).view(y.shape)
        grads = torch.autograd.grad((y * direction).sum(), leaves, allow_unused=True)
        results.append([y, *(torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True))])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-10, rtol=1e-10)


CASES = pytest.mark.parametrize(
    ("n_tokens", "n_experts", "k", "kind"),
    [
        (1, 1, 1, "random"),
        (63, 5, 2, "random"),
        (20, 7, 7, "random"),
        (17, 4, 2, "hot"),
        (30, 9, 1, "ragged"),
        (0, 3, 2, "random"),
    ],
    ids=["one", "odd", "all-experts", "hot", "ragged", "no-tokens"],
)


@CASES
def test_expert_products_equal_the_reference(n_tokens: int, n_experts: int, k: int, kind: str) -> None:
    """Up and down, with empty experts, ragged selections and non-contiguous input."""
    rows = routed(n_tokens, n_experts, k, kind)
    x, w = torch.randn(6, n_tokens, dtype=F64).t(), torch.randn(n_experts, 6, 3, dtype=F64)
    agree(lambda x, w, backend: ops.expert_up(x, w, rows, backend=backend), x, w)
    a, v, g = (
        torch.randn(len(rows.order), 3, dtype=F64),
        torch.randn(n_experts, 3, 6, dtype=F64),
        torch.rand(len(rows.order), dtype=F64),
    )
    agree(lambda a, v, g, backend: ops.expert_down(a, v, g, rows, backend=backend), a, v, g)


def test_unwritten_output_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs of `new_empty` filled with NaN leave no trace: every entry is written."""
    plain = Tensor.new_empty

    def poisoned(self: Tensor, *args: object, **kwargs: object) -> Tensor:
        made = plain(self, *args, **kwargs)  # type: ignore[arg-type]
        return made.fill_(torch.nan) if made.is_floating_point() and made.device.type != "meta" else made

    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    test_expert_products_equal_the_reference(30, 9, 1, "ragged")


def test_cvmm_is_one_matrix_a_row() -> None:
    """Equation 26."""
    x, sel, weight = torch.randn(9, 4), torch.tensor([2, 0, 2, 1, 1, 2, 0, 2, 2]), torch.randn(4, 4, 3)
    torch.testing.assert_close(ops.cvmm(x, sel, weight), torch.einsum("nm,nml->nl", x, weight[sel]))


def test_weighted_rows_and_product_keys_equal_the_reference() -> None:
    """Repeated rows add up; halves of different size."""
    indices = torch.randint(7, (11, 5))
    agree(
        lambda v, w, backend: ops.weighted_rows(v, indices, w, backend=backend),
        torch.randn(7, 3, dtype=F64),
        torch.randn(11, 5, dtype=F64),
    )
    for k in (1, 4, 12):
        agree(
            lambda a, b, backend, k=k: ops.product_key_topk(a, b, k, backend=backend)[0],
            torch.randn(9, 2, 3, dtype=F64),
            torch.randn(9, 2, 4, dtype=F64),
        )


@pytest.mark.parametrize("released", [False, True], ids=["correct", "released"])
def test_sinkhorn_equals_the_reference(released: bool) -> None:
    """With padding, forward and gradient."""
    mask = torch.arange(12) % 4 != 0
    agree(lambda x, backend: ops.sinkhorn(x, mask, released=released, backend=backend), torch.randn(12, 5, dtype=F64))


def test_gradients_are_those_of_finite_differences() -> None:
    """gradcheck in float64 of every differentiable operation."""
    rows = routed(5, 4, 2, "random")
    leaf = {"requires_grad": True, "dtype": F64}
    check = torch.autograd.gradcheck
    assert check(lambda x, w: ops.expert_up(x, w, rows), (torch.randn(5, 3, **leaf), torch.randn(4, 3, 2, **leaf)))
    down = (torch.randn(10, 2, **leaf), torch.randn(4, 2, 3, **leaf), torch.rand(10, **leaf))
    assert check(lambda a, w, g: ops.expert_down(a, w, g, rows), down)
    indices = torch.randint(5, (4, 3))
    assert check(lambda v, w: ops.weighted_rows(v, indices, w), (torch.randn(5, 2, **leaf), torch.randn(4, 3, **leaf)))
    assert check(lambda x: ops.sinkhorn(x), (torch.randn(5, 3, **leaf),))
    assert check(lambda x: ops.select_columns(x, indices), (torch.randn(4, 5, **leaf),))
    halves = (torch.randn(3, 2, 4, **leaf), torch.randn(3, 2, 3, **leaf))
    assert check(lambda a, b: ops.product_key_topk(a, b, 5)[0], halves)
    assert check(lambda x, s: ops.router_logits(x, s), (torch.randn(4, 3, **leaf), torch.randn(5, 3, **leaf)))
    sel = torch.tensor([1, 0, 1, 2])
    assert check(lambda x, w: ops.cvmm(x, sel, w), (torch.randn(4, 3, **leaf), torch.randn(3, 3, 2, **leaf)))
    chosen = torch.tensor([[0, 2], [1, 0], [2, 1]])
    whole = (
        torch.randn(3, 4, **leaf),
        torch.randn(3, 4, 2, **leaf),
        torch.randn(3, 2, 4, **leaf),
        torch.rand(3, 2, **leaf),
    )
    for backend in ("auto", "torch"):
        assert check(lambda *t, b=backend: ops.expert_mlp(*t, chosen, activation="gelu", backend=b), whole)
        assert check(lambda *t, b=backend: ops.expert_mlp(*t, chosen, activation="silu", inner_k=3, backend=b), whole)


class Largest(TorchDispatchMode):
    """Remembers how many entries the largest tensor has that an operation returns."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.entries = max(self.entries, tensor.numel())
        return out


def test_nothing_has_the_size_of_tokens_times_experts_times_width() -> None:
    """PyTorch's expert products gather rows, never weights: the largest tensor is the weights' gradient or the rows."""
    n_tokens, width, n_experts, size, k = 60, 10, 50, 8, 2
    x, keys = torch.randn(n_tokens, width), torch.randn(n_experts, width, size)
    values, gates = torch.randn(n_experts, size, width), torch.rand(n_tokens, k)
    indices = torch.rand(n_tokens, n_experts).topk(k, dim=1).indices
    with Largest() as seen:
        y, *kept = kernel("expert_mlp", x, "torch")(x, keys, values, gates, indices, None, 1.0, "relu", save=True)
        kernel("expert_mlp_backward", x, "torch")(y, x, keys, values, gates, *kept, None, 1.0, "relu")
    assert seen.entries <= max(n_experts * width * size, n_tokens * k * width) < n_tokens * n_experts * width


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_stays_near_the_truth(dtype: torch.dtype) -> None:
    """Largest error of the expert products over the largest value, against float64."""
    rows = routed(64, 6, 3, "random")
    x, w, v = torch.randn(64, 32), torch.randn(6, 32, 16) / 6, torch.randn(6, 16, 32) / 4
    gates = torch.rand(len(rows.order))

    def layer(cast: torch.dtype) -> Tensor:
        u = ops.expert_up(x.to(cast), w.to(cast), rows).relu()
        return ops.expert_down(u, v.to(cast), gates.to(torch.promote_types(cast, torch.float32)), rows)

    truth = layer(F64)
    error = (layer(dtype).double() - truth).abs().max() / truth.abs().max()
    assert float(error) < 4 * torch.finfo(dtype).eps


def test_deterministic_mode_gives_equal_bits() -> None:
    """Forward and backward twice."""
    rows = routed(50, 6, 3, "random")
    torch.use_deterministic_algorithms(True)
    try:
        results = []
        for _ in range(2):
            x, w = torch.ones(50, 8).cumsum(0).sin().requires_grad_(), torch.ones(6, 8, 4).cumsum(1).cos().requires_grad_()
            ops.expert_up(x, w, rows).square().sum().backward()
            results.append((x.grad, w.grad))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, float("-inf"), 1e-30]), min_size=1, max_size=12), st.data())
def test_topk_is_a_stable_descending_sort(values: list[float], data: st.DataObject) -> None:
    """Ties go to the lowest index, in every dtype, zeros of either sign alike; the reference's too."""
    k = data.draw(st.integers(1, len(values)))
    x = torch.tensor(values)
    wanted = sorted(range(len(values)), key=lambda i: (-(values[i] + 0.0), i))[:k]
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for backend in ("auto", "torch", "reference"):
            assert ops.topk(x.to(dtype), k, backend=backend).tolist() == wanted
    assert sorted(ops.topk(x, k, ordered=False).tolist()) == sorted(wanted)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 9), st.booleans(), st.integers(0, 10**6))
def test_assignment_is_optimal(n_tokens: int, n_experts: int, ties: bool, seed: int) -> None:
    """Loads are floor or ceil, and no assignment has a larger total (SciPy)."""
    scores = np.random.default_rng(seed).normal(size=(n_tokens, n_experts)) * 3
    scores = np.round(scores) if ties else scores
    assigned = assign_balanced(scores)
    low, extra = divmod(n_tokens, n_experts)
    loads = np.bincount(assigned, minlength=n_experts)
    assert loads.min() >= low and loads.max() <= low + (extra > 0)
    columns = np.concatenate([np.repeat(np.arange(n_experts), low), np.arange(n_experts) if extra else np.zeros(0, int)])
    bonus = np.where(np.arange(len(columns)) < low * n_experts, 1e6, 0.0)
    row, column = linear_sum_assignment(scores[:, columns] + bonus, maximize=True)
    assert scores[np.arange(n_tokens), assigned].sum() == pytest.approx(scores[row, columns[column]].sum(), abs=1e-6)


def test_assignment_of_4096_tokens_takes_under_half_a_second() -> None:
    """Best of three, 16 experts."""
    scores, times = np.random.default_rng(0).normal(size=(4096, 16)), []
    for _ in range(3):
        start = time.perf_counter()
        assign_balanced(scores)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.5


def test_small_assignment_equals_brute_force() -> None:
    """The reference tries everything."""
    scores = torch.randn(7, 3, dtype=F64)
    got, wanted = (ops.balanced_assignment(scores, backend=b) for b in ("torch", "reference"))
    assert float(scores.gather(1, got[:, None]).sum()) == pytest.approx(float(scores.gather(1, wanted[:, None]).sum()))


def test_compiled_function_takes_several_token_counts() -> None:
    """fullgraph, no data-dependent break."""

    def function(x: Tensor, w: Tensor, logits: Tensor) -> Tensor:
        indices = ops.topk(logits, 2)
        rows = ops.sort_by_expert(ops.Selection.fixed(indices, logits.gather(1, indices), 4))
        return ops.expert_up(x, w, rows).sum(0)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for n in (5, 8, 13):
        x, w, logits = torch.randn(n, 3), torch.randn(4, 3, 2), torch.randn(n, 4)
        torch.testing.assert_close(compiled(x, w, logits), function(x, w, logits))


def test_backend_is_chosen_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """By argument, by environment variable; what cannot run raises."""
    assert ops.explain_backend(torch.device("cpu"), dtype=torch.float16)[0] == "torch"
    with pytest.raises(UserError, match="did you mean 'torch'"):
        ops.weighted_rows(torch.ones(2, 2), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1), backend="torhc")
    monkeypatch.setenv("SPARSEFFN_BACKEND", "reference")
    assert ops.explain_backend(torch.device("cpu")) == ("reference", "asked for by SPARSEFFN_BACKEND")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ops.topk(torch.ones(3), 4), "`k` must be between 1 and the number of entries 3; got 4"),
        (lambda: ops.product_key_topk(torch.ones(1, 2), torch.ones(1, 2), 5), "between 1 and n_a n_b = 4; got 5"),
        (lambda: ops.cvmm(torch.ones(3, 2), torch.zeros(2, dtype=torch.int64), torch.ones(1, 2, 2)), "one index a row"),
        (lambda: ops.balanced_assignment(torch.full((3, 2), torch.nan)), "must be finite"),
    ],
    ids=["topk", "product-keys", "cvmm", "assignment"],
)
def test_bad_input_is_refused(call: Callable[[], object], words: str) -> None:
    """Expected and got are named."""
    with pytest.raises(ValueError, match=words):
        call()
