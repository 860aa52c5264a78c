"""Every operation behind PyTorch's dispatcher: schema, fake tensors, autograd, and the same results when traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sparseffn import ops

F64 = torch.float64
LIBRARY = torch.ops.sparseffn
N_TOKENS, D_MODEL, N_EXPERTS, SIZE, K, INNER_K = 7, 3, 4, 2, 2, 3
Arguments = tuple[Any, ...]


def leaf(*shape: int, positive: bool = False) -> Tensor:
    """Unit-scale values that ask for a gradient."""
    return (torch.rand if positive else torch.randn)(*shape, dtype=F64, requires_grad=True)


def constants(*arguments: Any) -> Arguments:
    """Inputs of what itself has no gradient."""
    return tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)


def experts(*, gated: bool = False, inner_k: int | None = None, activation: str = "gelu") -> Arguments:
    """All arguments; where gated also biases, where not a mask of dropout."""
    x, keys, values = leaf(N_TOKENS, D_MODEL), leaf(N_EXPERTS, D_MODEL, SIZE), leaf(N_EXPERTS, SIZE, D_MODEL)
    indices = torch.rand(N_TOKENS, N_EXPERTS).topk(K, dim=1).indices
    rest: Arguments = (None, None, None, None, torch.rand(N_TOKENS, K, SIZE) >= 0.3, 1.5)
    if gated:
        biases = leaf(N_EXPERTS, SIZE), leaf(N_EXPERTS, SIZE), leaf(N_EXPERTS, D_MODEL)
        rest = (leaf(N_EXPERTS, D_MODEL, SIZE), *biases, None, 1.0)
    return (x, keys, values, leaf(N_TOKENS, K, positive=True), indices, *rest, activation, 1.702, 7.0, inner_k)


def experts_backward(**options: Any) -> Arguments:
    """From what the forward kept."""
    arguments = experts(**options)
    y, *kept = LIBRARY.experts_kept(*constants(*arguments))
    return constants(y, *arguments, *kept)


def route(gate: str = "softmax", *, dropout: bool = False) -> Arguments:
    """All arguments."""
    keep = torch.rand(N_TOKENS, N_EXPERTS) >= 0.4 if dropout else None
    return leaf(N_TOKENS, D_MODEL), leaf(N_EXPERTS, D_MODEL), K, gate, keep


def route_backward(gate: str = "softmax", *, through_logits: bool = True, dropout: bool = False) -> Arguments:
    """From what the forward kept."""
    arguments = route(gate, dropout=dropout)
    logits, indices, gates, shares = LIBRARY.route_kept(*constants(*arguments))
    return constants(logits if through_logits else None, gates, *arguments[:4], indices, gates, shares)


def cvmm() -> Arguments:
    """All arguments."""
    return leaf(N_TOKENS, D_MODEL), torch.randint(N_EXPERTS, (N_TOKENS,)), leaf(N_EXPERTS, D_MODEL, SIZE)


def topk_rows(*, gated: bool = False, activation: str = "gelu", dropout: bool = False) -> Arguments:
    """All arguments."""
    x, keys, values = leaf(N_TOKENS, D_MODEL), leaf(9, D_MODEL), leaf(9, D_MODEL)
    keep = torch.rand(N_TOKENS, 9) >= 0.3 if dropout else None
    gate_keys, gate_bias = (leaf(9, D_MODEL), leaf(9)) if gated else (None, None)
    biases = leaf(9), gate_bias, leaf(D_MODEL)
    return (x, keys, values, 4, gate_keys, *biases, keep, 1.5, activation, 1.702, 7.0, gated, gated)


def topk_rows_backward(**options: Any) -> Arguments:
    """From what the forward kept."""
    arguments = topk_rows(**options)
    y, *kept = LIBRARY.topk_rows_kept(*constants(*arguments))
    return constants(y, kept[1], *arguments, *kept)


def product_key_rows(activation: str = "relu") -> Arguments:
    """All arguments."""
    return leaf(N_TOKENS, 4), leaf(2, 3, 2), leaf(2, 5, 2), leaf(15, 4), 6, activation


def product_key_rows_backward(activation: str = "relu") -> Arguments:
    """From what the forward kept."""
    arguments = product_key_rows(activation)
    y, *kept = LIBRARY.product_key_rows_kept(*constants(*arguments))
    return constants(y, kept[1], *arguments, *kept)


def weighted_rows() -> Arguments:
    """All arguments."""
    return leaf(5, D_MODEL), torch.randint(5, (N_TOKENS, K)), leaf(N_TOKENS, K)


def product_key_topk() -> Arguments:
    """All arguments."""
    return leaf(4, 2, 3), leaf(4, 2, 3), 4


def product_key_topk_backward() -> Arguments:
    """From the pairs that the forward chose."""
    arguments = product_key_topk()
    sums, indices = LIBRARY.product_key_topk_kept(*constants(*arguments))
    return constants(sums, *arguments[:2], indices)


def choose(gate: str = "softmax", *, noisy: bool = False) -> Arguments:
    """All arguments: with noise, or with ranks and dropped experts."""
    logits, spread = leaf(N_TOKENS, N_EXPERTS), leaf(N_TOKENS, N_EXPERTS)
    others = constants(leaf(N_TOKENS, N_EXPERTS))
    if noisy:
        return logits, K, gate, None, None, spread, *others
    return logits, K, gate, torch.rand(N_TOKENS, N_EXPERTS) >= 0.4, *others, None, None


def choose_backward(gate: str, *, noisy: bool = False) -> Arguments:
    """From what the forward returned."""
    arguments = constants(*choose(gate, noisy=noisy))
    return constants(leaf(N_TOKENS, K), *arguments[:3], *arguments[5:], *LIBRARY.choose_kept(*arguments))


def over_capacity() -> Arguments:
    """All arguments."""
    return torch.randint(N_EXPERTS, (6, K)), leaf(6, K).detach(), N_EXPERTS, 1.2, mask()


def selections() -> tuple[Tensor, Tensor]:
    """Indices and weights of six tokens, among three experts."""
    return torch.randint(3, (6, K)), leaf(6, K).detach()


def mask() -> Tensor:
    """Tokens that take part."""
    return torch.arange(6) % 4 != 0


GATED = {"gated": True}
SWIGLU = {**GATED, "activation": "clamped_swiglu"}
INNER = {"inner_k": INNER_K, "activation": "silu"}
# Operation: arguments, one way or several.
CASES: dict[str, list[Callable[[], Arguments]]] = {
    "experts": [experts, lambda: experts(**SWIGLU), lambda: experts(**INNER), lambda: experts(**GATED, **INNER)],
    "experts_kept": [lambda o=o: constants(*experts(**o)) for o in ({}, GATED, INNER, {**GATED, **INNER})],
    "experts_backward": [lambda o=o: experts_backward(**o) for o in ({}, SWIGLU, INNER, {**GATED, **INNER})],
    "route": [lambda g=g, d=d: route(g, dropout=d) for g in ("sigmoid", "softmax", "renormalised") for d in (False, True)],
    "route_kept": [lambda g=g, d=d: constants(*route(g, dropout=d)) for g, d in (("sigmoid", False), ("softmax", True))],
    "route_backward": [
        route_backward,
        lambda: route_backward("sigmoid", through_logits=False),
        lambda: route_backward("renormalised", dropout=True),
    ],
    "choose": [lambda g=g, n=n: choose(g, noisy=n) for g in ("sigmoid", "softmax", "renormalised") for n in (False, True)],
    "choose_kept": [lambda n=n: constants(*choose(noisy=n)) for n in (False, True)],
    "choose_backward": [lambda: choose_backward("renormalised"), lambda: choose_backward("softmax", noisy=True)],
    "over_capacity": [over_capacity, lambda: over_capacity()[:4]],
    "cvmm": [cvmm],
    "cvmm_kept": [lambda: constants(*cvmm())],
    "cvmm_backward": [lambda: constants(leaf(N_TOKENS, SIZE), *cvmm())],
    "router_logits": [lambda: route()[:2]],
    "router_logits_kept": [lambda: constants(*route()[:2])],
    "router_logits_backward": [lambda: constants(leaf(N_TOKENS, N_EXPERTS), *route()[:2])],
    "sinkhorn": [
        lambda: (leaf(6, 3), mask(), 3, 1.0),
        lambda: (leaf(6, 3), None, 2, -1.0),
        lambda: (leaf(2, 6, 3), mask().expand(2, 6), 3, 1.0),
    ],
    "sinkhorn_kept": [lambda: (leaf(6, 3).detach(), mask(), 3, 1.0), lambda: (leaf(2, 6, 3).detach(), None, 3, 1.0)],
    "sinkhorn_backward": [
        lambda: (*constants(leaf(6, 3), leaf(6, 3)), mask(), 3, 1.0),
        lambda: (*constants(leaf(2, 6, 3), leaf(2, 6, 3)), None, 3, 1.0),
    ],
    "balanced_assignment": [lambda: (leaf(6, 3).detach(),)],
    "batch_entropy": [lambda: (leaf(6, 3), None, 0.5), lambda: (leaf(6, 3), mask(), 0.5)],
    "batch_entropy_kept": [lambda: (leaf(6, 3).detach(), mask(), 0.5)],
    "batch_entropy_backward": [lambda: constants(leaf(1)[0], leaf(6, 3), mask(), 0.5, leaf(3))],
    "switch_balance": [lambda: (leaf(6, 3), *selections(), None, 0.5), lambda: (leaf(6, 3), *selections(), mask(), 0.5)],
    "switch_balance_kept": [lambda: (leaf(6, 3).detach(), *selections(), mask(), 0.5)],
    "switch_balance_backward": [lambda: constants(leaf(1)[0], leaf(6, 3), mask(), 0.5, leaf(3))],
    "load_variation": [lambda: (leaf(6, 2), selections()[0], 3, 0.5)],
    "load_variation_kept": [lambda: (leaf(6, 2).detach(), selections()[0], 3, 0.5)],
    "load_variation_backward": [lambda: constants(leaf(1)[0], leaf(6, 2), selections()[0], leaf(3))],
    "routing_counts": [lambda: (torch.randint(3, (6, 2)), leaf(6, 2).detach(), 3)],
    "topk_rows": [topk_rows, lambda: topk_rows(**SWIGLU), lambda: topk_rows(activation="relu", dropout=True)],
    "topk_rows_kept": [lambda o=o: constants(*topk_rows(**o)) for o in ({}, GATED, {"activation": "relu"})],
    "topk_rows_backward": [lambda o=o: topk_rows_backward(**o) for o in ({}, SWIGLU, {"activation": "relu", "dropout": True})],
    "product_key_rows": [product_key_rows, lambda: product_key_rows("softmax")],
    "product_key_rows_kept": [lambda a=a: constants(*product_key_rows(a)) for a in ("softmax", "silu")],
    "product_key_rows_backward": [lambda a=a: product_key_rows_backward(a) for a in ("relu", "softmax", "silu")],
    "weighted_rows": [weighted_rows],
    "weighted_rows_kept": [lambda: constants(*weighted_rows())],
    "weighted_rows_backward": [lambda: constants(leaf(N_TOKENS, D_MODEL), *weighted_rows())],
    "product_key_topk": [product_key_topk],
    "product_key_topk_kept": [lambda: constants(*product_key_topk())],
    "product_key_topk_backward": [product_key_topk_backward],
    "topk": [lambda: (leaf(6, 5).detach(), 3, True)],
}
# Compositions, differentiated by PyTorch: what they compose is PyTorch's own.
COMPOSED = ("_plain", "_eager")


def registered() -> set[str]:
    """Every name of the library, but compositions."""
    names = (name for name in torch._C._dispatch_get_all_op_names() if name.startswith("sparseffn::"))
    return {name.removeprefix("sparseffn::") for name in names if not name.endswith(COMPOSED)}


def test_every_registered_operation_is_checked() -> None:
    """A new one must come with its arguments."""
    assert registered() == set(CASES)


def transposed(argument: Any) -> Any:
    """A tensor with its last two dimensions swapped in memory; anything else as it is."""
    if not isinstance(argument, Tensor) or argument.dim() < 2:
        return argument
    return argument.detach().mT.contiguous().mT.requires_grad_(argument.requires_grad)


# PyTorch 2.14's check of symbolic shapes looks at gradients of copies that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("name", CASES)
def test_operations_pass_opcheck(name: str, layout: str) -> None:
    """Shapes, strides and dtypes of the fake are the kernel's; the gradient is the same with fixed and symbolic shapes."""
    ops.topk(torch.ones(1, 1), 1)
    for draw in CASES[name]:
        arguments = draw()
        if layout == "transposed":
            arguments = tuple(map(transposed, arguments))
        results = torch.library.opcheck(getattr(LIBRARY, name), arguments)
        assert set(results.values()) == {"SUCCESS"}
