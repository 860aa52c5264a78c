"""Whatever PyTorch does to a function, done to `ops.experts` and `ops.route`: against finite differences, or a loop."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sparseffn import ops
from sparseffn.ffn.sigma_moe import SigmaMoEConfig
from sparseffn.ops.activations import ACTIVATIONS

F64 = torch.float64
UNITS = [(name, gated) for name in ACTIVATIONS for gated in (False, True)] + [("clamped_swiglu", True)]
NAMES = ("x", "keys", "values", "gates", "gate_keys", "key_bias", "gate_bias", "value_bias")
CONFIG = SigmaMoEConfig(d_model=8, n_experts=4, expert_size=6, k=2)


def drawn(gated: bool = True) -> dict[str, Tensor]:
    """Every differentiable input, small; gates apart."""
    shapes = {"x": (3, 4), "keys": (3, 4, 2), "values": (3, 2, 4), "gates": (3, 2)}
    shapes |= {"key_bias": (3, 2), "value_bias": (3, 4)}
    if gated:
        shapes |= {"gate_keys": (3, 4, 2), "gate_bias": (3, 2)}
    return {name: torch.randn(shape, dtype=F64) for name, shape in shapes.items()}


INDICES = torch.tensor([[0, 1], [2, 0], [1, 1]])
KEEP = torch.tensor([1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 1, 0], dtype=torch.bool).view(3, 2, 2)


def call(given: dict[str, Tensor], *, dropped: bool = False, activation: str = "silu", inner_k: int | None = None) -> Tensor:
    """The operation itself, which takes dropout's mask."""
    x, keys, values, gates, *rest = (given.get(name) for name in NAMES)
    keep, scale = (KEEP, 1.5) if dropped else (None, 1.0)
    return torch.ops.sparseffn.experts(x, keys, values, gates, INDICES, *rest, keep, scale, activation, 1.3, 0.8, inner_k)


def as_function(inputs: dict[str, Tensor], **options: Any) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """A function of the tensors in their order, and these as leaves."""
    leaves = tuple(t.detach().requires_grad_() for t in inputs.values())
    return lambda *tensors: call(dict(zip(inputs, tensors, strict=True)), **options), leaves


