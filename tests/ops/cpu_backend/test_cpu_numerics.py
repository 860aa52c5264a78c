"""The compiled experts against the reference in float64: output and every gradient, with poisoned memory."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
from expert_cases import APART, CASES, DTYPES, LARGE, LAYOUTS, NAMES, UNITS, Case, Options, verify
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sparseffn import ops
from sparseffn.ops.cpu import build
from sparseffn.ops.experts import experts_eager

pytestmark = [
    pytest.mark.skipif(build.unavailable() is not None, reason="no compiled kernels here"),
    pytest.mark.usefixtures("poison"),
]

LOW = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
ALL = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@LOW
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_experts_are_near_the_truth(case: Case, activation: str, dtype: torch.dtype) -> None:
    """Odd sizes, empty and hot experts, one expert in two slots, K = 1 and K = N_E, nothing contiguous."""
    verify(case, dtype, Options(activation=activation))


@ALL
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", ["one-token", "decoding", "wide", "empty-experts", "no-tokens"])
def test_layouts(case: str, layout: str, dtype: torch.dtype) -> None:
    """Gated SiLU, whatever the strides."""
    verify(CASES[case], dtype, Options(layout, "silu", gated=True))


@pytest.mark.slow
@ALL
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", LARGE)
def test_layouts_of_many_rows(case: str, layout: str, dtype: torch.dtype) -> None:
    """More than one chunk of an expert."""
    verify(LARGE[case], dtype, Options(layout, "silu", gated=True))


@LOW
@pytest.mark.parametrize("layout", ["in-out", "out-in-halves"])
def test_more_rows_than_a_chunk_holds(layout: str, dtype: torch.dtype) -> None:
    """Of an expert that every token takes, gated and biased."""
    verify(LARGE["hot-chunks"], dtype, Options(layout, gated=True, biased=True))


@LOW
@pytest.mark.parametrize("layout", ["in-out", "out-in", "interleaved"])
def test_many_rows(layout: str, dtype: torch.dtype) -> None:
    """Several panels of units and of columns, each with a ragged end, and more rows than a sum of outer products packs."""
    verify(LARGE["many-rows"], dtype, Options(layout, "silu", gated=True, biased=True, dropout=True))


@ALL
@pytest.mark.parametrize("layout", APART)
def test_lines_that_push_each_other_out_of_the_cache(layout: str, dtype: torch.dtype) -> None:
    """Panels are copied."""
    verify(LARGE["apart"], dtype, Options(layout, "silu", gated=True, apart=True))


@ALL
@pytest.mark.parametrize("layout", ["in-out", "out-in"])
def test_gradients_past_the_caches(layout: str, dtype: torch.dtype) -> None:
    """Whole lines of a cache, and numbers of lower precision otherwise."""
    verify(LARGE["streamed"], dtype, Options(layout, "silu", gated=True))


@ALL
@pytest.mark.parametrize("case", ["keys-by-dots", "by-panels"])
def test_dot_products_and_panels(case: str, dtype: torch.dtype) -> None:
    """Each matrix by what its lines and the number of rows suggest."""
    verify(LARGE[case], dtype, Options("out-in", "silu", gated=True))


@pytest.mark.parametrize("layout", ["in-out", "out-in"])
def test_pieces_of_a_long_depth(layout: str) -> None:
    """By any number of threads, on which depends how many panels are summed at a time, but not their bits.

    Without instructions for bfloat16 threads may divide experts, and their gradients of x are added up in another order.
    """
    case, before, found = LARGE["deep"], torch.get_num_threads(), []
    try:
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            torch.manual_seed(0)
            verify(case, torch.bfloat16, Options(layout, "silu", gated=True))
            torch.manual_seed(0)
            found.append(case.draw(Options(layout, "silu", gated=True), torch.bfloat16).results("cpu"))
    finally:
        torch.set_num_threads(before)
    order_varies = set() if "AVX512-BF16" in (build.instruction_sets() or "") else {"x"}
    for other in found[1:]:
        assert all(torch.equal(other[name], wanted) for name, wanted in found[0].items() if name not in order_varies)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("dropout", [False, True], ids=["whole", "dropout"])
@pytest.mark.parametrize(("activation", "gated"), UNITS, ids=[f"{name}{' gated' * gated}" for name, gated in UNITS])
def test_activations(activation: str, gated: bool, dropout: bool, dtype: torch.dtype) -> None:
    """Forward and backward, with biases. Of few numbers the largest error is luck: only rounding is held there."""
    options = Options("out-in-halves" if gated else "in-out", activation, gated, biased=True, dropout=dropout)
    for case in ("odd", "decoding") if dtype == torch.float64 else ("wide",):
        verify(CASES[case], dtype, options)


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("case", ["one-token", "decoding", "odd", "hot", "wide"])
def test_inner_topk_is_near_the_truth(case: str, activation: str) -> None:
    """A third of the units survive; one survives; all survive."""
    chosen = CASES[case]
    units = chosen.k * chosen.size
    for inner_k in (1, max(1, units // 3), units):
        verify(chosen, torch.float32, Options(activation=activation, inner_k=inner_k))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_inner_topk_of_any_experts(layout: str, gated: bool) -> None:
    """With biases and dropout; in float64, where no choice is close."""
    for case in ("decoding", "odd", "hot", "one-expert-twice"):
        for dropout in (False, True):
            verify(CASES[case], torch.float64, Options(layout, "silu", gated, biased=True, dropout=dropout, inner_k=5))


@st.composite
def problems(draw: st.DrawFn) -> tuple[Case, Options, int]:
    """Sizes, options and a seed; anything goes with anything."""
    activation, gated = draw(st.sampled_from(UNITS))
    n_experts, size = draw(st.integers(1, 9)), draw(st.integers(1, 70))
    k = draw(st.integers(1, n_experts))
    routing = draw(st.sampled_from(["random", "hot", "few", "twice"]))
    case = Case(draw(st.integers(0, 90)), draw(st.integers(1, 70)), n_experts, size, k, routing)
    inner_k = draw(st.none() | st.integers(1, k * size))
    layout = draw(st.sampled_from(list(LAYOUTS)))
    return (
        case,
        Options(layout, activation, gated, draw(st.booleans()), draw(st.booleans()), inner_k),
        draw(st.integers(0, 9999)),
    )


# A bias's gradient sums the same tokens as that of its matrix, and its terms may cancel.
TERMS = {"key_bias": "keys", "gate_bias": "gate_keys", "value_bias": "values"}


def assert_agreement(case: Case, options: Options, dtype: torch.dtype, near: float) -> None:
    """Kernels and PyTorch in float64, of the numbers that the dtype holds."""
    problem = case.draw(options, dtype)
    got, wanted = problem.results("cpu"), problem.results("torch", torch.float64)
    for name, result in wanted.items():
        largest = [float(wanted[of].abs().max()) for of in (name, TERMS.get(name, name)) if wanted[of].numel()]
        atol = near * max([1.0, *largest])
        torch.testing.assert_close(got[name].double(), result, atol=atol, rtol=0.0, msg=lambda m, name=name: f"{name}: {m}")


@settings(deadline=None, max_examples=300)
@given(problems())
def test_drawn_problems_agree_in_float64(problem: tuple[Case, Options, int]) -> None:
    """Shapes, strides, routings, activations, gated, biased, dropout, inner top-K: to rounding."""
    case, options, seed = problem
    torch.manual_seed(seed)
    assert_agreement(case, options, torch.float64, 1e-11)


@settings(deadline=None, max_examples=200)
@example((Case(69, 69, 1, 1, 1), Options(activation="gelu", biased=True, dropout=True), 1), torch.float32)
@given(problems(), st.sampled_from(DTYPES[1:]))
def test_drawn_problems_agree_in_low_precision(problem: tuple[Case, Options, int], dtype: torch.dtype) -> None:
    """Roughly, for whatever the bounds of ops/spec.py do not speak of: sums of few numbers, which may cancel.

    Smooth activations: rounding moves a unit of ReLU over its edge. Float32 errs by 30 epsilons of the largest entry at most.
    """
    case, options, seed = problem
    torch.manual_seed(seed)
    activation = {"relu": "silu", "relu2": "gelu"}.get(options.activation, options.activation)
    if activation == "clamped_swiglu":
        activation = "gelu_tanh"
    options = Options(options.layout, activation, options.gated, options.biased, options.dropout)
    assert_agreement(case, options, dtype, 64 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(("n_tokens", "draws"), [(12, 8), (640, 1)], ids=["few", "many"])
def test_ragged_sums_err_no_more_than_pytorch(n_tokens: int, draws: int) -> None:
    """Terms beyond whole registers are not rounded one by one at the size of the total."""
    case = Case(n_tokens, 31, 16, 143, 8)
    ours = theirs = 0.0
    for _ in range(draws):
        problem = case.draw(Options(), torch.float32)
        truth = problem.results("reference", torch.float64)["gates"]
        ours += float((problem.results("cpu")["gates"].double() - truth).square().mean())
        theirs += float((problem.results("torch")["gates"].double() - truth).square().mean())
    # Of mean squares; 1.7 to 2.1 where the last 15 terms were added to the total.
    assert ours <= 1.15 * theirs


@pytest.mark.parametrize("layout", ["in-out", "out-in"])
def test_gradients_have_the_memory_order_of_the_weights(layout: str) -> None:
    """So that an optimizer's step reads both in the same order."""
    problem = CASES["odd"].draw(Options(layout, gated=True), torch.float32)
    got = problem.results("cpu")
    for name in ("keys", "gate_keys", "values"):
        assert got[name].stride() == problem.inputs[name].stride()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_tokens", [1, 2, 3, 9])
