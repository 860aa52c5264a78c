"""What else holds of the backend, checked where Triton interprets its kernels; each function raises if it does not."""

from __future__ import annotations

import os
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from sparseffn import ops
from sparseffn.errors import UserError
from sparseffn.ffn.pkm import PKMConfig
from sparseffn.ffn.sigma_moe import SigmaMoEConfig
from sparseffn.ops import _checks
from sparseffn.ops.backends import unregister_backend

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


def bad_rows_are_refused() -> None:
    """Before a kernel reads beyond a table: an index that is too high, negative, of no expert; a gate that is NaN."""
    values, words = torch.ones(7, 5), "`indices` must be between 0 and 6, a row of `values` each"
    for index in (7, -1):
        expect(words, lambda i=index: ops.weighted_rows(values, torch.full((2, 3), i), torch.ones(2, 3), backend="triton"))
    x, up, down, gates = inputs()
    rows = routing()
    short = ops.ExpertRows(rows.order, rows.tokens, rows.offsets - 1, rows.n_tokens)
    expect("`rows` must be sorted by expert", lambda: ops.expert_up(x, up, short, backend="triton"))
    expect("`gates` must be finite", lambda: ops.expert_down(torch.ones(40, 9), down, gates / 0, rows, backend="triton"))


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
    """Also inside the registered operations, whose bodies a mode does not see by itself."""

    seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "is_nonzero", "equal", "_to_copy.cpu")
        assert not func.__name__.startswith(waits), f"{func} makes the host wait for the device"
        if func.namespace != "sparseffn":
            return func(*args, **(kwargs or {}))
        self.seen += 1
        with self:
            return OPDEFS[func._name.partition(".")[0]]._init_fn(*args, **(kwargs or {}))


def refusal_of_waiting_sees_inside_operations() -> None:
    """The torch backend's expert products read the offsets back, which must not go unseen."""
    x, up, *_ = inputs()
    try:
        with _RefuseWaiting(), torch.no_grad():
            ops.expert_up(x, up, routing(), backend="torch")
    except AssertionError as error:
        assert "makes the host wait" in str(error)
    else:
        raise AssertionError("a read of the offsets was not seen")


def device_is_not_waited_for() -> None:
    """No operation that reads a value back, forward and backward; looks at indices and gates are left to the device."""
    rows, leaves = routing(), inputs()
    with mock.patch.object(_checks, "_is_on_host", lambda tensor: False), _RefuseWaiting() as mode:
        y = layer(*leaves, rows)
        torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert mode.seen == 6


def layers_do_not_wait() -> None:
    """Whole sigma-MoE and PKM layers, forward and backward; PyTorch computes what the backend lacks, as on a GPU."""
    configs = (SigmaMoEConfig(d_model=12, n_experts=4, expert_size=9, k=2), PKMConfig(d_model=12, n_subkeys=5, k=3, n_heads=2))
    cpu = next(backend for backend in ops.list_backends() if backend.name == "cpu")
    unregister_backend("cpu")
    try:
        for config in configs:
            block, leaf = config.build(), torch.randn(2, 11, 12).requires_grad_()
            with mock.patch.dict(os.environ, {"SPARSEFFN_BACKEND": "triton"}):
                # What is counted on the host once, such as the pairs of ranks of PKM, is kept from here on.
                block(leaf)
                with mock.patch.object(_checks, "_is_on_host", lambda tensor: False), _RefuseWaiting() as mode:
                    y = block(leaf)
                    torch.autograd.grad(y, [leaf, *block.parameters()], torch.ones_like(y))
            assert mode.seen >= 3
    finally:
        ops.register_backend(cpu, first=True)


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
