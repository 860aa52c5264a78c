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
from sparseffn.ops.experts import experts_eager
from sparseffn.ops.route import GATES

F64 = torch.float64


def chosen(n_tokens: int, n_experts: int, k: int, kind: str) -> Tensor:
    """int64 `[T, K]`: random, or one hot expert."""
    indices = torch.rand(n_tokens, n_experts).topk(k, dim=1).indices
    return indices * 0 + torch.arange(k) if kind == "hot" else indices


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
        (3, 9, 1, "random"),
        (0, 3, 2, "random"),
    ],
    ids=["one", "odd", "all-experts", "hot", "empty-experts", "no-tokens"],
)


@CASES
@pytest.mark.parametrize("inner_k", [None, 4], ids=["all", "inner-top-k"])
def test_experts_equal_the_reference(n_tokens: int, n_experts: int, k: int, kind: str, inner_k: int | None) -> None:
    """Gated and biased, with empty experts and non-contiguous input."""
    indices = chosen(n_tokens, n_experts, k, kind)

    def experts(x, keys, values, gates, gate_keys, key_bias, gate_bias, value_bias, backend):
        gated = {"gate_keys": gate_keys, "key_bias": key_bias, "gate_bias": gate_bias, "value_bias": value_bias}
        options = {"activation": "silu", "inner_k": inner_k, "backend": backend}
        return ops.experts(x, keys, values, gates, indices, **gated, **options)

    keys, values = (torch.randn(n_experts, *sides, dtype=F64) for sides in ((6, 4), (4, 6)))
    biases = [torch.randn(n_experts, width, dtype=F64) for width in (4, 4, 6)]
    x, gates = torch.randn(6, n_tokens, dtype=F64).t(), torch.rand(n_tokens, k, dtype=F64)
    agree(experts, x, keys, values, gates, torch.randn_like(keys), *biases)


@CASES
@pytest.mark.parametrize("gate", ["sigmoid", "softmax", "renormalised"])
def test_routes_equal_the_reference(n_tokens: int, n_experts: int, k: int, kind: str, gate: ops.GateName) -> None:
    """Logits and gates; the choice follows from both."""
    x, selector = torch.randn(6, n_tokens, dtype=F64).t(), torch.randn(n_experts, 6, dtype=F64)
    if kind == "hot":
        x[:, 0], selector[:, 0] = 1.0, torch.arange(n_experts) * 9.0
    for keep in (None, torch.rand(n_tokens, n_experts) >= 0.5):
        options = {"k": k, "gate": gate, "keep": keep}
        for output in (0, 2):
            agree(lambda x, s, backend, i=output, o=options: ops.route(x, s, **o, backend=backend)[i], x, selector)
        found = [ops.route(x, selector, **options, backend=b)[1] for b in ("torch", "reference")]
        assert torch.equal(*found)


@CASES
@pytest.mark.parametrize("gate", ["sigmoid", "softmax", "renormalised"])
def test_choices_equal_the_reference(n_tokens: int, n_experts: int, k: int, kind: str, gate: ops.GateName) -> None:
    """With dropped experts, other ranks, and noise of learned size, from halves of one product."""
    both = torch.randn(n_tokens, 2 * n_experts, dtype=F64)
    if kind == "hot":
        both += torch.arange(2 * n_experts) % n_experts * 9.0
    drawn = torch.randn(n_tokens, n_experts, dtype=F64)
    for noisy in (False, True):
        options = {"noise": drawn} if noisy else {"ranks": drawn}
        for keep in (None, torch.rand(n_tokens, n_experts) >= 0.5):

            def choose(both, backend, output=0, options=options, keep=keep, noisy=noisy):
                logits, spread = both.chunk(2, dim=1)
                of_noise = {"spread": spread} if noisy else {}
                return ops.choose(logits, k=k, gate=gate, keep=keep, **options, **of_noise, backend=backend)[output]

            agree(choose, both)
            assert torch.equal(*(choose(both, b, output=1) for b in ("torch", "reference")))


@CASES
def test_capacities_equal_the_reference(n_tokens: int, n_experts: int, k: int, kind: str) -> None:
    """Whole and broken numbers of places, none and enough of them, missing selections and padding."""
    indices = chosen(n_tokens, n_experts, k, kind)
    weights = torch.rand(n_tokens, k) * (torch.rand(n_tokens, k) > 0.3)
    for mask in (None, torch.rand(n_tokens) > 0.3):
        for factor in (0.0, 0.5, 1.0, 1.15, 1.25, 1e30):
            options = {"n_experts": n_experts, "factor": factor, "mask": mask}
            found = [ops.over_capacity(indices, weights, **options, backend=b) for b in ("auto", "torch", "reference")]
            assert torch.equal(*found[:2]) and torch.equal(*found[1:])


