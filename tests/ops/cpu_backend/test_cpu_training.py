"""Router and experts of few tokens in one differentiable call: its numbers, its gradients, and where it must not be taken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from sparseffn import ops
from sparseffn.errors import NonFiniteError, UserError
from sparseffn.ffn import method_class
from sparseffn.ffn.sigma_moe import SigmaMoE, SigmaMoEConfig
from sparseffn.ops.cpu import build
from sparseffn.ops.spec import check_against_truth

pytestmark = [
    pytest.mark.skipif(build.unavailable() is not None, reason="no compiled kernels here"),
    pytest.mark.usefixtures("poison"),
]

NAMES = (
    *("routed_mlp", "router_logits", "routed_mlp.gates"),
    *(f"routed_training.{name}" for name in ("x", "selector", "keys", "values")),
)
GATES = pytest.mark.parametrize("gate", ["sigmoid", "renormalised"])


def routed(
    gate: ops.GateName, inputs: Sequence[Tensor], k: int, *, activation: str = "gelu", fused: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, logits and gates, in one call or in steps."""
    x, selector, keys, values = inputs
    if fused:
        y, logits, _, gates = ops.routed_training(*inputs, k=k, gate=gate, activation=activation)
        return y, logits, gates
    logits = x @ selector.T
    indices = ops.topk(logits, k, backend="torch")
    chosen = logits.gather(1, indices)
    gates = chosen.sigmoid() if gate == "sigmoid" else chosen.softmax(dim=1)
    return ops.expert_mlp(x, keys, values, gates, indices, activation=activation, backend="torch"), logits, gates


def results(inputs: list[Tensor], directions: list[Tensor], gate: ops.GateName, k: int, **options: Any) -> list[Tensor]:
    """Output, logits and gates, and gradients of x, selector, keys and values through all three."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    outputs = routed(gate, leaves, k, **options)
    return [*(t.detach() for t in outputs), *torch.autograd.grad(outputs, leaves, directions)]


def drawn(
    n_tokens: int, n_experts: int, k: int, width: int, size: int, *, hot: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs in float64, and directions of the outputs. Logits have few bits: rounding must not select another expert."""
    x, selector = (torch.randn(n, width).mul(4).round() / 4 for n in (n_tokens, n_experts))
    if hot:
        # The first expert is everybody's first, the last nobody's.
        x[:, 0], selector[:, 0] = 1.0, torch.tensor([64.0, *[0.0] * (n_experts - 2), -64.0])
    keys, values = torch.randn(n_experts, width, size) / width**0.5, torch.randn(n_experts, size, width) / (size * k) ** 0.5
    directions = [torch.randn(n_tokens, n, dtype=torch.float64) for n in (width, n_experts, k)]
    return [t.double() for t in (x, selector / 4, keys, values)], directions


CASES: dict[str, dict[str, Any]] = {
    "one-token": {"n_tokens": 1, "n_experts": 5, "k": 3, "width": 24, "size": 10},
    "one-expert-each": {"n_tokens": 7, "n_experts": 6, "k": 1, "width": 33, "size": 10},
    "two-tokens": {"n_tokens": 2, "n_experts": 16, "k": 2, "width": 100, "size": 10},
    "every-expert": {"n_tokens": 9, "n_experts": 5, "k": 5, "width": 21, "size": 18},
    "hot-and-empty": {"n_tokens": 60, "n_experts": 8, "k": 2, "width": 40, "size": 17, "hot": True},
    "most-tokens": {"n_tokens": 127, "n_experts": 40, "k": 7, "width": 36, "size": 10},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "identity"])