@pytest.mark.parametrize("how", ["all", "inner-top-k", "dropout"])
@pytest.mark.parametrize(("activation", "gated"), UNITS, ids=[f"{name}{' gated' * gated}" for name, gated in UNITS])
def test_derivatives_are_those_of_finite_differences(activation: str, gated: bool, how: str) -> None:
    """Backward, forward mode, batched gradients; and the second derivative."""
    options = {"activation": activation, "inner_k": 3 if how == "inner-top-k" else None, "dropped": how == "dropout"}
    function, leaves = as_function(drawn(gated), **options)
    torch.autograd.gradcheck(function, leaves, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("dropped", [False, True], ids=["all", "dropped"])
@pytest.mark.parametrize("gate", ["sigmoid", "softmax", "renormalised"])
def test_derivatives_of_a_route(gate: ops.GateName, dropped: bool) -> None:
    """Of logits and gates, at tokens whose choice is clear; of one token no expert, of another one is left."""
    keep = torch.rand(5, 6) >= 0.3 if dropped else None
    if keep is not None:
        keep[0], keep[1] = False, torch.arange(6) == 2
    leaves = (torch.randn(5, 4, dtype=F64, requires_grad=True), 3 * torch.randn(6, 4, dtype=F64))
    leaves = tuple(t.detach().requires_grad_() for t in leaves)

    def function(x: Tensor, selector: Tensor) -> tuple[Tensor, Tensor]:
        logits, _, gates = ops.route(x, selector, k=2, gate=gate, keep=keep)
        return logits, gates

    if keep is not None:
        masks = torch.stack([keep, ~keep])
        found = torch.func.vmap(lambda keep: ops.route(*leaves, k=2, gate=gate, keep=keep)[2])(masks)
        loop = torch.stack([ops.route(*leaves, k=2, gate=gate, keep=mask)[2] for mask in masks])
        torch.testing.assert_close(found, loop)
    torch.autograd.gradcheck(function, leaves, check_forward_ad=True, check_batched_grad=True)
    torch.autograd.gradgradcheck(function, leaves)


def mixture(x: Tensor, selector: Tensor, given: dict[str, Tensor]) -> Tensor:
    """Gates are computed from x, which has both paths to the output."""
    _, indices, gates = ops.route(x, selector, k=2, gate="sigmoid")
    rest = {name: t for name, t in given.items() if name not in ("x", "gates")}
    return ops.experts(x, gates=gates, indices=indices, activation="gelu", **rest)


def test_second_derivative_where_one_input_comes_from_another() -> None:
    """Of x through the experts and through its own gates: neither path is counted twice."""
    given, selector = drawn(), torch.randn(3, 4, dtype=F64)
    x = given["x"].requires_grad_()
    torch.autograd.gradgradcheck(lambda x: mixture(x, selector, given), x)
    v = torch.randn_like(x)
    _, got = torch.autograd.functional.hvp(lambda x: mixture(x, selector, given).square().sum(), x, v)
    near = 1e-5

    def slope(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(mixture(x, selector, given).square().sum(), x)[0]

    torch.testing.assert_close(got, (slope(x + near * v) - slope(x - near * v)) / (2 * near), atol=1e-6, rtol=1e-6)


def of_x(inner_k: int | None = None) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A scalar function of x, which takes any number of tokens' worth of tangents."""
    given = drawn()
    x = given.pop("x")
    return lambda x: call({"x": x, **given}, inner_k=inner_k), x


def test_transforms_of_torch_func() -> None:
    """vjp, jvp, jacrev, jacfwd and hessian agree with autograd's own, which finite differences hold."""
    function, x = of_x()
    leaf = x.clone().requires_grad_()
    jacobian = torch.autograd.functional.jacobian(function, leaf)
    v, direction = torch.randn_like(x), torch.randn_like(x)
    torch.testing.assert_close(torch.func.jacrev(function)(x), jacobian)
    torch.testing.assert_close(torch.func.jacfwd(function)(x), jacobian)
    torch.testing.assert_close(torch.func.vjp(function, x)[1](direction)[0], torch.einsum("ij,ijkl->kl", direction, jacobian))
    torch.testing.assert_close(torch.func.jvp(function, (x,), (v,))[1], torch.einsum("ijkl,kl->ij", jacobian, v))

    def scalar(x: Tensor) -> Tensor:
        return function(x).sin().sum()

    torch.testing.assert_close(torch.func.grad(scalar)(x), torch.autograd.grad(scalar(leaf), leaf)[0])
    torch.testing.assert_close(torch.func.hessian(scalar)(x), torch.autograd.functional.hessian(scalar, x))


@pytest.mark.parametrize("inner_k", [None, 3], ids=["all", "inner-top-k"])
def test_vmap_is_a_loop(inner_k: int | None) -> None:
    """Over x, over a weight, over indices; and of a gradient."""
    function, x = of_x(inner_k)
    batch = torch.randn(5, *x.shape, dtype=F64)
    torch.testing.assert_close(torch.vmap(function)(batch), torch.stack([function(one) for one in batch]))

    def scalar(x: Tensor) -> Tensor:
        return function(x).sin().sum()

    slopes = torch.vmap(torch.func.grad(scalar))(batch)
    torch.testing.assert_close(slopes, torch.stack([torch.func.grad(scalar)(one) for one in batch]))
    given = drawn()
    keys = torch.randn(5, *given["keys"].shape, dtype=F64)
    over_keys = torch.vmap(lambda k: call({**given, "keys": k}, inner_k=inner_k))(keys)
    torch.testing.assert_close(over_keys, torch.stack([call({**given, "keys": one}, inner_k=inner_k) for one in keys]))
    chosen = torch.randint(3, (5, 3, 2))
    x, keys, values, gates = (given[name] for name in NAMES[:4])
    over_indices = torch.vmap(lambda i: ops.experts(x, keys, values, gates, i))(chosen)
    torch.testing.assert_close(over_indices, torch.stack([ops.experts(x, keys, values, gates, one) for one in chosen]))


def test_rows_of_values_that_are_not_finite_cost_who_reads_them() -> None:
    """Under transforms too, where a product over all rows computes them; their weights' gradients show it."""
    values, weights = torch.randn(9, 4, dtype=F64), torch.randn(2, 6, 3, dtype=F64)
    indices = torch.randint(9, (2, 6, 3))
    hit = ((indices == 2) | (indices == 5)).any(-1)
    assert 0 < int(hit.sum()) < hit.numel()

    def rows(weights: Tensor, indices: Tensor) -> Tensor:
        return ops.weighted_rows(values, indices, weights)

    def slopes(weights: Tensor, indices: Tensor) -> Tensor:
        return torch.func.grad(lambda w: rows(w, indices).square().sum())(weights)

    before = [torch.vmap(f)(weights, indices) for f in (rows, slopes)]
    values[2, 1], values[5] = torch.nan, torch.inf
    for was, f in zip(before, (rows, slopes), strict=True):
        found = torch.vmap(f)(weights, indices)
        assert torch.equal(found[~hit], was[~hit])
        assert found[hit].isnan().any(dim=-1).all()
    assert rows(weights[0], indices[0])[~hit[0]].isfinite().all()


def test_batched_gradients_are_a_loop() -> None:
    """`is_grads_batched`."""
    function, x = of_x()
    leaf, directions = x.requires_grad_(), torch.randn(4, *x.shape, dtype=F64)
    (got,) = torch.autograd.grad(function(leaf), leaf, directions, is_grads_batched=True)
    wanted = [torch.autograd.grad(function(leaf), leaf, one)[0] for one in directions]
    torch.testing.assert_close(got, torch.stack(wanted))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_and_hooks_of_saved_tensors(reentrant: bool) -> None:
    """The bits of backward without either."""
    function, x = of_x()
    leaf = x.requires_grad_()
    (wanted,) = torch.autograd.grad(function(leaf).sum(), leaf)
    again = leaf.detach().requires_grad_()
    checkpoint(function, again, use_reentrant=reentrant).sum().backward()
    assert torch.equal(again.grad, wanted)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t.clone(), lambda t: t):
        y = function(leaf)
    (got,) = torch.autograd.grad(y.sum(), leaf)
    assert packed and torch.equal(got, wanted)


def test_changing_an_input_in_place_is_noticed() -> None:
    """As by PyTorch's own operations: backward would use the new values."""
    given = {name: t.requires_grad_() for name, t in drawn().items()}
    y = call(given)
    with torch.no_grad():
        given["values"].mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("trained", NAMES)
def test_frozen_inputs_get_no_gradient(trained: str) -> None:
    """Any one of the inputs may be trained alone, and then has the gradient it has among others."""
    given = drawn()
    function, leaves = as_function(given)
    wanted = torch.autograd.grad(function(*leaves).sum(), leaves)[list(given).index(trained)]
    leaf = given[trained].requires_grad_()
    call(given).sum().backward()
    torch.testing.assert_close(leaf.grad, wanted)
    assert all(t.grad is None for name, t in given.items() if name != trained)


def test_modes_without_gradients() -> None:
    """The same numbers; tensors of inference mode can be inputs outside of it as long as none is trained."""
    given = {name: t.requires_grad_() for name, t in drawn().items()}
    wanted = call(given).detach()
    with torch.no_grad():
        assert torch.equal(call(given), wanted) and not call(given).requires_grad
    with torch.inference_mode():
        y = call({name: t.clone() for name, t in given.items()})
        assert torch.equal(y, wanted) and y.is_inference()
        made = {name: t.clone() for name, t in given.items()}
    assert torch.equal(call(made), wanted)


def test_autocast_is_that_of_linear() -> None:
    """Float32 becomes bfloat16, float64 stays; gates and routes are float32; gradients have the parameters' dtype."""
    given = {name: t.float().requires_grad_() for name, t in drawn().items()}
    wanted = call(given).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = call(given)
        logits, _, gates = ops.route(given["x"], given["x"], k=2, gate="sigmoid")
        linear = torch.nn.functional.linear(given["x"], given["x"])
    assert y.dtype == linear.dtype == torch.bfloat16 and logits.dtype == gates.dtype == torch.float32
    torch.testing.assert_close(y.float(), wanted, atol=0.1, rtol=0.1)
    y.float().sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in given.values())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert call(drawn()).dtype == F64
        assert torch.func.grad(lambda x: call({**given, "x": x}).float().sum())(given["x"]).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.float16):
        assert call(given).dtype == torch.float16