def test_capacity_counts_whole_places() -> None:
    """A share of 1 / 49 of 49 tokens is one place, which 49 * (1 / 49) in floating point is not."""
    indices = torch.arange(49)[:, None]
    assert not ops.over_capacity(indices, torch.ones(49, 1), n_experts=49, factor=1.0).any()
    mask = torch.arange(98) < 49
    indices, weights = torch.cat((indices, indices)), mask[:, None].float()
    assert not ops.over_capacity(indices, weights, n_experts=49, factor=1.0, mask=mask).any()


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_capacity_is_a_double(backend: str) -> None:
    """1.15 x 100 / 5 is a little less than 23, but not in float32: the 23rd finds no place, with padding and without."""
    indices, weights = torch.zeros(100, 1, dtype=torch.int64), torch.ones(100, 1)
    for mask in (None, torch.ones(100, dtype=torch.bool)):
        over = ops.over_capacity(indices, weights, n_experts=5, factor=1.15, mask=mask, backend=backend)
        assert int((~over).sum()) == 22


def test_unwritten_output_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs of `new_empty` filled with NaN leave no trace: every entry is written."""
    plain = Tensor.new_empty

    def poisoned(self: Tensor, *args: object, **kwargs: object) -> Tensor:
        made = plain(self, *args, **kwargs)  # type: ignore[arg-type]
        return made.fill_(torch.nan) if made.is_floating_point() and made.device.type != "meta" else made

    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    test_experts_equal_the_reference(30, 9, 1, "random", None)
    test_cvmm_is_one_matrix_a_row()


def test_cvmm_is_one_matrix_a_row() -> None:
    """Equation 26."""
    x, sel, weight = torch.randn(9, 4), torch.tensor([2, 0, 2, 1, 1, 2, 0, 2, 2]), torch.randn(4, 4, 3)
    torch.testing.assert_close(ops.cvmm(x, sel, weight), torch.einsum("nm,nml->nl", x, weight[sel]))
    agree(lambda x, w, backend: ops.cvmm(x, sel, w, backend=backend), x.double(), weight.double())


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
    """With padding, forward and gradient; of a batch each by itself, also where one is all padding."""
    masks = torch.arange(12) % 4 != 0, torch.stack((torch.arange(12) > 7, torch.arange(12) < 8, torch.zeros(12).bool()))
    for batch, taking in (
        ((), masks[0]),
        ((), None),
        ((3,), masks[1]),
        ((3,), None),
        ((2, 3), masks[1].expand(2, 3, 12)),
        ((0,), None),
        ((2, 0), None),
    ):

        def balanced(x: Tensor, backend: str, taking: Tensor | None = taking) -> Tensor:
            return ops.sinkhorn(x, taking, released=released, backend=backend)

        agree(balanced, torch.randn(*batch, 12, 5, dtype=F64))


def test_sinkhorn_of_a_batch_is_that_of_each_in_it() -> None:
    """With its gradients and a token that is not finite."""
    x, grad, mask = torch.randn(4, 33, 8), torch.randn(4, 33, 8), torch.rand(4, 33) > 0.2
    x[2, 5, 1] = torch.nan
    leaf = x.clone().requires_grad_()
    y = ops.sinkhorn(leaf, mask)
    y.backward(grad)
    assert leaf.grad is not None
    for each in range(4):
        alone = x[each].clone().requires_grad_()
        y_alone = ops.sinkhorn(alone, mask[each])
        y_alone.backward(grad[each])
        torch.testing.assert_close(y[each], y_alone, equal_nan=True)
        torch.testing.assert_close(leaf.grad[each], alone.grad, equal_nan=True)


def test_gradients_are_those_of_finite_differences() -> None:
    """gradcheck in float64 of every differentiable operation but the two that `test_dispatcher.py` checks."""
    leaf = {"requires_grad": True, "dtype": F64}
    check = torch.autograd.gradcheck
    indices = torch.randint(5, (4, 3))
    assert check(lambda v, w: ops.weighted_rows(v, indices, w), (torch.randn(5, 2, **leaf), torch.randn(4, 3, **leaf)))
    assert check(lambda x: ops.sinkhorn(x), (torch.randn(5, 3, **leaf),))
    assert check(lambda x: ops.sinkhorn(x), (torch.randn(2, 5, 3, **leaf),))
    noise = torch.randn(6, 4, dtype=F64)
    for gate in GATES:
        noisy = {"k": 2, "gate": gate, "noise": noise, "keep": noise < 1}
        assert check(lambda x, s, o=noisy: ops.choose(x, spread=s, **o)[0], tuple(torch.randn(6, 4, **leaf) for _ in range(2)))
    halves = (torch.randn(3, 2, 4, **leaf), torch.randn(3, 2, 3, **leaf))
    assert check(lambda a, b: ops.product_key_topk(a, b, 5)[0], halves)
    assert check(lambda x, s: ops.router_logits(x, s), (torch.randn(4, 3, **leaf), torch.randn(5, 3, **leaf)))
    sel = torch.tensor([1, 0, 1, 2])
    assert check(lambda x, w: ops.cvmm(x, sel, w), (torch.randn(4, 3, **leaf), torch.randn(3, 3, 2, **leaf)))


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
    leaves = [t.requires_grad_() for t in (x, keys, values, gates)]
    with Largest() as seen:
        # Under a mode the composition of transforms would run, which has another bound.
        y = experts_eager(*leaves, indices)
        y.sum().backward()
    assert seen.entries <= max(n_experts * width * size, n_tokens * k * width) < n_tokens * n_experts * width


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_stays_near_the_truth(dtype: torch.dtype) -> None:
    """Largest error of PyTorch's experts over the largest value, against float64."""
    indices, gates = chosen(64, 6, 3, "random"), torch.rand(64, 3)
    inputs = [torch.randn(64, 32), torch.randn(6, 32, 16) / 6, torch.randn(6, 16, 32) / 4]

    def layer(cast: torch.dtype) -> Tensor:
        wide = torch.promote_types(cast, torch.float32)
        return ops.experts(*(t.to(cast) for t in inputs), gates.to(wide), indices, backend="torch")

    truth = layer(F64)
    error = (layer(dtype).double() - truth).abs().max() / truth.abs().max()
    assert float(error) < 4 * torch.finfo(dtype).eps


