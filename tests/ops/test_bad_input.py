"""Bad input of the public operations is refused by every backend, in words; no tokens at all stay good input."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparseffn import ops
from sparseffn.errors import NonFiniteError, UserError
from sparseffn.ffn.pkm import PKMConfig
from sparseffn.ffn.topk import TopKConfig
from sparseffn.ops import _checks, _torch_kernels
from sparseffn.ops.cpu import build

X, W = torch.randn(4, 3), torch.randn(2, 3, 5)
SEL = torch.tensor([0, 1, 1, 0])
INDICES, GATES = SEL[:, None], torch.ones(4, 1)
ROWS = ops.sort_by_expert(ops.Selection.fixed(INDICES, GATES, 2))
U, V = torch.randn(4, 5), torch.randn(2, 5, 3)
SELECTOR = torch.randn(2, 3)
BACKENDS = pytest.mark.parametrize("backend", ["auto", "torch", "reference"])


def rows(**changes: object) -> ops.ExpertRows:
    """The sorted rows, by hand, with something wrong."""
    return ops.ExpertRows(
        **({"order": ROWS.order, "tokens": ROWS.tokens, "offsets": ROWS.offsets, "n_tokens": 4} | changes)  # type: ignore[arg-type]
    )


def routed(x: Tensor = X, selector: Tensor = SELECTOR, keys: Tensor = W, values: Tensor = V) -> tuple[Tensor, ...]:
    """A mixture's whole evaluation."""
    return ops.routed_mlp(x, selector, keys, values, k=1, gate="sigmoid")


REFUSED: dict[str, tuple[Callable[[str], object], str]] = {
    "cvmm-high": (lambda b: ops.cvmm(X, SEL + 1, W, backend=b), "`sel` must be between 0 and 1, a matrix of `weight` each"),
    "cvmm-low": (lambda b: ops.cvmm(X, SEL - 1, W, backend=b), "`sel` must be between 0 and 1"),
    "cvmm-float": (lambda b: ops.cvmm(X, SEL.float(), W, backend=b), "int64 in shape .* got torch.float32"),
    "cvmm-rank": (lambda b: ops.cvmm(X[0], SEL[0], W, backend=b), r"must be \[rows, 3\]"),
    "cvmm-device": (lambda b: ops.cvmm(X, SEL, W.to("meta"), backend=b), "on one device; got cpu and meta"),
    "sort-high": (lambda b: ops.sort_by_expert(ops.Selection.fixed(INDICES + 1, GATES, 2)), "between 0 and 1, a unit each"),
    "sort-float": (lambda b: ops.sort_by_expert(ops.Selection.fixed(INDICES.float(), GATES, 2)), "must be an int64 vector"),
    "up-offsets": (lambda b: ops.expert_up(X, W, rows(offsets=ROWS.offsets - 1), backend=b), "`rows` must be sorted by expert"),
    "up-order": (
        lambda b: ops.expert_up(X, W, rows(offsets=torch.tensor([0, 5, 4])), backend=b),
        "`rows` must be sorted by expert",
    ),
    "up-tokens": (lambda b: ops.expert_up(X, W, rows(tokens=ROWS.tokens + 1), backend=b), "`rows` must be sorted by expert"),
    "up-experts": (lambda b: ops.expert_up(X, W[:1], ROWS, backend=b), "sorted over the 1 experts of `weight`"),
    "up-int32": (lambda b: ops.expert_up(X, W, rows(tokens=ROWS.tokens.int()), backend=b), "must hold int64 vectors"),
    "up-length": (lambda b: ops.expert_up(X[:3], W, ROWS, backend=b), "must have the 4 rows that `rows` speak of; got 3"),
    "up-integers": (lambda b: ops.expert_up(X.long(), W.long(), ROWS, backend=b), "share a floating dtype"),
    "up-device": (lambda b: ops.expert_up(X, W.to("meta"), ROWS, backend=b), "on one device; got cpu and meta"),
    "down-short": (lambda b: ops.expert_down(U, V, torch.ones(3), ROWS, backend=b), r"`gates` must be \[4\] in float32"),
    "down-rank": (lambda b: ops.expert_down(U, V, GATES, ROWS, backend=b), r"`gates` must be \[4\] in float32"),
    "down-half": (lambda b: ops.expert_down(U, V, torch.ones(4).half(), ROWS, backend=b), "got .* in torch.float16"),
    "down-nan": (lambda b: ops.expert_down(U, V, torch.ones(4) / 0, ROWS, backend=b), "`gates` must be finite"),
    "down-rows": (lambda b: ops.expert_down(U[:3], V, torch.ones(4), ROWS, backend=b), "must have the 4 rows"),
    "down-device": (lambda b: ops.expert_down(U, V, torch.ones(4, device="meta"), ROWS, backend=b), "got cpu and meta"),
    "keys-dtypes": (lambda b: ops.product_key_topk(X, X.double(), 2, backend=b), "must share a floating dtype"),
    "keys-nan": (lambda b: ops.product_key_topk(X, X * torch.nan, 2, backend=b), "`scores` must be finite"),
    "keys-infinite": (lambda b: ops.product_key_topk(X / 0, X, 2, backend=b), "`scores` must be finite"),
    "keys-number": (lambda b: ops.product_key_topk(X[0, 0], X[0, 0], 1, backend=b), r"must be \(..., n_a\) and \(..., n_b\)"),
    "rows-nan": (lambda b: ops.weighted_rows(X, INDICES, GATES * torch.nan, backend=b), "`weights` must be finite"),
    "rows-none": (lambda b: ops.weighted_rows(X, INDICES[:, :0], GATES[:, :0], backend=b), "with k >= 1"),
    "rows-integers": (lambda b: ops.weighted_rows(X.long(), INDICES, GATES, backend=b), "must be floating; got torch.int64"),
    "rows-low": (lambda b: ops.weighted_rows(X, INDICES - 1, GATES, backend=b), "between 0 and 3, a row of `values` each"),
    "experts-low": (lambda b: ops.expert_mlp(X, W, V, GATES, INDICES - 1, backend=b), "between 0 and 1, an expert each"),
    "experts-nan": (lambda b: ops.expert_mlp(X, W, V, GATES / 0, INDICES, backend=b), "`gates` must be finite"),
    "experts-integers": (
        lambda b: ops.expert_mlp(X.long(), W.long(), V.long(), GATES, INDICES, backend=b),
        "must share a floating dtype",
    ),
    "sinkhorn-nan": (lambda b: ops.sinkhorn(X * torch.nan, backend=b), "`scores` must be finite"),
    "sinkhorn-length": (lambda b: ops.sinkhorn(X, torch.ones(3, dtype=torch.bool), backend=b), "`mask` must be bool, one a"),
    "sinkhorn-mask": (lambda b: ops.sinkhorn(X, torch.ones(4), backend=b), "`mask` must be bool, .* got torch.float32"),
    "sinkhorn-device": (lambda b: ops.sinkhorn(X, torch.ones(4, dtype=torch.bool, device="meta"), backend=b), "one device"),
    "sinkhorn-integers": (lambda b: ops.sinkhorn(SEL[:, None], backend=b), "`scores` must be floating"),
    "assignment-integers": (lambda b: ops.balanced_assignment(INDICES, backend=b), "`scores` must be floating"),
    "router-integers": (lambda b: ops.router_logits(X.long(), SELECTOR, backend=b), "must be floating; got torch.int64"),
}