@GATES
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_near_the_truth(case: str, gate: ops.GateName, activation: str, dtype: torch.dtype) -> None:
    """Every output and gradient, those of a balancing loss on logits and gates included; float64 to rounding."""
    sizes = CASES[case]
    inputs, directions = drawn(**sizes)
    if activation == "relu":
        # A unit that rounding opens would change its gradient.
        inputs[2] = (inputs[2] * 16).round() / 16
    options: dict[str, Any] = {"gate": gate, "k": sizes["k"], "activation": activation}
    truth = results(inputs, directions, **options, fused=False)
    cast = [t.to(dtype) for t in inputs], [t.to(dtype) for t in directions]
    got, plain = (results(*cast, **options, fused=fused) for fused in (True, False))
    for name, *three in zip(NAMES, got, plain, truth, strict=True):
        if dtype == torch.float64:
            torch.testing.assert_close(three[0], three[2], atol=1e-12, rtol=1e-12)
        else:
            check_against_truth(name, *three, dtype)


@GATES
def test_fewer_numbers_than_a_register_holds(gate: ops.GateName) -> None:
    """And none of the inputs or directions in the order of its memory."""
    inputs, directions = drawn(5, 4, 2, 3, 2)
    transposed = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in inputs]
    expanded = [t[:1].expand_as(t) for t in directions]
    assert not any(t.is_contiguous() for t in (*transposed, *expanded))
    for dtype, near in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        got = results([t.to(dtype) for t in transposed], [t.to(dtype) for t in expanded], gate, 2, fused=True)
        for one, wanted in zip(got, results(inputs, expanded, gate, 2, fused=False), strict=True):
            torch.testing.assert_close(one.double(), wanted, atol=near, rtol=near)


@GATES
@pytest.mark.parametrize("outputs", [(0,), (1, 2), (0, 1, 2)], ids=["output", "balance", "both"])
def test_traced_backward_is_the_other(gate: ops.GateName, outputs: tuple[int, ...]) -> None:
    """Under a counter of FLOPs backward goes through PyTorch's operations, and is counted."""
    inputs, directions = drawn(5, 4, 2, 8, 6)
    found, counts = [], []
    for counted in (False, True):
        leaves = [t.detach().requires_grad_() for t in inputs]
        made = routed(gate, leaves, 2, fused=True)
        chosen = [made[i] for i in outputs], leaves, [directions[i] for i in outputs]
        with FlopCounterMode(display=False) as counter:
            if counted:
                found.append(torch.autograd.grad(*chosen, allow_unused=True))
        if not counted:
            found.append(torch.autograd.grad(*chosen, allow_unused=True))
        counts.append(counter.get_total_flops())
    assert counts[0] == 0 < counts[1]
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-12, rtol=1e-12)
    # Without the output, experts have no gradient at all: an optimiser must not see one of zeros.
    assert [g is None for g in found[0]] == [False, False, 0 not in outputs, 0 not in outputs]


CONFIG = SigmaMoEConfig(d_model=32, n_experts=6, expert_size=16, k=2)


def is_fused(layer: SigmaMoE, x: Tensor) -> bool:
    """Whether the layer's output came from the one call."""
    # The output is kept: before PyTorch 2.13 a node of Python is no longer there without it.
    y = layer(x)
    names, todo = set(), [y.grad_fn]
    while todo:
        node = todo.pop()
        names.add(type(node).__name__)
        todo += [following for following, _ in node.next_functions if following is not None]
    return "_RoutedBackward" in names