@pytest.mark.parametrize("width", [7, 16, 45])
def test_closed_units_change_nothing(n_tokens: int, width: int, dtype: torch.dtype) -> None:
    """Few rows of an expert skip the values of units that are zero for all of them; a whole expert may be."""
    x, keys, values = torch.randn(n_tokens, width), torch.randn(2, width, 33), torch.randn(2, 33, width)
    gates, indices = torch.rand(n_tokens, 2), torch.tensor([[0, 1]]).repeat(n_tokens, 1)
    for positive in (False, True):
        if positive:
            x, keys[0] = x.abs(), -keys[0].abs()
        inputs = [t.to(dtype) for t in (x, keys, values)]
        got = ops.experts(*inputs, gates.to(torch.promote_types(dtype, torch.float32)), indices)
        wanted = experts_eager(*(t.double() for t in inputs), gates.double(), indices)
        near = max(1e-10, 16 * torch.finfo(dtype).eps)
        torch.testing.assert_close(got.double(), wanted, atol=near * float(wanted.abs().max()), rtol=near)


@pytest.fixture
def many_threads() -> Iterator[None]:
    """Eight, on however many cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("many_threads")
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("n_tokens", [1, 3, 40, 300])
def test_threads_beyond_tokens_and_experts(n_tokens: int, gated: bool) -> None:
    """More than there is work for, and the same bits from run to run."""
    case = Case(n_tokens, 40, 3, 37, 2)
    for inner_k in (None, 7):
        options = Options("out-in", "silu", gated, biased=True, inner_k=inner_k)
        verify(case, torch.float64, options)
        problem = case.draw(options, torch.float32)
        runs = [problem.results("cpu") for _ in range(3)]
        assert all(torch.equal(run[name], result) for run in runs for name, result in runs[0].items())


@ALL
@pytest.mark.parametrize("n_tokens", [4, 200], ids=["few", "many"])
@pytest.mark.parametrize("inner_k", [None, 5], ids=["all-units", "inner-top-k"])
def test_non_finite_token_costs_its_own_row(n_tokens: int, inner_k: int | None, dtype: torch.dtype) -> None:
    """Output and gradient of x of all other rows keep their bits; so do the gradients of experts that it did not select."""
    problem = Case(n_tokens, 33, 6, 20, 2).draw(Options("out-in", "silu", True, biased=True, inner_k=inner_k), dtype)
    before = problem.results("cpu")
    others = torch.arange(n_tokens) != 2
    untouched = torch.ones(6, dtype=torch.bool)
    untouched[problem.indices[2]] = False
    for value in (torch.nan, torch.inf, torch.finfo(dtype).max):
        problem.inputs["x"][2] = value
        after = problem.results("cpu")
        for name in ("", "evaluated", "x", "gates"):
            assert torch.equal(after[name][others], before[name][others]), name
        for name in (n for n in NAMES if n in after and n not in ("x", "gates")):
            assert torch.equal(after[name][untouched], before[name][untouched]), name
        assert value == torch.finfo(dtype).max or not after[""][2].isfinite().all()


def test_threads_beyond_the_work_cost_nothing() -> None:
    """Of one token: sixty-four took 200 times as long as one while all were started."""
    x, rows = torch.randn(1, 32), torch.randn(64, 32)
    sub_keys, table = torch.randn(2, 8, 16), torch.randn(64, 32)
    indices, weights = torch.zeros(1, 4, dtype=torch.int64), torch.rand(1, 4)
    keys, values, selected = torch.randn(8, 32, 16), torch.randn(8, 16, 32), torch.arange(4)[None]
    leaves = [t.clone().requires_grad_() for t in (x, keys, values, weights)]

    def experts_and_back(inner_k: int | None = None) -> None:
        y = ops.experts(*leaves, selected, activation="silu", inner_k=inner_k)
        torch.autograd.grad(y, leaves, torch.ones_like(y))

    calls = {
        "experts": lambda: ops.experts(x, keys, values, weights, selected),
        "experts, inner_k": lambda: ops.experts(x, keys, values, weights, selected, inner_k=9),
        "experts, backward": experts_and_back,
        "experts, backward, inner_k": lambda: experts_and_back(inner_k=9),
        "topk_rows": lambda: ops.topk_rows(x, rows, rows, k=8),
        "product_key_rows": lambda: ops.product_key_rows(x, sub_keys, sub_keys, table, k=8, activation="relu"),
        "weighted_rows": lambda: ops.weighted_rows(rows, indices, weights),
        "route": lambda: ops.route(x, rows, k=4, gate="sigmoid"),
    }
    least: dict[tuple[str, int], float] = {}
    before = torch.get_num_threads()
    try:
        # In turns, so that a busy stretch of the machine meets both.
        for name, n_threads in 2 * [(name, n_threads) for name in calls for n_threads in (1, 32)]:
            torch.set_num_threads(n_threads)
            for _ in range(50):
                start = time.perf_counter()
                calls[name]()
                took = time.perf_counter() - start
                least[name, n_threads] = min(took, least.get((name, n_threads), took))
    finally:
        torch.set_num_threads(before)
    for name in calls:
        assert least[name, 32] < 4 * least[name, 1], name
