"""What else holds of the backend, checked where Triton interprets its kernels; each function raises if it does not."""

from __future__ import annotations

import os
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sparseffn import ops
from sparseffn.errors import UserError
from sparseffn.ffn.pkm import PKMConfig
from sparseffn.ffn.sigma_moe import SigmaMoEConfig

CPU = torch.device("cpu")


def routing(n_tokens: int = 20) -> ops.ExpertRows:
    """Two of four experts for every token."""
    generator = torch.Generator().manual_seed(0)
    indices = torch.rand(n_tokens, 4, generator=generator).topk(2, dim=1).indices
    return ops.sort_by_expert(ops.Selection.fixed(indices, torch.ones(n_tokens, 2), 4))


def layer(x: Tensor, up: Tensor, down: Tensor, gates: Tensor, rows: ops.ExpertRows) -> Tensor:
    """A small mixture of experts and a weighted sum of rows."""
    a = ops.expert_up(x, up, rows, backend="triton").relu()
    y = ops.expert_down(a, down, gates, rows, backend="triton")
    return ops.weighted_rows(y, rows.order.remainder(5).view(-1, 2), gates.view(-1, 2), backend="triton")


def inputs() -> list[Tensor]:
    """x, both expert tensors and the gates."""
    generator = torch.Generator().manual_seed(1)
    sizes = ((20, 12), (4, 12, 9), (4, 9, 12), (40,))
    return [torch.randn(*size, generator=generator).requires_grad_() for size in sizes]


def expect(words: str, call: Any) -> None:
    """The call must raise a UserError that says so."""
    try:
        call()
    except UserError as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"nothing was raised; expected: {words}")


def float64_is_refused() -> None:
    """In the rows, by the backend; in the gates, by the launcher. Both name the remedy."""
    x, up, down, gates = inputs()
    words = "computes in float32, bfloat16 and float16, not in torch.float64; fix: use backend 'auto'"
    expect(words, lambda: ops.expert_up(x.double(), up.double(), routing(), backend="triton"))
    a, words = (
        torch.ones(40, 9),
        "`gates` must be float32, bfloat16 or float16 for backend 'triton'; got torch.float64; fix: cast",
    )
    expect(words, lambda: ops.expert_down(a, down, gates.double(), routing(), backend="triton"))


def cpu_is_never_automatic() -> None:
    """Interpreted kernels only run when asked for."""
    assert ops.explain_backend(CPU)[0] != "triton"
    triton = next(backend for backend in ops.list_backends() if backend.name == "triton")
    assert triton.unavailable(CPU, torch.float32) is None and not triton.automatic


def missing_operation_is_refused() -> None:
    """By name, where the backend itself can run."""
    expect("backend 'triton' has no 'sinkhorn'", lambda: ops.sinkhorn(torch.randn(4, 2), backend="triton"))


def nothing_selected_gives_zeros() -> None:
    """K = 0 of weighted rows: output and both gradients."""
    values, weights = torch.randn(7, 5).requires_grad_(), torch.ones(3, 0).requires_grad_()
    y = ops.weighted_rows(values, torch.ones(3, 0, dtype=torch.int64), weights, backend="triton")
    grads = torch.autograd.grad(y, (values, weights), torch.ones_like(y))
    assert not y.any() and y.shape == (3, 5)
    assert not grads[0].any() and grads[1].shape == (3, 0)


def layers_agree_with_torch() -> None:
    """Whole layers, the backend chosen by environment variable; operations that it lacks are computed by another."""
    configs = (SigmaMoEConfig(d_model=12, n_experts=4, expert_size=9, k=2), PKMConfig(d_model=12, n_subkeys=5, k=3, n_heads=2))
    for config in configs:
        torch.manual_seed(0)
        block, found = config.build(), []
        x = torch.randn(2, 11, 12)
        for backend in ("torch", "triton"):
            with mock.patch.dict(os.environ, {"SPARSEFFN_BACKEND": backend}):
                leaf = x.clone().requires_grad_()
                y = block(leaf)
                found.append([y, *torch.autograd.grad(y.square().sum(), [leaf, *block.parameters()])])
        for got, wanted in zip(*found, strict=True):
            torch.testing.assert_close(got, wanted)


class _RefuseWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "is_nonzero", "equal", "_to_copy.cpu")
        assert not func.__name__.startswith(waits), f"{func} makes the host wait for the device"
        return func(*args, **(kwargs or {}))


def device_is_not_waited_for() -> None:
    """No operation that reads a value back, forward and backward."""
    rows, leaves = routing(), inputs()
    with _RefuseWaiting():
        y = layer(*leaves, rows)
        torch.autograd.grad(y, leaves, torch.ones_like(y))


def results_have_equal_bits() -> None:
    """Output and gradients of two runs."""
    rows, runs = routing(), []
    for _ in range(2):
        leaves = inputs()
        y = layer(*leaves, rows)
        runs.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def whole_graph_compiles() -> None:
    """fullgraph, with gradients, for two token counts."""
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    _, up, down, _ = inputs()
    for n_tokens in (20, 7):
        rows, x, gates = routing(n_tokens), torch.ones(n_tokens, 12).cumsum(0).sin(), torch.ones(2 * n_tokens)
        grads = []
        for function in (layer, compiled):
            leaves = [leaf.detach().requires_grad_() for leaf in (x, up, down, gates)]
            grads.append(torch.autograd.grad(function(*leaves, rows).square().sum(), leaves))
        for got, wanted in zip(*grads, strict=True):
            torch.testing.assert_close(got, wanted)