@BACKENDS
@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused(name: str, backend: str) -> None:
    """In the same words whatever computes, before a kernel reads memory that is not there or leaves some unwritten."""
    call, words = REFUSED[name]
    with pytest.raises(UserError, match=words):
        call(backend)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ops.topk(torch.tensor(1.0), 1), r"must be floating, \(..., n\)"),
        (lambda: ops.topk(SEL, 1), "must be floating"),
        (lambda: ops.topk(X, 0), "between 1 and the number of entries 3; got 0"),
        (lambda: ops.select_columns(X, INDICES + 2), "between 0 and 2, a column of `x` each"),
        (lambda: ops.select_columns(X, INDICES[:3]), r"must be \[T, N\] and int64 \[T, K\]"),
        (lambda: ops.select_columns(X, INDICES.int()), "got .* torch.int32"),
        (lambda: ops.select_columns(X, INDICES.to("meta")), "on one device; got cpu and meta"),
        (lambda: ops.select_columns(X.clone().requires_grad_(), INDICES - 1), "between 0 and 2, a column of `x` each"),
        (lambda: routed(selector=SELECTOR.to("meta")), "on one device; got cpu and meta"),
        (lambda: routed(X.long(), SELECTOR.long(), W.long(), V.long()), "must share a floating dtype"),
        (lambda: routed(X.clone().requires_grad_()), "has no gradients"),
        (lambda: routed(values=V.clone().requires_grad_()), "has no gradients"),
    ],
    ids=[
        "topk-number",
        "topk-integers",
        "topk-none",
        "columns-high",
        "columns-length",
        "columns-int32",
        "columns-device",
        "columns-low",
        "routed-device",
        "routed-integers",
        "routed-gradient",
        "routed-frozen-input",
    ],
)
def test_operations_of_one_backend_refuse_bad_input(call: Callable[[], object], words: str) -> None:
    """As above, for those that differ from backend to backend in nothing that could be refused."""
    with pytest.raises(UserError, match=words):
        call()


