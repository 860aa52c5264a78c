"""Gradients that nobody waits for are not computed: of frozen weights, or beside what `autograd.grad` was asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

# Registers the formulas.
import sparseffn.accounting  # noqa: F401
from sparseffn import ops
from sparseffn.ops.cpu import build

T, D, E, G, K = 40, 12, 5, 6, 2
NEEDS_KERNELS = pytest.mark.skipif(build.unavailable() is not None, reason="no compiled kernels here")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def numbers(*sizes: int) -> Tensor:
    return torch.randn(*sizes)


EXPERTS = {"keys": (E, D, G), "values": (E, G, D), "gate_keys": (E, D, G), "key_bias": (E, G), "gate_bias": (E, G)}
Inputs = dict[str, Tensor]


def experts(inner_k: int | None = None, n_tokens: int = T) -> tuple[Inputs, Callable[..., Tensor]]:
    """Gated and biased."""
    indices = torch.rand(n_tokens, E).topk(K).indices
    inputs = {"x": numbers(n_tokens, D), "gates": numbers(n_tokens, K), "value_bias": numbers(E, D)}
    inputs |= {name: numbers(*sizes) for name, sizes in EXPERTS.items()}
    return inputs, lambda **given: ops.experts(indices=indices, activation="silu", inner_k=inner_k, **given)


def topk_rows() -> tuple[Inputs, Callable[..., Tensor]]:
    """Gated and biased."""
    inputs = {"x": numbers(T, D), "keys": numbers(9, D), "values": numbers(9, D), "gate_keys": numbers(9, D)}
    inputs |= {"key_bias": numbers(9), "gate_bias": numbers(9), "value_bias": numbers(D)}
    return inputs, lambda **given: ops.topk_rows(k=4, activation="silu", **given)[0]


CASES: dict[str, Callable[[], tuple[Inputs, Callable[..., Tensor]]]] = {
    "experts": experts,
    "experts-few-tokens": lambda: experts(n_tokens=2),
    "experts-inner-top-k": lambda: experts(inner_k=5),
    "route": lambda: (
        {"x": numbers(T, D), "selector": numbers(E, D)},
        lambda **given: ops.route(k=K, gate="softmax", **given)[2],
    ),
    "route-many-tokens": lambda: (
        {"x": numbers(200, D), "selector": numbers(E, D)},
        lambda **given: ops.route(k=K, gate="sigmoid", **given)[2],
    ),
    "router_logits": lambda: ({"x": numbers(T, D), "selector": numbers(E, D)}, lambda **given: ops.router_logits(**given)),
    "cvmm": lambda: (
        {"x": numbers(T, D), "weight": numbers(E, D, G)},
        lambda **given: ops.cvmm(sel=torch.arange(T) % E, **given),
    ),
    "weighted_rows": lambda: (
        {"values": numbers(9, D), "weights": numbers(T, K)},
        lambda **given: ops.weighted_rows(indices=torch.arange(T * K).view(T, K) % 9, **given),
    ),
    "topk_rows": topk_rows,
    "product_key_rows": lambda: (
        {"x": numbers(T, D), "keys_a": numbers(2, 3, D // 2), "keys_b": numbers(2, 4, D // 2), "values": numbers(12, D)},
        lambda **given: ops.product_key_rows(k=3, **given)[0],
    ),
}


class Backwards(TorchDispatchMode):
    """What the backwards of our operations return, while it is active."""

    def __enter__(self) -> Backwards:
        self.returned: list[tuple[Tensor, ...]] = []
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "sparseffn" and func._schema.name.endswith("_backward"):
            self.returned.append(result)
        return result

    @property
    def computed(self) -> int:
        """Gradients."""
        return sum(t.numel() > 0 for results in self.returned for t in results)


@NEEDS_KERNELS
@DTYPES
@pytest.mark.parametrize("case", CASES)
def test_gradients_beside_those_wanted_are_left_out(case: str, dtype: torch.dtype) -> None:
    """Each alone, and all but each, frozen or not asked for: the bits of all together, and nothing else is computed."""
    torch.manual_seed(0)
    inputs, call = CASES[case]()
    inputs = {name: t if name == "gates" else t.to(dtype) for name, t in inputs.items()}
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    y = call(**leaves)
    direction = torch.randn_like(y)
    whole = dict(zip(leaves, torch.autograd.grad(y, tuple(leaves.values()), direction), strict=True))
    for name in leaves:
        for wanted in ([name], [other for other in leaves if other != name]):
            frozen = {n: t.detach().requires_grad_(n in wanted) for n, t in inputs.items()}
            with Backwards() as seen:
                call(**frozen).backward(direction)
                torch.autograd.grad(call(**leaves), [leaves[n] for n in wanted], direction)
            assert seen.computed == 2 * len(wanted), name
            for n, t in frozen.items():
                assert (t.grad is None) == (n not in wanted)
                assert t.grad is None or torch.equal(t.grad, whole[n]), f"{n} beside {name}"


def test_frozen_experts_cost_the_products_back_to_x() -> None:
    """As the FLOP counter sees it: a forward for x, and nothing for weights; of the values alone one product of three."""
    inputs, call = experts()
    forward = 2 * T * K * 3 * D * G
    for wanted, products in ((("x", "gates"), 3), (("values",), 1), (("keys",), 2), (("x", "values", "keys", "gate_keys"), 6)):
        given = {name: t.detach().requires_grad_(name in wanted) for name, t in inputs.items()}
        y = call(**given)
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        assert counter.get_total_flops() == forward * products // 3, wanted
