"""Bad input of the public operations is refused by every backend, in words; no tokens at all stay good input."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparseffn import ops
from sparseffn.errors import UserError
from sparseffn.ops.cpu import build

X, W = torch.randn(4, 3), torch.randn(2, 3, 5)
SEL = torch.tensor([0, 1, 1, 0])
CLAMPED: dict[str, Any] = {"activation": "clamped_swiglu", "limit": 0.0}
INDICES, GATES = SEL[:, None], torch.ones(4, 1)
V = torch.randn(2, 5, 3)
SELECTOR = torch.randn(2, 3)
ROWS = torch.randn(6, 3)
Q, SUB_KEYS, TABLE = torch.randn(4, 6), torch.randn(2, 5, 3), torch.randn(25, 6)
BACKENDS = pytest.mark.parametrize("backend", ["auto", "torch", "reference"])


def experts(backend: str, **changes: Any) -> Tensor:
    """A good call with something wrong."""
    given = {"x": X, "keys": W, "values": V, "gates": GATES, "indices": INDICES} | changes
    return ops.experts(**given, backend=backend)


def route(
    backend: str, x: Tensor = X, selector: Tensor = SELECTOR, k: int = 1, gate: Any = "sigmoid", keep: Any = None
) -> object:
    return ops.route(x, selector, k=k, gate=gate, keep=keep, backend=backend)


def choose(backend: str, **changes: Any) -> object:
    """A good call with something wrong."""
    given = {"logits": X, "k": 1, "gate": "sigmoid"} | changes
    return ops.choose(**given, backend=backend)


def over_capacity(backend: str, **changes: Any) -> object:
    """A good call with something wrong."""
    given = {"indices": INDICES, "weights": GATES, "n_experts": 2, "factor": 1.0} | changes
    return ops.over_capacity(**given, backend=backend)


def topk_rows(backend: str, **changes: Any) -> object:
    """A good call with something wrong."""
    given = {"x": X, "keys": ROWS, "values": ROWS, "k": 2} | changes
    return ops.topk_rows(**given, backend=backend)


def product_key_rows(backend: str, **changes: Any) -> object:
    """A good call with something wrong."""
    given = {"x": Q, "keys_a": SUB_KEYS, "keys_b": SUB_KEYS, "values": TABLE, "k": 2} | changes
    return ops.product_key_rows(**given, backend=backend)


REFUSED: dict[str, tuple[Callable[[str], object], str]] = {
    "cvmm-high": (lambda b: ops.cvmm(X, SEL + 1, W, backend=b), "`sel` must be between 0 and 1, a matrix of `weight` each"),
    "cvmm-low": (lambda b: ops.cvmm(X, SEL - 1, W, backend=b), "`sel` must be between 0 and 1"),
    "cvmm-float": (lambda b: ops.cvmm(X, SEL.float(), W, backend=b), "int64 in shape .* got torch.float32"),
    "cvmm-rank": (lambda b: ops.cvmm(X[0], SEL[0], W, backend=b), r"must be \[rows, 3\]"),
    "cvmm-device": (lambda b: ops.cvmm(X, SEL, W.to("meta"), backend=b), "on one device; got cpu and meta"),
    "keys-dtypes": (lambda b: ops.product_key_topk(X, X.double(), 2, backend=b), "must share a floating dtype"),
    "keys-number": (lambda b: ops.product_key_topk(X[0, 0], X[0, 0], 1, backend=b), r"must be \(..., n_a\) and \(..., n_b\)"),
    "rows-none": (lambda b: ops.weighted_rows(X, INDICES[:, :0], GATES[:, :0], backend=b), "with k >= 1"),
    "rows-integers": (lambda b: ops.weighted_rows(X.long(), INDICES, GATES, backend=b), "must be floating; got torch.int64"),
    "rows-low": (lambda b: ops.weighted_rows(X, INDICES - 1, GATES, backend=b), "between 0 and 3, a row of `values` each"),
    "experts-low": (lambda b: experts(b, indices=INDICES - 1), "between 0 and 1, an expert each"),
    "experts-high": (lambda b: experts(b, indices=INDICES + 1), "between 0 and 1, an expert each"),
    "experts-integers": (lambda b: experts(b, x=X.long(), keys=W.long(), values=V.long()), "must share a floating dtype"),
    "experts-int32": (lambda b: experts(b, indices=INDICES.int()), "`indices` int64; got .* torch.int32"),
    "experts-dtypes": (lambda b: experts(b, values=V.double()), "share a floating dtype"),
    "experts-rank": (lambda b: experts(b, x=X[0]), r"must be \[T, D\], \[E, D, G\] and \[E, G, D\]"),
    "experts-width": (lambda b: experts(b, keys=W[:, :2]), r"must be \[T, D\], \[E, D, G\] and \[E, G, D\]"),
    "experts-values": (lambda b: experts(b, values=V[:1]), r"must be \[T, D\], \[E, D, G\] and \[E, G, D\]"),
    "experts-none": (lambda b: experts(b, indices=INDICES[:, :0], gates=GATES[:, :0]), r"must both be \[T, K\]"),
    "experts-gates": (lambda b: experts(b, gates=GATES[:3]), r"must both be \[T, K\] with T = 4"),
    "experts-half-gates": (lambda b: experts(b, gates=GATES.half()), "`gates` must be torch.float32 .* got torch.float16"),
    "experts-device": (lambda b: experts(b, values=V.to("meta")), "on one device; got cpu and meta"),
    "experts-activation": (lambda b: experts(b, activation="swish"), "unknown activation 'swish'"),
    "experts-limit": (lambda b: experts(b, **CLAMPED, gate_keys=W), "`limit` must be above 0 .* got 0.0; fix"),
    "experts-limit-negative": (lambda b: experts(b, **CLAMPED | {"limit": -7.0}, gate_keys=W), "`limit` must be .* got -7.0"),
    "experts-limit-nan": (lambda b: experts(b, **CLAMPED | {"limit": float("nan")}, gate_keys=W), "`limit` must be .* got nan"),
    "experts-absent": (lambda b: experts(b, keys=None), "`keys` must be a tensor; got None; fix"),
    "experts-inner-tensor": (lambda b: experts(b, inner_k=SEL), "`inner_k` must be an integer or None; got a Tensor; fix"),
    "experts-gated-alone": (lambda b: experts(b, activation="clamped_swiglu"), "`gate_keys` must be given"),
    "experts-gate-bias-alone": (lambda b: experts(b, gate_bias=torch.ones(2, 5)), "`gate_keys` must be given with gate_bias"),
    "experts-gate-keys": (lambda b: experts(b, gate_keys=W[:, :, :4]), "`gate_keys` must be"),
    "experts-key-bias": (lambda b: experts(b, key_bias=torch.ones(2, 4)), "`key_bias` must be"),
    "experts-value-bias": (lambda b: experts(b, value_bias=torch.ones(2, 4)), "`value_bias` must be"),
    "experts-dropout": (lambda b: experts(b, dropout=1.0), "`dropout` must be at least 0 and below 1; got 1.0"),
    "experts-inner-none": (lambda b: experts(b, inner_k=0), "`inner_k` must be between 1 and K G = 5; got 0"),
    "experts-inner-high": (lambda b: experts(b, inner_k=6), "`inner_k` must be between 1 and K G = 5; got 6"),
    "route-none": (lambda b: route(b, k=0), "`k` must be between 1 and the number of experts 2; got 0"),
    "route-high": (lambda b: route(b, k=3), "`k` must be between 1 and the number of experts 2; got 3"),
    "route-gate": (lambda b: route(b, gate="sigmoidal"), "unknown gate 'sigmoidal'"),
    "route-keep-floats": (
        lambda b: route(b, keep=torch.ones(4, 2)),
        r"`keep` must be bool \[T, E\] = \(4, 2\); got torch.float32",
    ),
    "route-keep-shape": (lambda b: route(b, keep=torch.ones(4, 1, dtype=torch.bool)), r"got torch.bool in shape \(4, 1\)"),
    "route-keep-numbers": (lambda b: route(b, keep=torch.ones(4, 2, dtype=torch.int8)), "got torch.int8"),
    "route-keep-device": (
        lambda b: route(b, keep=torch.ones(4, 2, dtype=torch.bool, device="meta")),
        "on one device; got cpu and meta",
    ),
    "route-keep-list": (lambda b: route(b, keep=[True, False]), "`keep` must be a tensor"),
    "route-rank": (lambda b: route(b, x=X[0]), r"must be \[T, D\] and \[E, D\]"),
    "route-width": (lambda b: route(b, selector=SELECTOR[:, :2]), r"must be \[T, D\] and \[E, D\]"),
    "route-integers": (lambda b: route(b, x=X.long()), "must be floating; got torch.int64"),
    "route-device": (lambda b: route(b, selector=SELECTOR.to("meta")), "on one device; got cpu and meta"),
    "choose-rank": (
        lambda b: choose(b, logits=X[0]),
        r"`logits` must be \[T, E\] in float32 or float64; got .* in shape \(3,\)",
    ),
    "choose-half": (lambda b: choose(b, logits=X.bfloat16()), "`logits` must be .* got torch.bfloat16"),
    "choose-high": (lambda b: choose(b, k=4), "`k` must be between 1 and the number of experts 3; got 4"),
    "choose-gate": (lambda b: choose(b, gate="sigmoidal"), "unknown gate 'sigmoidal'"),
    "choose-keep": (lambda b: choose(b, keep=X), r"`keep` must be bool \[T, E\]"),
    "choose-ranks": (lambda b: choose(b, ranks=X[:, :2]), r"`ranks` must be as `logits`, torch.float32 in shape \(4, 3\)"),
    "choose-ranks-list": (lambda b: choose(b, ranks=[1.0]), "`ranks` must be a tensor"),
    "choose-noise-alone": (lambda b: choose(b, noise=X), "`spread` and `noise` must be given together"),
    "choose-spread-dtype": (
        lambda b: choose(b, spread=X.double(), noise=X),
        "`spread` must be as `logits`.* got torch.float64",
    ),
    "choose-device": (lambda b: choose(b, ranks=X.to("meta")), "on one device"),
    "capacity-shape": (lambda b: over_capacity(b, weights=GATES[:1]), r"`weights` alike .* got torch.int64 \(4, 1\), \(1, 1\)"),
    "capacity-integers": (lambda b: over_capacity(b, weights=INDICES), "`weights` must be floating"),
    "capacity-high": (lambda b: over_capacity(b, n_experts=1), "`indices` must be between 0 and 0, an expert each"),
    "capacity-negative": (lambda b: over_capacity(b, factor=-1.0), "`factor` must be a number of at least 0; got -1.0"),
    "capacity-nan": (lambda b: over_capacity(b, factor=math.nan), "`factor` must be a number of at least 0; got nan"),
    "capacity-mask": (lambda b: over_capacity(b, mask=GATES[:, 0]), "`mask` must be bool, one a token"),
    "sinkhorn-rank": (lambda b: ops.sinkhorn(X[0], backend=b), r"`scores` must be \[..., tokens, n_experts\]"),
    "sinkhorn-batch": (
        lambda b: ops.sinkhorn(X.unflatten(0, (2, 2)), torch.ones(4, dtype=torch.bool), backend=b),
        r"one a token, shape \(2, 2\); got torch.bool in shape \(4,\)",
    ),
    "sinkhorn-length": (lambda b: ops.sinkhorn(X, torch.ones(3, dtype=torch.bool), backend=b), "`mask` must be bool, one a"),
    "sinkhorn-mask": (lambda b: ops.sinkhorn(X, torch.ones(4), backend=b), "`mask` must be bool, .* got torch.float32"),
    "sinkhorn-device": (lambda b: ops.sinkhorn(X, torch.ones(4, dtype=torch.bool, device="meta"), backend=b), "one device"),
    "sinkhorn-integers": (lambda b: ops.sinkhorn(SEL[:, None], backend=b), "`scores` must be floating"),
    "assignment-integers": (lambda b: ops.balanced_assignment(INDICES, backend=b), "`scores` must be floating"),
    "router-integers": (lambda b: ops.router_logits(X.long(), SELECTOR, backend=b), "must be floating; got torch.int64"),
    "topk-number": (lambda b: ops.topk(torch.tensor(1.0), 1, backend=b), r"must be floating, \(..., n\)"),
    "topk-integers": (lambda b: ops.topk(SEL, 1, backend=b), "must be floating"),
    "topk-absent": (lambda b: ops.topk(None, 1, backend=b), "`scores` must be a tensor; got None"),
    "topk-none": (lambda b: ops.topk(X, 0, backend=b), "between 1 and the number of entries 3; got 0"),
}


# Of operations that have no backend `reference`.
REFUSED_BY_BLOCKS: dict[str, tuple[Callable[[str], object], str]] = {
    "topk-rank": (lambda b: topk_rows(b, x=X[0]), r"must be \[T, D\], \[F, D\] and \[F, D\]"),
    "topk-width": (lambda b: topk_rows(b, keys=ROWS[:, :2]), r"must be \[T, D\], \[F, D\] and \[F, D\]"),
    "topk-values": (lambda b: topk_rows(b, values=ROWS[:5]), r"must be \[T, D\], \[F, D\] and \[F, D\]"),
    "topk-none": (lambda b: topk_rows(b, k=0), "`k` must be between 1 and the number of units 6; got 0"),
    "topk-high": (lambda b: topk_rows(b, k=7), "`k` must be between 1 and the number of units 6; got 7"),
    "topk-dtypes": (lambda b: topk_rows(b, values=ROWS.double()), "must share a floating dtype"),
    "topk-integers": (lambda b: topk_rows(b, x=X.long(), keys=ROWS.long(), values=ROWS.long()), "share a floating dtype"),
    "topk-device": (lambda b: topk_rows(b, values=ROWS.to("meta")), "on one device; got cpu and meta"),
    "topk-activation": (lambda b: topk_rows(b, activation="swish"), "unknown activation 'swish'"),
    "topk-gated-alone": (lambda b: topk_rows(b, activation="clamped_swiglu"), "`gate_keys` must be given"),
    "topk-limit": (lambda b: topk_rows(b, **CLAMPED, gate_keys=ROWS), "`limit` must be above 0 .* got 0.0; fix"),
    "topk-limit-nan": (lambda b: topk_rows(b, **CLAMPED | {"limit": float("nan")}, gate_keys=ROWS), "`limit` must be"),
    "topk-bias": (lambda b: topk_rows(b, key_bias=torch.ones(5)), "`key_bias` must be"),
    "topk-value-bias": (lambda b: topk_rows(b, value_bias=torch.ones(6)), "`value_bias` must be"),
    "topk-dropout": (lambda b: topk_rows(b, dropout=1.0), "`dropout` must be at least 0 and below 1; got 1.0"),
    "topk-absent": (lambda b: topk_rows(b, keys=None, dropout=0.5), "`keys` must be a tensor; got None"),
    "reads-rank": (lambda b: product_key_rows(b, x=Q[0]), r"must be \[T, D\], \[H, A, D / 2\]"),
    "reads-odd": (lambda b: product_key_rows(b, x=Q[:, :5]), r"must be \[T, D\], \[H, A, D / 2\]"),
    "reads-heads": (lambda b: product_key_rows(b, keys_b=SUB_KEYS[:1]), r"must be \[T, D\], \[H, A, D / 2\]"),
    "reads-table": (lambda b: product_key_rows(b, values=TABLE[:24]), r"and \[A B, D\]; got"),
    "reads-none": (lambda b: product_key_rows(b, k=0), "`k` must be between 1 and the number of values 25; got 0"),
    "reads-high": (lambda b: product_key_rows(b, k=26), "`k` must be between 1 and the number of values 25; got 26"),
    "reads-dtypes": (lambda b: product_key_rows(b, values=TABLE.double()), "must share a floating dtype"),
    "reads-device": (lambda b: product_key_rows(b, values=TABLE.to("meta")), "on one device; got cpu and meta"),
    "reads-activation": (lambda b: product_key_rows(b, activation="clamped_swiglu"), "unknown activation 'clamped_swiglu'"),
    "reads-absent": (lambda b: product_key_rows(b, keys_a=None), "`keys_a` must be a tensor; got None"),
}


@BACKENDS
@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused(name: str, backend: str) -> None:
    """In the same words whatever computes, before a kernel reads memory that is not there or leaves some unwritten."""
    call, words = REFUSED[name]
    with pytest.raises(UserError, match=words):
        call(backend)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("name", REFUSED_BY_BLOCKS)
def test_bad_input_of_blocks_is_refused(name: str, backend: str) -> None:
    """The same of the two operations that choose among pairs."""
    call, words = REFUSED_BY_BLOCKS[name]
    with pytest.raises(UserError, match=words):
        call(backend)


def shared(*shape: int, dim: int) -> Tensor:
    """A leaf of size 1 in one dimension, seen everywhere along it: its elements overlap in memory."""
    sizes = [1 if d == dim else size for d, size in enumerate(shape)]
    return torch.randn(*sizes).requires_grad_()


OVERLAPPING: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "experts": (lambda b, x, w, v: experts(b, x=x, keys=w, values=v), ((4, 3), (2, 3, 5), (2, 5, 3))),
    "experts-gated": (
        lambda b, x, w, v, g: experts(b, x=x, keys=w, values=v, gate_keys=g, activation="silu"),
        ((4, 3), (2, 3, 5), (2, 5, 3), (2, 3, 5)),
    ),
    "experts-inner": (lambda b, x, w, v: experts(b, x=x, keys=w, values=v, inner_k=2), ((4, 3), (2, 3, 5), (2, 5, 3))),
    "cvmm": (lambda b, x, w: ops.cvmm(x, SEL, w, backend=b), ((4, 3), (2, 3, 5))),
    "route": (lambda b, x, s: ops.route(x, s, k=2, gate="softmax", backend=b)[0], ((4, 3), (2, 3))),
    "router_logits": (lambda b, x, s: ops.router_logits(x, s, backend=b), ((4, 3), (2, 3))),
    "weighted_rows": (lambda b, v, w: ops.weighted_rows(v, SEL.view(2, 2), w, backend=b), ((4, 3), (2, 2))),
    # All units survive: which of equal ones does is nobody's to say.
    "topk_rows": (lambda b, x, w, v: ops.topk_rows(x, w, v, k=6, backend=b)[0], ((4, 3), (6, 3), (6, 3))),
    "product_key_rows": (
        lambda b, x, w, v: ops.product_key_rows(x, w, SUB_KEYS, v, k=25, backend=b)[0],
        ((4, 6), (2, 5, 3), (25, 6)),
    ),
}


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("name", OVERLAPPING)
def test_overlapping_strides_are_good_input(name: str, backend: str, dim: int) -> None:
    """Results and gradients are those of copies, for every argument in turn."""
    call, shapes = OVERLAPPING[name]
    for i, shape in enumerate(shapes):
        arguments = [torch.randn(*sizes) for sizes in shapes]
        leaf, found = shared(*shape, dim=dim), []
        for view in (leaf.expand(shape), leaf.repeat([shape[d] if d == dim else 1 for d in range(len(shape))])):
            y = call(backend, *arguments[:i], view, *arguments[i + 1 :])
            found.append((y, *torch.autograd.grad(y, leaf, torch.linspace(-1, 1, y.numel()).view(y.shape))))
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("name", OVERLAPPING)
def test_windows_over_one_memory_are_good_input(name: str, backend: str) -> None:
    """Lines that begin one element after another: results and gradients are those of copies."""
    call, shapes = OVERLAPPING[name]
    for i, shape in enumerate(shapes):
        arguments = [torch.randn(*sizes) for sizes in shapes]
        leaf, found = torch.randn(sum(shape)).requires_grad_(), []
        view = leaf.as_strided(shape, (1,) * len(shape))
        for given in (view, view.clone()):
            y = call(backend, *arguments[:i], given, *arguments[i + 1 :])
            found.append((y, *torch.autograd.grad(y, leaf, torch.linspace(-1, 1, y.numel()).view(y.shape), retain_graph=True)))
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@BACKENDS
@pytest.mark.parametrize("n_tokens", [1, 40])
def test_more_selections_than_experts_are_good_input(n_tokens: int, backend: str) -> None:
    """An expert that a token selects twice counts twice, in the output and in every gradient."""
    generator = torch.Generator().manual_seed(0)
    x, gates = (torch.randn(n_tokens, width, generator=generator) for width in (3, 5))
    indices = torch.randint(2, (n_tokens, 5), generator=generator)
    leaves = [t.requires_grad_() for t in (x, W.clone(), V.clone(), gates)]

    def of(columns: slice) -> Tensor:
        return ops.experts(*leaves[:3], leaves[3][:, columns], indices[:, columns], activation="silu", backend=backend)

    whole, parts = of(slice(None)), sum((of(slice(i, i + 1)) for i in range(5)), torch.zeros(()))
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-5)
    found = [torch.autograd.grad(y.square().sum(), leaves) for y in (whole, parts)]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@BACKENDS
def test_no_tokens_are_good_input(backend: str) -> None:
    """Every operation that has a token dimension, with gradients."""
    x, none, gates = X[:0].requires_grad_(), INDICES[:0], GATES[:0]
    for y in (
        ops.cvmm(x, SEL[:0], W, backend=backend),
        ops.weighted_rows(X.clone().requires_grad_(), none, gates, backend=backend),
        experts(backend, x=x, gates=gates, indices=none),
        experts(backend, x=x, gates=gates, indices=none, inner_k=2),
        ops.product_key_topk(x, x, 2, backend=backend)[0],
        ops.sinkhorn(x, backend=backend),
        ops.route(x, SELECTOR, k=2, gate="softmax", backend=backend)[2],
        ops.choose(x, k=2, gate="softmax", backend=backend)[0],
    ):
        assert y.shape[0] == 0
        y.sum().backward()
    assert ops.topk(x, 2).shape == (0, 2)
    assert ops.balanced_assignment(x, backend=backend).shape == (0,)
    assert ops.over_capacity(none, gates, n_experts=2, factor=1.0, backend=backend).shape == none.shape


def test_compiled_products_refuse_bad_indices() -> None:
    """The look at the indices is part of the operation, so that it needs no break in the graph."""
    compiled = torch.compile(lambda x, sel, weight: ops.cvmm(x, sel, weight), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X, SEL, W), ops.cvmm(X, SEL, W))
    with pytest.raises(UserError, match="`sel` must be between 0 and 1"):
        compiled(X, SEL + 1, W)
    chosen = torch.compile(lambda indices: experts("auto", indices=indices), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(chosen(INDICES), experts("auto"))
    with pytest.raises((UserError, RuntimeError), match="between 0 and 1, an expert each"):
        chosen(INDICES + 1)


def test_compiler_may_be_a_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`CXX="ccache g++"`: the program is looked for, its arguments are kept; a broken one is reported."""
    program = tmp_path / "wrap"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("CXX", "wrap g++ '-O 1'")
    assert build.find_compiler() == [str(program), "g++", "-O 1"]
    monkeypatch.setenv("CXX", "g++ '")
    with pytest.raises(build.CompilerError, match="is no command"):
        build.find_compiler()


