"""What PyTorch's FLOP counter says of each operation: its products, and twice as much for their gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, flop_registry

# Registers the formulas.
import sparseffn.accounting  # noqa: F401
from sparseffn import ops

T, D, E, G, K, INNER = 7, 12, 5, 6, 2, 3

# These multiply no matrices: they rank, scale, assign, gather and count.
WITHOUT_PRODUCTS = {
    *("topk", "choose", "product_key_topk", "sinkhorn", "balanced_assignment", "over_capacity"),
    *("routing_counts", "batch_entropy", "switch_balance", "load_variation"),
}


def leaf(*sizes: int) -> Tensor:
    return torch.randn(*sizes, requires_grad=True)


def experts(**options) -> Tensor:
    indices = torch.randn(T, E).topk(K).indices
    return ops.experts(leaf(T, D), leaf(E, D, G), leaf(E, G, D), leaf(T, K), indices, **options)


CASES: dict[str, tuple[Callable[[], Tensor], int]] = {
    "experts": (experts, 2 * T * K * 2 * D * G),
    "experts-gated": (lambda: experts(gate_keys=leaf(E, D, G), value_bias=leaf(E, D)), 2 * T * K * 3 * D * G),
    "experts-inner-top-k": (lambda: experts(inner_k=INNER), 2 * T * (K * G + INNER) * D),
    "route": (lambda: ops.route(leaf(T, D), leaf(E, D), k=K, gate="softmax")[2], 2 * T * E * D),
    "router_logits": (lambda: ops.router_logits(leaf(T, D), leaf(E, D)), 2 * T * E * D),
    "cvmm": (lambda: ops.cvmm(leaf(T, D), torch.randint(E, (T,)), leaf(E, D, G)), 2 * T * D * G),
    "topk_rows": (lambda: ops.topk_rows(leaf(T, D), leaf(G, D), leaf(G, D), k=K)[0], 2 * T * D * (G + K)),
    "topk_rows-gated": (
        lambda: ops.topk_rows(leaf(T, D), leaf(G, D), leaf(G, D), k=K, gate_keys=leaf(G, D))[0],
        2 * T * D * (2 * G + K),
    ),
    "product_key_rows": (
        lambda: ops.product_key_rows(leaf(T, D), leaf(2, 3, D // 2), leaf(2, 4, D // 2), leaf(12, D), k=K)[0],
        2 * T * 2 * ((3 + 4) * D // 2 + K * D),
    ),
    "weighted_rows": (
        lambda: ops.weighted_rows(leaf(E, D), torch.randint(E, (T, K)), leaf(T, K)),
        2 * T * K * D,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_counted_flops_are_those_of_the_products(case: str) -> None:
    """Forward; with the backward thrice as many."""
    call, wanted = CASES[case]
    with FlopCounterMode(display=False) as counter:
        y = call()
    assert counter.get_total_flops() == wanted
    with FlopCounterMode(display=False) as counter:
        call().sum().backward()
    assert counter.get_total_flops() == 3 * wanted
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        call()
    assert counter.get_total_flops() == wanted and y.requires_grad


def test_every_operation_with_a_product_has_a_formula() -> None:
    """A new one is missed here."""
    suffixes = ("_plain", "_eager", "_kept", "_backward")
    names = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if name.startswith("sparseffn::")}
    operations = {name.partition(".")[0] for name in names if not name.endswith(suffixes)}
    counted = {name for name in operations if getattr(torch.ops.sparseffn, name) in flop_registry}
    assert operations - WITHOUT_PRODUCTS == counted >= {case.partition("-")[0] for case in CASES}
