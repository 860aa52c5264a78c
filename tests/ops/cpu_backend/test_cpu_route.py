"""The compiled router against the reference: logits, choice, gates, their gradients; and whole layers against PyTorch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from sparseffn import ops
from sparseffn.ffn import method_class
from sparseffn.ffn.sigma_moe import SigmaMoEConfig
from sparseffn.ops import reference
from sparseffn.ops.cpu import build
from sparseffn.ops.library import OPERATIONS, register_flops
from sparseffn.ops.route import GATES
from sparseffn.ops.spec import check_against_truth

pytestmark = [
    pytest.mark.skipif(build.unavailable() is not None, reason="no compiled kernels here"),
    pytest.mark.usefixtures("poison"),
]

RUN = {"cpu": torch.ops.sparseffn.route, "torch": OPERATIONS["route"].eager, "reference": reference.route}
EVERY_GATE = pytest.mark.parametrize("gate", GATES)
NAMES = ("route", "route.gates", "route.x", "route.selector")


def drawn(n_tokens: int, n_experts: int, width: int, *, hot: bool = False) -> list[Tensor]:
    """x and selector in float64. Logits have few bits: rounding must not select another expert, and ties are common."""
    x, selector = (torch.randn(n, width).mul(4).round() / 4 for n in (n_tokens, n_experts))
    if hot:
        # The first expert is everybody's first, the last nobody's.
        x[:, 0], selector[:, 0] = 1.0, torch.tensor([64.0, *[0.0] * (n_experts - 2), -64.0])
    return [x.t().contiguous().t().double(), (selector / 4).double()]


def results(
    backend: str, inputs: list[Tensor], k: int, gate: str, through: tuple[int, ...] = (0, 2), keep: Tensor | None = None
) -> list[Tensor]:
    """Logits and gates, and gradients of x and selector through both or one; indices last."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    logits, indices, gates = RUN[backend](*leaves, k, gate, keep)
    outputs = [(logits, indices, gates)[i] for i in through]
    directions = [torch.sin(torch.arange(y.numel(), dtype=y.dtype)).view(y.shape) for y in outputs]
    grads = torch.autograd.grad(outputs, leaves, directions, materialize_grads=True)
    return [logits.detach(), gates.detach(), *grads, indices]


CASES: dict[str, dict[str, Any]] = {
    "no-tokens": {"n_tokens": 0, "n_experts": 5, "k": 3, "width": 24},
    "one-token": {"n_tokens": 1, "n_experts": 5, "k": 3, "width": 24},
    "one-expert-each": {"n_tokens": 7, "n_experts": 6, "k": 1, "width": 33},
    "two-tokens": {"n_tokens": 2, "n_experts": 16, "k": 2, "width": 100},
    "every-expert": {"n_tokens": 9, "n_experts": 5, "k": 5, "width": 21},
    "one-expert": {"n_tokens": 9, "n_experts": 1, "k": 1, "width": 21},
    "hot-and-empty": {"n_tokens": 60, "n_experts": 8, "k": 2, "width": 40, "hot": True},
    "few-tokens": {"n_tokens": 127, "n_experts": 40, "k": 7, "width": 36},
    "many-tokens": {"n_tokens": 300, "n_experts": 130, "k": 20, "width": 45},
}