ACTIVATIONS_OF_GATED = ["silu", "clamped_swiglu"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS_OF_GATED)
@pytest.mark.parametrize(("width", "size"), [(0, 3), (4, 0), (0, 0)], ids=["no-width", "no-units", "nothing"])
def test_gated_weights_without_elements_are_good_input(width: int, size: int, activation: str, dtype: torch.dtype) -> None:
    """Biases are what is left of the block, forward and backward."""

    def leaf(*sizes: int) -> Tensor:
        return torch.randn(*sizes, dtype=dtype).requires_grad_()

    x, gates = leaf(5, width), torch.rand(5, 2, dtype=torch.promote_types(dtype, torch.float32))
    indices, value_bias = torch.tensor([[0, 3]]).expand(5, 2), leaf(4, width)
    keys, gate_keys, values = leaf(4, width, size), leaf(4, width, size), leaf(4, size, width)
    given = {"gate_keys": gate_keys, "key_bias": leaf(4, size), "gate_bias": leaf(4, size), "value_bias": value_bias}
    y = ops.experts(x, keys, values, gates, indices, activation=activation, **given)
    y.sum().backward()
    # Many rows go another way, and inference passes by what looks for empty tensors.
    many = [t.detach().repeat(40, 1) for t in (x, gates, indices)]
    with torch.inference_mode():
        assert ops.experts(many[0], keys, values, *many[1:], activation=activation, **given).shape == (200, width)
    if size == 0:
        wanted = (gates[:, :, None] * value_bias[indices]).sum(1)
        torch.testing.assert_close(y, wanted.to(dtype), atol=1e-2, rtol=1e-2)
    if size:
        rows = {"gate_keys": leaf(size, width), "key_bias": leaf(size), "gate_bias": leaf(size), "value_bias": leaf(width)}
        ops.topk_rows(x, leaf(size, width), leaf(size, width), k=1, activation=activation, **rows)[0].sum().backward()


def test_arguments_are_judged_as_autocast_makes_them() -> None:
    """Dtypes that autocast makes equal are not what is wrong."""
    with torch.autocast("cpu"), pytest.raises(UserError, match="between 0 and 1, an expert each"):
        ops.experts(X.bfloat16(), W, V, GATES, INDICES + 1)


@pytest.mark.parametrize("name", ["cvmm", "sinkhorn"])
def test_backend_without_a_kernel_is_refused(name: str) -> None:
    """What the CPU's backend lacks is computed by a composition, which is not what was asked for."""
    calls = {"cvmm": lambda: ops.cvmm(X, SEL, W, backend="cpu"), "sinkhorn": lambda: ops.sinkhorn(X, backend="cpu")}
    with pytest.raises(UserError, match=f"backend 'cpu' (has no '{name}'|cannot run)"):
        calls[name]()
