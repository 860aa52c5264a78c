"""Every operation registered with `torch.library`: schema, fake tensors, autograd, and the same results when traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS

from sparseffn import ops
from sparseffn.ops.cpu import build, cpu_backend

F64 = torch.float64
LIBRARY = torch.ops.sparseffn
N_TOKENS, D_MODEL, N_EXPERTS, SIZE, K, INNER_K = 7, 3, 4, 2, 2, 3
Arguments = tuple[Any, ...]


def leaf(*shape: int, positive: bool = False) -> Tensor:
    """Unit-scale values that ask for a gradient."""
    return (torch.rand if positive else torch.randn)(*shape, dtype=F64, requires_grad=True)


def chosen() -> Tensor:
    """Experts `[T, K]`, no expert twice for a token."""
    return torch.rand(N_TOKENS, N_EXPERTS).topk(K, dim=1).indices


def rows() -> tuple[Tensor, Tensor]:
    """Tokens and offsets of the selections, sorted by expert."""
    selection = ops.sort_by_expert(ops.Selection.fixed(chosen(), torch.ones(N_TOKENS, K), N_EXPERTS))
    return selection.tokens, selection.offsets


def experts() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, keys, values, gates."""
    x, keys = leaf(N_TOKENS, D_MODEL), leaf(N_EXPERTS, D_MODEL, SIZE)
    return x, keys, leaf(N_EXPERTS, SIZE, D_MODEL), leaf(N_TOKENS, K, positive=True)


def routed_weights() -> tuple[Tensor, Tensor, Tensor]:
    """Selector, keys, values."""
    return leaf(N_EXPERTS, D_MODEL), leaf(N_EXPERTS, D_MODEL, SIZE), leaf(N_EXPERTS, SIZE, D_MODEL)


def constants(*tensors: Tensor) -> Arguments:
    """Inputs of a backward, which itself has no gradient; an output's gradient first."""
    return tuple(t.detach() for t in tensors)


def kept() -> Tensor:
    """What dropout keeps of the selected units."""
    return torch.rand(N_TOKENS, K, SIZE) >= 0.3


def expert_mlp_backward(backend: str) -> Arguments:
    """From what the forward kept."""
    inputs, keep = experts(), kept()
    y, *saved = LIBRARY.expert_mlp(*inputs, chosen(), keep, 1.5, "gelu", backend)
    return (*constants(y, *inputs, *saved), keep, 1.5, "gelu", backend)


def expert_mlp_inner_backward(backend: str) -> Arguments:
    """From the survivors that the forward kept."""
    inputs = experts()
    y, *saved = LIBRARY.expert_mlp_inner(*inputs, chosen(), kept(), 1.5, "silu", INNER_K, backend)
    return (*constants(y, *inputs, *saved), 1.5, "silu", backend)


# Operation: arguments for a backend.
CASES: dict[str, Callable[[str], Arguments]] = {
    "expert_up": lambda b: (leaf(N_TOKENS, D_MODEL), leaf(N_EXPERTS, D_MODEL, SIZE), *rows(), b),
    "expert_up_backward": lambda b: (
        *constants(leaf(N_TOKENS * K, SIZE), leaf(N_TOKENS, D_MODEL), leaf(N_EXPERTS, D_MODEL, SIZE), *rows()),
        b,
    ),
    "expert_down": lambda b: (
        *(leaf(N_TOKENS * K, SIZE), leaf(N_EXPERTS, SIZE, D_MODEL), leaf(N_TOKENS * K, positive=True)),
        *(*rows(), N_TOKENS, b),
    ),
    "expert_down_backward": lambda b: (
        *constants(leaf(N_TOKENS, D_MODEL), leaf(N_TOKENS * K, SIZE), leaf(N_EXPERTS, SIZE, D_MODEL)),
        *constants(leaf(N_TOKENS * K), *rows()),
        b,
    ),
    "expert_mlp": lambda b: (*experts(), chosen(), kept(), 1.5, "gelu", b),
    "expert_mlp_backward": expert_mlp_backward,
    "expert_mlp_inner": lambda b: (*experts(), chosen(), kept(), 1.5, "silu", INNER_K, b),
    "expert_mlp_inner_backward": expert_mlp_inner_backward,
    # Of an evaluation: it refuses what asks for a gradient.
    "routed_mlp": lambda b: (*constants(leaf(N_TOKENS, D_MODEL), *routed_weights()), K, "softmax", "gelu", b),
    "router_logits": lambda b: (leaf(N_TOKENS, D_MODEL), leaf(N_EXPERTS, D_MODEL), b),
    "weighted_rows": lambda b: (leaf(5, D_MODEL), torch.randint(5, (4, K)), leaf(4, K), b),
    "weighted_rows_backward": lambda b: (
        *constants(leaf(4, D_MODEL), leaf(5, D_MODEL), torch.randint(5, (4, K)), leaf(4, K)),
        b,
    ),
    "product_key_topk": lambda b: (leaf(4, 2, 3), leaf(4, 2, 3), 4, b),
    "sinkhorn": lambda b: (leaf(6, 3), torch.arange(6) % 4 != 0, 3, 1.0, b),
    "sinkhorn_backward": lambda b: (*constants(leaf(6, 3), leaf(6, 3), torch.arange(6) % 4 != 0), 3, 1.0, b),
    "balanced_assignment": lambda b: (leaf(6, 3).detach(), b),
    "topk": lambda b: (leaf(4, 9), 3, True, b),
    "select_columns": lambda b: (leaf(4, 6), torch.randint(6, (4, 2))),
}


def test_every_registered_operation_is_checked() -> None:
    """A new one must come with its arguments."""
    registered = {name.removeprefix("sparseffn::") for name in OPDEFS if name.startswith("sparseffn::")}
    assert registered == set(CASES)


def transposed(argument: Any) -> Any:
    """A tensor of numbers with its last two dimensions swapped in memory; anything else as it is."""
    if not isinstance(argument, Tensor) or not argument.is_floating_point() or argument.dim() < 2:
        return argument
    return argument.detach().mT.contiguous().mT.requires_grad_(argument.requires_grad)


COMPILED = build.unavailable() is None
PAIRS = [(name, "torch") for name in CASES] + [(name, "cpu") for name in CASES if COMPILED and name in cpu_backend().kernels]


# PyTorch 2.14's check of symbolic shapes looks at gradients of copies that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize(("name", "backend"), PAIRS)
def test_operations_pass_opcheck(name: str, backend: str, layout: str) -> None:
    """Shapes, strides and dtypes of the fake are the kernel's; the gradient is the same with fixed and symbolic shapes."""
    arguments = CASES[name](backend)
    if layout == "transposed":
        arguments = tuple(map(transposed, arguments))
    results = torch.library.opcheck(getattr(LIBRARY, name), arguments)
    assert set(results.values()) == {"SUCCESS"}