def hold(got: list[Tensor], plain: list[Tensor], truth: list[Tensor], dtype: torch.dtype) -> None:
    """Of logits, gates and gradients: types, and that they are near the truth; float64 to rounding."""
    for i, (name, *three) in enumerate(zip(NAMES, got, plain, truth, strict=True)):
        # Logits and gates are float32 where the layer is not.
        wide = torch.promote_types(dtype, torch.float32) if i < 2 else dtype
        assert three[0].dtype == wide
        if dtype == torch.float64:
            torch.testing.assert_close(three[0], three[2], atol=1e-12, rtol=1e-12)
        else:
            check_against_truth(name, *three, wide)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@EVERY_GATE
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_near_the_truth(case: str, gate: str, dtype: torch.dtype) -> None:
    """Every output and gradient, those of a balancing loss on logits included; float64 to rounding; ties to the lowest."""
    sizes = dict(CASES[case])
    k = sizes.pop("k")
    inputs = drawn(**sizes)
    *truth, chosen = results("reference", inputs, k, gate)
    cast = [t.to(dtype) for t in inputs]
    (*got, indices), (*plain, _) = results("cpu", cast, k, gate), results("torch", cast, k, gate)
    assert torch.equal(indices, chosen)
    hold(got, plain, truth, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@EVERY_GATE
@pytest.mark.parametrize("case", CASES)
def test_dropped_experts_are_not_chosen(case: str, gate: str, dtype: torch.dtype) -> None:
    """Where fewer than K are left, others fill the places with gates of exactly 0; tokens that keep all and none included."""
    sizes = dict(CASES[case])
    k = sizes.pop("k")
    inputs = drawn(**sizes)
    keep = torch.rand(sizes["n_experts"], sizes["n_tokens"]).t() >= 0.4
    keep[1:2], keep[3:4] = False, True
    *truth, chosen = results("reference", inputs, k, gate, keep=keep)
    cast = [t.to(dtype) for t in inputs]
    (*got, indices), (*plain, by_plain) = (results(b, cast, k, gate, keep=keep) for b in ("cpu", "torch"))
    assert torch.equal(indices, chosen) and torch.equal(by_plain, chosen)
    assert torch.equal(got[1] != 0, keep.gather(1, indices))
    hold(got, plain, truth, dtype)


@EVERY_GATE
@pytest.mark.parametrize("backend", RUN)
def test_dropped_logit_matters_to_a_softmax_over_all_experts_only(gate: str, backend: str) -> None:
    """One that is not finite or very large is not chosen, but counts there."""
    selector = torch.tensor([[1.0], [3.0], [2.0], [0.0]])
    keep = torch.tensor([[True, False, True, True]])
    for value in (torch.nan, torch.inf, 1e4):
        selector[1] = value
        _, indices, gates = RUN[backend](torch.ones(1, 1), selector, 3, gate, keep)
        assert indices.tolist() == [[2, 0, 3]]
        if gate != "softmax":
            assert gates.isfinite().all() and gates.all()
        elif value == 1e4:
            assert not gates.any()
        else:
            assert not gates.isfinite().any()


@EVERY_GATE
@pytest.mark.parametrize("backend", RUN)
def test_gradient_of_a_dropped_gate_goes_nowhere(gate: str, backend: str) -> None:
    """Whatever it is: the gate is the constant 0."""
    leaves = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    keep = torch.tensor([[True, False, False, False, False]]).expand(3, 5)
    _, indices, gates = RUN[backend](*leaves, 2, gate, keep)
    assert indices.tolist() == [[0, 1]] * 3
    for value in (torch.nan, torch.inf):
        grad = torch.tensor([[1.0, value]]).expand(3, 2)
        for got, wanted in zip(
            *(torch.autograd.grad(gates, leaves, g, retain_graph=True) for g in (grad, grad.nan_to_num(0, 0))), strict=True
        ):
            torch.testing.assert_close(got, wanted)


FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("n_tokens", [4, 200], ids=["few", "many"])
@pytest.mark.parametrize("selector_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_selector_of_another_type(dtype: torch.dtype, selector_dtype: torch.dtype, n_tokens: int) -> None:
    """Logits are float64 with x in it, else float32; of few bits they are exact."""
    x, selector = drawn(n_tokens, 6, 70)
    got = results("cpu", [x.to(dtype), selector.to(selector_dtype)], 3, "sigmoid")
    truth = results("reference", [x, selector], 3, "sigmoid")
    wide = torch.promote_types(dtype, torch.float32)
    assert [t.dtype for t in got] == [wide, wide, dtype, selector_dtype, torch.int64]
    torch.testing.assert_close(got[0].double(), truth[0], atol=0.0, rtol=0.0)
    assert torch.equal(got[4], truth[4])
    for one, wanted, of in zip(got[1:4], truth[1:4], (wide, dtype, selector_dtype), strict=True):
        near = 8 * torch.finfo(max(of, wide, key=lambda t: torch.finfo(t).eps)).eps
        torch.testing.assert_close(one.double(), wanted, atol=near * float(wanted.abs().max()), rtol=0.0)


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@pytest.mark.parametrize("n_tokens", [4, 200], ids=["few", "many"])
def test_logits_of_any_numbers_are_near_the_truth(n_tokens: int, dtype: torch.dtype) -> None:
    """Rounded in sums, which numbers of few bits are not."""
    x, selector = torch.randn(n_tokens, 333).to(dtype), torch.randn(9, 333).to(dtype)
    got, plain, truth = (results(b, t, 2, "sigmoid")[0] for b, t in (
        ("cpu", [x, selector]), ("torch", [x, selector]), ("reference", [x.double(), selector.double()])
    ))  # fmt: skip
    check_against_truth("route", got, plain, truth, torch.float32)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_token_has_the_same_logits_in_any_batch(dtype: torch.dtype) -> None:
    """Few tokens or many, by any number of threads; pairs of bfloat16, where there are instructions for them, go one way."""
    x, selector = torch.randn(300, 333).to(dtype), torch.randn(9, 333).to(dtype)
    before, found = torch.get_num_threads(), {}
    try:
        for n_threads, first, n in ((1, 0, 1), (3, 17, 64), (1, 0, 127), (2, 100, 200), (3, 40, 128), (1, 0, 300)):
            torch.set_num_threads(n_threads)
            found[first, n] = results("cpu", [x[first : first + n], selector], 2, "sigmoid")[0]
    finally:
        torch.set_num_threads(before)
    few, many = found[0, 127], found[0, 300]
    by_pairs = dtype == torch.bfloat16 and "AVX512-BF16" in (build.instruction_sets() or "")
    for (first, n), logits in found.items():
        assert torch.equal(logits, (many if n >= 128 or by_pairs else few)[first : first + n]), (first, n)


@EVERY_GATE
def test_fewer_numbers_than_a_register_holds(gate: str) -> None:
    """And none of the inputs in the order of its memory."""
    inputs = [t.t().contiguous().t() for t in drawn(5, 4, 3)]
    for dtype, near in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        pairs = zip(results("cpu", [t.to(dtype) for t in inputs], 2, gate), results("reference", inputs, 2, gate), strict=True)
        for one, wanted in pairs:
            torch.testing.assert_close(one.to(wanted.dtype), wanted, atol=near, rtol=near)


@EVERY_GATE
@pytest.mark.parametrize("through", [(0,), (2,)], ids=["logits", "gates"])
def test_gradient_through_one_output_alone(gate: str, through: tuple[int, ...]) -> None:
    """That of the other is not there, and counts as zero."""
    inputs = drawn(5, 4, 8)
    for got, wanted in zip(*(results(b, inputs, 2, gate, through) for b in ("cpu", "reference")), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-12, rtol=1e-12)


@EVERY_GATE
@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@pytest.mark.parametrize("n_tokens", [4, 200], ids=["few", "many"])
def test_non_finite_token_costs_its_own_row(gate: str, n_tokens: int, dtype: torch.dtype) -> None:
    """Its NaN is chosen first, so that its output shows it; all other rows keep their bits."""
    inputs = [t.to(dtype) for t in drawn(n_tokens, 7, 33)]
    before = results("cpu", inputs, 3, gate)
    others = torch.arange(n_tokens) != 1
    for value in (torch.nan, -torch.nan, torch.inf):
        inputs[0][1] = value
        after = results("cpu", inputs, 3, gate)
        for i in (0, 1, 2, 4):
            assert torch.equal(after[i][others], before[i][others])
        assert not after[0][1].isfinite().all() and not after[1][1].isfinite().all()
        assert int(after[4].min()) >= 0 and int(after[4].max()) < 7


@pytest.mark.parametrize("method", ["sigma-moe", "softmax-moe", "softmax-renorm-moe", "noisy-moe"])
@pytest.mark.parametrize("with_output", [True, False], ids=["with-output", "balance-alone"])
def test_layer_trains_the_same_by_pytorch(method: str, with_output: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output, balancing loss and gradients, which are there or not alike."""
    config = method_class(method).examples()[0]
    weights = {name: 0.1 for name in ("entropy_weight", "cv_weight", "switch_weight") if hasattr(config, name)}
    layer, x = config.replace(**weights).build().double().train(), torch.randn(40, config.d_model, dtype=torch.float64)
    found = []
    for backend in ("auto", "torch"):
        monkeypatch.setenv("SPARSEFFN_BACKEND", backend)
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        torch.manual_seed(1)
        y, stats = layer(leaf, return_stats=True)
        (stats.balance_loss + (y.square().sum() if with_output else 0.0)).backward()
        found.append([y.detach(), stats.counts, stats.balance_loss.detach(), leaf.grad, *(p.grad for p in layer.parameters())])
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-10, rtol=1e-10)
    # Without the output, experts have no gradient at all: an optimiser must not see one of zeros.
    if not with_output:
        assert layer.experts.keys.grad is None and layer.experts.values.grad is None


def test_checkpoint_computes_the_same_bits_again() -> None:
    """A re-entrant checkpoint runs forward without gradients: the logits of a near tie must not differ from those of later."""
    layer = SigmaMoEConfig(d_model=32, n_experts=6, expert_size=16, k=2).build()
    x = torch.randn(50, 32, requires_grad=True)
    y = layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), y)
    assert torch.equal(checkpoint(layer, x, use_reentrant=True), y)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x.detach()), y.detach())


def test_products_are_counted() -> None:
    """By `FlopCounterMode`: 2 d E of the router, 2 K G d of the keys and of the values, three times for training."""
    register_flops()
    x, selector = torch.randn(5, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    keys, values = torch.randn(4, 8, 6, requires_grad=True), torch.randn(4, 6, 8, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        _, indices, gates = ops.route(x, selector, k=2, gate="sigmoid")
        y = ops.experts(x, keys, values, gates, indices)
        forward = counter.get_total_flops()
        y.sum().backward()
    assert forward == 5 * (2 * 8 * 4 + 2 * (2 * 2 * 6 * 8))
    assert counter.get_total_flops() == 3 * forward
