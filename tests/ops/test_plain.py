"""Units, gates and the compositions that transforms use, against the equations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sparseffn.ops import reference
from sparseffn.ops.activations import ACTIVATIONS
from sparseffn.ops.plain import experts_plain, route_plain

UNITS = [(name, gated) for name in ACTIVATIONS for gated in (False, True)] + [("clamped_swiglu", True)]
IDS = [f"{name}{' gated' * gated}" for name, gated in UNITS]


def draw(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, dtype=torch.float64) * scale).requires_grad_()


def problem(gated: bool) -> dict[str, Any]:
    """A token selects one expert twice; limit 0.5 is met by many units."""
    torch.manual_seed(0)
    experts = {"keys": draw(4, 5, 3), "values": draw(4, 3, 5), "key_bias": draw(4, 3), "value_bias": draw(4, 5)}
    if gated:
        experts |= {"gate_keys": draw(4, 5, 3), "gate_bias": draw(4, 3)}
    indices = torch.tensor([[0, 1], [2, 2], [3, 0], [1, 3], [0, 2], [3, 1]])
    return {"x": draw(6, 5), "gates": draw(6, 2), "indices": indices, "limit": 0.5, **experts}


@pytest.mark.parametrize(("name", "gated"), UNITS, ids=IDS)
@pytest.mark.parametrize("inner_k", [None, 4], ids=["all", "inner_k"])
def test_composition_is_the_equation(name: str, gated: bool, inner_k: int | None) -> None:
    """Values and all gradients, biases and dropout included."""
    inputs = problem(gated)
    keep = torch.rand(6, 2, 3) > 0.3
    leaves = [tensor for tensor in inputs.values() if isinstance(tensor, Tensor) and tensor.requires_grad]
    found = []
    for experts in (reference.experts, experts_plain):
        y = experts(**inputs, keep=keep, keep_scale=1.5, activation=name, inner_k=inner_k)
        found.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for wanted, got in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("gate", ["sigmoid", "softmax", "renormalised"])
def test_routing_by_composition_is_the_equation(gate: str) -> None:
    """Ties go to the lowest index, in half precision logits are float32."""
    torch.manual_seed(0)
    x, selector = torch.randn(6, 5).bfloat16(), torch.randn(4, 5).bfloat16()
    selector[2] = selector[1]
    for keep in (None, torch.rand(6, 4) >= 0.5):
        for wanted, got in zip(*(route(x, selector, 3, gate, keep) for route in (reference.route, route_plain)), strict=True):
            assert got.dtype == wanted.dtype
            torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("name", [name for name, gated in UNITS if gated])
def test_composition_differentiates_twice_and_forward(name: str) -> None:
    """Against finite differences."""
    inputs = problem(gated=True)
    x = inputs.pop("x")

    def experts(x: Tensor) -> Tensor:
        return experts_plain(x, **inputs, activation=name)

    torch.autograd.gradcheck(experts, x, check_forward_ad=True, check_batched_grad=True)
    torch.autograd.gradgradcheck(experts, x)


@pytest.mark.parametrize("experts", [reference.experts, experts_plain], ids=["equation", "composition"])
def test_non_finite_tokens_cost_their_own_rows(experts: Any) -> None:
    """And the gradients of the experts that they selected; overflow in an expert costs who selected it alone."""
    inputs = problem(gated=True)
    inputs["indices"] = torch.tensor([[0, 1], [0, 1], [2, 3], [2, 3], [1, 0], [0, 1]])
    with torch.no_grad():
        inputs["x"][2], inputs["x"][3] = torch.nan, 1e308
    y = experts(**inputs, activation="gelu")
    y.sum().backward()
    own = [True, True, False, False, True, True]
    assert y.isfinite().all(dim=1).tolist() == own
    assert inputs["x"].grad.isfinite().all(dim=1).tolist() == own
    for name in ("keys", "values", "gate_keys"):
        assert inputs[name].grad.isfinite().flatten(1).all(dim=1).tolist() == [True, True, False, False]