def test_meta_tensors_have_shapes() -> None:
    """Outputs and gradients, without a number."""
    given = {name: t.to("meta").requires_grad_() for name, t in drawn().items()}
    x, keys, values, gates, *rest = (given[name] for name in NAMES)
    options = dict(zip(NAMES[4:], rest, strict=True))
    y = ops.experts(x, keys, values, gates, INDICES.to("meta"), activation="silu", **options)
    assert y.is_meta and y.shape == (3, 4)
    y.sum().backward()
    assert all(t.grad.shape == t.shape for t in given.values())
    assert [t.shape for t in ops.route(x, x, k=2, gate="softmax")] == [(3, 3), (3, 2), (3, 2)]


def test_copies_and_threads_share_nothing() -> None:
    """A copy trains alone; layers run side by side in threads of Python, forward and backward."""
    layer = CONFIG.build()
    other, x = copy.deepcopy(layer), torch.randn(20, 8)
    other(x).sum().backward()
    assert layer.experts.keys.grad is None and other.experts.keys.grad is not None

    def step(seed: int) -> list[Tensor]:
        leaf = torch.randn(20, 8, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        y = layer(leaf)
        return [y.detach(), torch.autograd.grad(y.square().sum(), leaf)[0]]

    wanted = [step(seed) for seed in range(8)]
    with ThreadPoolExecutor(max_workers=4) as pool:
        found = list(pool.map(step, [*range(8)] * 8))
    assert all(torch.equal(a, b) for i, results in enumerate(found) for a, b in zip(results, wanted[i % 8], strict=True))


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=240, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done


GRAPHS = """
import torch
from sparseffn.ffn.sigma_moe import SigmaMoEConfig
from torch._functorch.aot_autograd import aot_module_simplified, make_boxed_func

names = []
def remember(graph, inputs):
    names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
    return make_boxed_func(graph.forward)

def backend(module, inputs):
    return aot_module_simplified(module, inputs, fw_compiler=remember, bw_compiler=remember)

layer = SigmaMoEConfig(d_model=8, n_experts=4, expert_size=6, k=2).build()
torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)(torch.randn(5, 8)).sum().backward()
print(*names, sep="\\n")
"""


def test_compiled_graph_calls_the_kernels() -> None:
    """As the first thing a process does: the operations and their backwards, not what they are composed of."""
    names = python(GRAPHS).stdout.split()
    ours = {f"sparseffn.{name}.default" for name in ("route_kept", "route_backward", "experts_kept", "experts_backward")}
    assert ours <= set(names)
    assert not {"aten.sort.stable", "aten.mm.default", "aten.sort.default", "aten.topk.default"} & set(names)


def test_exported_layer_runs_in_another_process(tmp_path: Path) -> None:
    """From a file, with nothing imported but `sparseffn.ops`; its graph holds the operations."""
    layer, x = CONFIG.build().eval(), torch.randn(5, 8)
    tokens = torch.export.Dim("tokens", min=2, max=1000)
    program = torch.export.export(layer, (x,), dynamic_shapes={"x": {0: tokens}})
    targets = {str(node.target) for node in program.graph.nodes}
    assert {"sparseffn.route.default", "sparseffn.experts.default"} <= targets
    file = tmp_path / "layer.pt2"
    torch.export.save(program, file)
    torch.save(x, tmp_path / "x.pt")
    code = "import sparseffn.ops, torch, sys; folder = sys.argv[-1]; x = torch.load(folder + '/x.pt')\n"
    code += "m = torch.export.load(folder + '/layer.pt2').module(); torch.save([m(x), m(x[:3])], folder + '/y.pt')"
    python(code, str(tmp_path))
    y, fewer = torch.load(tmp_path / "y.pt")
    torch.testing.assert_close(y, layer(x))
    torch.testing.assert_close(fewer, layer(x)[:3])


WITHOUT_COMPILER = """
import functools, torch, sys
sys.path.insert(0, {folder!r})
from sparseffn.ops.cpu import build
import test_dispatcher as t

for test in (
    t.test_transforms_of_torch_func,
    functools.partial(t.test_vmap_is_a_loop, None),
    t.test_batched_gradients_are_a_loop,
    t.test_second_derivative_where_one_input_comes_from_another,
    functools.partial(t.test_derivatives_are_those_of_finite_differences, "clamped_swiglu", True, "inner-top-k"),
    functools.partial(t.test_derivatives_of_a_route, "softmax", dropped=True),
    t.test_autocast_is_that_of_linear,
    t.test_meta_tensors_have_shapes,
    t.test_modes_without_gradients,
    t.test_copies_and_threads_share_nothing,
):
    # As conftest.py does: what is near enough depends on what is drawn.
    torch.manual_seed(42)
    test()
torch.compile(t.CONFIG.build(), backend="aot_eager", fullgraph=True, dynamic=True)(torch.randn(5, 8)).sum().backward()
torch.export.export(t.CONFIG.build(), (torch.randn(5, 8),))
assert build.unavailable() is not None
"""


def test_without_a_compiler_the_composition_does_all_that(tmp_path: Path) -> None:
    """Logged once."""
    code = WITHOUT_COMPILER.format(folder=str(Path(__file__).parent))
    done = python(code, CXX="/bin/false", SPARSEFFN_CACHE=str(tmp_path))
    assert done.stderr.count("no compiled CPU kernels") == 1


HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def _selecting(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x and an output that depends on which of many near scores are selected."""
    torch.manual_seed(0)

    def drawn(*sizes: int) -> Tensor:
        return torch.randn(*sizes).div(8).to(dtype)

    x = drawn(40, 64).mul(8).requires_grad_()
    if name == "topk_rows":
        return x, ops.topk_rows(x, drawn(400, 64), drawn(400, 64), k=50, activation="gelu")[0]
    if name == "product_key_rows":
        return x, ops.product_key_rows(x, drawn(2, 20, 32), drawn(2, 20, 32), drawn(400, 64), k=16, activation="gelu")[0]
    gates, indices = torch.rand(40, 2), torch.randint(4, (40, 2))
    return x, ops.experts(x, drawn(4, 64, 100), drawn(4, 100, 64), gates, indices, inner_k=40, activation="gelu")


@HALF
@pytest.mark.parametrize("name", ["topk_rows", "product_key_rows", "experts"])
def test_gradients_to_be_differentiated_are_of_the_same_selection(name: str, dtype: torch.dtype) -> None:
    """In half precision too, where scores rounded to it would select others."""
    found = []
    for create_graph in (False, True):
        x, y = _selecting(name, dtype)
        found.append(torch.autograd.grad(y.float().square().sum(), x, create_graph=create_graph)[0].detach().double())
    apart = (found[0] - found[1]).norm() / found[0].norm()
    assert apart < 4 * torch.finfo(dtype).eps


def test_gradients_to_be_differentiated_ignore_autocast() -> None:
    """Backward under autocast differentiates what forward computed without it."""
    x = torch.randn(20, 16, requires_grad=True)
    keys, values = torch.randn(30, 16), torch.randn(30, 16)
    y = ops.topk_rows(x, keys, values, k=5, activation="gelu")[0]
    wanted = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
    with torch.autocast("cpu"):
        got = torch.autograd.grad(y.sum(), x, create_graph=True)[0]
    torch.testing.assert_close(got, wanted)