@pytest.mark.parametrize("method", ["sigma-moe", "softmax-renorm-moe"])
@pytest.mark.parametrize("with_output", [True, False], ids=["with-output", "balance-alone"])
def test_layer_trains_the_same_either_way(method: str, with_output: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output, balancing loss and gradients, which are there or not alike."""
    config = method_class(method).examples()[0].replace(entropy_weight=0.1, cv_weight=0.1, switch_weight=0.1)
    layer, x = config.build().double().train(), torch.randn(40, config.d_model, dtype=torch.float64)
    found, ways = [], []
    for backend in ("auto", "torch"):
        monkeypatch.setenv("SPARSEFFN_BACKEND", backend)
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        ways.append(is_fused(layer, leaf))
        y, stats = layer(leaf, return_stats=True)
        (stats.balance_loss + (y.square().sum() if with_output else 0.0)).backward()
        found.append([y.detach(), stats.counts, stats.balance_loss.detach(), leaf.grad, *(p.grad for p in layer.parameters())])
    assert ways == [True, False]
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-10, rtol=1e-10)


def test_what_more_is_asked_goes_in_steps() -> None:
    """Dropout, frozen weights, many tokens, half precision, autocast, and a router that has another `forward`."""
    x = torch.randn(5, 32)
    assert is_fused(CONFIG.build(), x)
    assert not is_fused(CONFIG.replace(dropout=0.1).build(), x)
    assert not is_fused(CONFIG.replace(expert_dropout=0.1).build(), x)
    assert not is_fused(CONFIG.replace(inner_k=3).build(), x)
    assert not is_fused(CONFIG.build(), torch.randn(128, 32))
    assert not is_fused(CONFIG.build().bfloat16(), x.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not is_fused(CONFIG.build(), x)
    for name in ("router.selector", "experts.keys", "experts.values"):
        layer = CONFIG.build()
        layer.get_parameter(name).requires_grad_(False)
        assert not is_fused(layer, x)
    layer = CONFIG.build()
    layer.router.forward = layer.router.forward
    assert not is_fused(layer, x)
    # A router in training drops experts, whatever the layer around it does.
    layer = CONFIG.replace(expert_dropout=0.1).build().eval()
    assert is_fused(layer, x)
    layer.router.train()
    assert not is_fused(layer, x)


def test_checkpoint_computes_the_same_bits_again() -> None:
    """A re-entrant checkpoint runs forward without gradients: the logits of a near tie must not differ from those of later."""
    layer, x = CONFIG.build(), torch.randn(50, 32, requires_grad=True)
    y = layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), y)
    assert torch.equal(checkpoint(layer, x, use_reentrant=True), y)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x.detach()), y.detach())


def test_second_derivative_is_refused() -> None:
    """As that of the operations it stands for."""
    inputs, _ = drawn(3, 4, 2, 8, 6)
    leaves = [t.requires_grad_() for t in inputs]
    y, *_ = routed("sigmoid", leaves, 2, fused=True)
    (grad,) = torch.autograd.grad(y.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gate": "softmax"}, "gates sigmoid or renormalised"),
        ({"gate": "none"}, "unknown gate"),
        ({"k": 5}, "`k` must be between 1 and"),
        ({"k": 0}, "`k` must be between 1 and"),
        ({"activation": "tanh"}, "unknown activation"),
        ({"x": torch.randn(3, 7)}, "must be"),
        ({"x": torch.randn(128, 8)}, "takes 1 to 127 tokens"),
        ({"x": torch.randn(0, 8)}, "takes 1 to 127 tokens"),
        ({"x": torch.randn(3, 8, dtype=torch.float64)}, "share a floating dtype"),
        ({"values": torch.randn(4, 6, 9)}, "`values` must be"),
        ({"keys": torch.randn(4, 8, 6)}, "weights that require gradients"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], words: str) -> None:
    """By the public function, before a kernel sees it."""
    good = {"x": torch.randn(3, 8), "selector": torch.randn(4, 8), "keys": torch.randn(4, 8, 6), "values": torch.randn(4, 6, 8)}
    trained = {name: t.requires_grad_() for name, t in good.items()}
    with pytest.raises(UserError, match=words):
        ops.routed_training(**{**trained, "k": 2, "gate": "sigmoid", **change})


def test_non_finite_gates_are_refused() -> None:
    """As `expert_mlp` does it."""
    inputs, _ = drawn(3, 4, 2, 8, 6)
    inputs[0][1, 2] = torch.nan
    with pytest.raises(NonFiniteError, match="`gates` must be finite"):
        ops.routed_training(*(t.requires_grad_() for t in inputs), k=2, gate="sigmoid")