@BACKENDS
def test_no_tokens_are_good_input(backend: str) -> None:
    """Every operation that has a token dimension."""
    x, none, gates = X[:0], INDICES[:0], GATES[:0]
    empty = ops.sort_by_expert(ops.Selection.fixed(none, gates, 2))
    assert ops.expert_up(x, W, empty, backend=backend).shape == (0, 5)
    assert ops.expert_down(U[:0], V, gates[:, 0], empty, backend=backend).shape == (0, 3)
    assert ops.cvmm(x, SEL[:0], W, backend=backend).shape == (0, 5)
    assert ops.weighted_rows(X, none, gates, backend=backend).shape == (0, 3)
    assert ops.expert_mlp(x, W, V, gates, none, backend=backend).shape == (0, 3)
    assert ops.product_key_topk(x, x, 2, backend=backend)[1].shape == (0, 2)
    assert ops.sinkhorn(x, backend=backend).shape == (0, 3)
    assert ops.select_columns(x, none).shape == (0, 1)
    assert ops.topk(x, 2).shape == (0, 2)
    assert routed(x)[0].shape == (0, 3)


@pytest.mark.parametrize(
    "config", [PKMConfig(d_model=8, n_subkeys=4, k=3, n_heads=2), TopKConfig(d_model=8, d_ff=16, k=4)], ids=["pkm", "topk"]
)
@pytest.mark.parametrize("training", [True, False])
def test_diverged_layers_say_so(config: PKMConfig | TopKConfig, training: bool) -> None:
    """With the error that a trainer tells from wrong use."""
    with pytest.raises(NonFiniteError, match="must be finite"):
        config.build().train(training)(torch.full((3, 8), torch.nan))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: _checks.check_rows(INDICES + 3, 4), "`indices` must be between 0 and 3"),
        (lambda: _checks.check_routing(GATES, INDICES - 1, 2), "an expert each"),
        (lambda: _checks.check_routing(GATES * torch.nan, INDICES, 2), "`gates` must be finite"),
        (lambda: _checks.check_expert_rows(ROWS.tokens, ROWS.offsets + 1, 4), "`rows` must be sorted"),
    ],
    ids=["rows", "experts", "gates", "sorted"],
)
def test_device_looks_by_itself(call: Callable[[], object], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the host must not wait, the device gets what to stop at, in the same words."""
    monkeypatch.setattr(_checks, "_is_on_host", lambda tensor: False)
    with pytest.raises(RuntimeError, match=words):
        call()


def test_compiled_products_refuse_bad_indices() -> None:
    """The look at the numbers is part of the operation, so that it needs no break in the graph."""
    compiled = torch.compile(lambda x, sel, weight: ops.cvmm(x, sel, weight), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X, SEL, W), ops.cvmm(X, SEL, W))
    with pytest.raises(UserError, match="`rows` must be sorted by expert"):
        compiled(X, SEL + 1, W)


def test_whole_evaluation_is_registered() -> None:
    """It compiles in one graph, has a shape for fake tensors, and passes PyTorch's own checks."""
    compiled = torch.compile(routed, backend="aot_eager", fullgraph=True)
    for got, wanted in zip(compiled(X, SELECTOR, W, V), routed(), strict=True):
        torch.testing.assert_close(got, wanted)
    shapes = [tuple(t.shape) for t in routed(*(t.to("meta") for t in (X, SELECTOR, W, V)))]
    assert shapes == [(4, 3), (4, 1), (4, 1)]
    arguments = (X, SELECTOR, W, V, 1, "sigmoid", "relu", "auto")
    assert set(torch.library.opcheck(torch.ops.sparseffn.routed_mlp, arguments).values()) == {"SUCCESS"}


def test_rank_pairs_are_counted_once_and_are_those_of_the_product() -> None:
    """(i + 1)(j + 1) <= K, row by row; kept tensors can be used outside the mode they were made in."""
    with torch.inference_mode():
        pair_b, pair_a = _torch_kernels._rank_pairs(5, 4, 7, torch.device("cpu"))
    ranks = torch.arange(1, 5)[:, None] * torch.arange(1, 6) <= 7
    assert torch.equal(torch.stack((pair_b, pair_a), 1), ranks.nonzero())
    assert not pair_a.is_inference()
    assert _torch_kernels._rank_pairs(5, 4, 7, torch.device("cpu"))[0] is pair_b


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