def test_deterministic_mode_gives_equal_bits() -> None:
    """Forward and backward twice, by PyTorch."""
    indices, gates = chosen(50, 6, 3, "random"), torch.rand(50, 3)
    torch.use_deterministic_algorithms(True)
    try:
        results = []
        for _ in range(2):
            shapes = ((50, 8), (6, 8, 4), (6, 4, 8))
            leaves = [torch.ones(shape).cumsum(0).cumsum(-1).sin().requires_grad_() for shape in shapes]
            ops.experts(*leaves, gates, indices, backend="torch").square().sum().backward()
            results.append([t.grad for t in leaves])
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


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e308])
def test_assignment_of_what_is_not_finite_is_balanced(value: float, backend: str) -> None:
    """A token that diverged takes some expert's place, like any other."""
    scores = torch.randn(9, 3, dtype=F64)
    scores[4], scores[7, 1] = value, value
    assert ops.balanced_assignment(scores, backend=backend).bincount(minlength=3).tolist() == [3, 3, 3]


def test_compiled_function_takes_several_token_counts() -> None:
    """fullgraph, no data-dependent break."""

    def function(x: Tensor, w: Tensor, logits: Tensor) -> Tensor:
        indices = ops.topk(logits, 2)
        return ops.experts(x, w, w.mT, logits.gather(1, indices), indices).sum(0)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for n in (5, 8, 13):
        x, w, logits = torch.randn(n, 3), torch.randn(4, 3, 2), torch.randn(n, 4)
        torch.testing.assert_close(compiled(x, w, logits), function(x, w, logits))


def test_backend_is_chosen_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """By argument, by environment variable; what cannot run raises."""
    assert ops.explain_backend(torch.device("cpu"), dtype=torch.complex64)[0] == "torch"
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
        (lambda: ops.balanced_assignment(torch.ones(3, 0)), "with an expert"),
    ],
    ids=["topk", "product-keys", "cvmm", "assignment"],
)
def test_bad_input_is_refused(call: Callable[[], object], words: str) -> None:
    """Expected and got are named."""
    with pytest.raises(ValueError, match=words):
        call()
