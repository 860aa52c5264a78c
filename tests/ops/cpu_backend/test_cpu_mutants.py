"""Wrong kernels, made from the right ones by one change each, must fail the comparison with the truth."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from expert_cases import CASES
from test_cpu_numerics import verify
from test_cpu_training import drawn
from test_cpu_training import results as trained

from sparseffn import ops
from sparseffn.ops.cpu import build, kernels

pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason="no compiled kernels here")

# Quick to compile; the comparison does not care for speed. Scratch memory that is handed out unwritten holds NaN.
FLAGS = [flag for flag in build.FLAGS if flag != "-O3"] + ["-O0", "-DSPARSEFFN_POISON"]

UNWRITTEN, RIGHT = "unwritten-scratch", "right"
# File, what is replaced, by what.
MUTANTS = {
    "off-by-one-tile-edge": ("product.h", "i < rows; i += Rows)", "i + Rows < rows; i += Rows)"),
    "ragged-columns-forgotten": (
        "product.h",
        "for (int c = 0; c < left; ++c) at[c]",
        "for (int c = 0; c + 1 < left; ++c) at[c]",
    ),
    "missing-dropout-mask": ("hidden.h", "keep[g] ? row[g] * scale : C(0)", "row[g] * scale"),
    "missing-mask-in-backward": ("hidden_backward.h", "(keep[g] ? p.keep_scale : C(0))", "p.keep_scale"),
    "swapped-index": (
        "hidden.h",
        "ws.inputs[i] = x + p.routing.token(rows.begin + i)",
        "ws.inputs[i] = x + p.routing.token(rows.end - 1 - i)",
    ),
    "score-applied-twice": ("hidden.h", "row[g] *= gate;", "row[g] *= gate * gate;"),
    "score-twice-in-backward": ("hidden_backward.h", "scaled[g] = gate * drop", "scaled[g] = gate * gate * drop"),
    "part-of-a-sum-lost": (
        "product.h",
        "acc[i][j] += part[i][j];\n    }\n    next.at",
        "acc[i][j] = part[i][j];\n    }\n    next.at",
    ),
    "wrong-slope": ("activations.h", "kept > C(0) ? C(1) : C(0)", "C(1)"),
    # Fresh memory is often zero, so that the numbers of this one may be right: only the poison tells.
    UNWRITTEN: (
        "experts_inner.h",
        "std::fill(sums.data() + tokens.begin * p.width,",
        "std::fill(sums.data() + tokens.begin * p.width + (tokens.begin < tokens.end),",
    ),
    # Nothing is replaced: what all others were made from, compiled as they are.
    RIGHT: ("product.h", "", ""),
}


def weighted_rows(backend: str) -> torch.Tensor:
    """Rows of a ragged width, more than are added up at once."""
    torch.manual_seed(0)
    return ops.weighted_rows(torch.randn(20, 37), torch.randint(20, (5, 11)), torch.randn(5, 11), backend=backend)


def topk_of_ties(backend: str) -> torch.Tensor:
    """The two best of equals."""
    return ops.topk(torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]]), 2, backend=backend)


def softmax_gates(backend: str) -> torch.Tensor:
    """Gates of two experts of five."""
    torch.manual_seed(0)
    x, selector, keys, values = torch.randn(4, 6), torch.randn(5, 6), torch.randn(5, 6, 3), torch.randn(5, 3, 6)
    return ops.routed_mlp(x, selector, keys, values, k=2, gate="softmax", backend=backend)[2]


def gradients_of_few(backend: str) -> torch.Tensor:
    """Output and gradients of a layer's training step of three tokens, where half of all units are closed."""
    torch.manual_seed(0)
    inputs, directions = drawn(3, 5, 2, 21, 6)
    found = trained(inputs, directions, "renormalised", 2, activation="relu", fused=backend == "cpu")
    return torch.cat([t.flatten() for t in found])


def router_logits(backend: str) -> torch.Tensor:
    """Enough tokens for the transposed selector."""
    torch.manual_seed(0)
    return ops.router_logits(torch.randn(130, 7), torch.randn(3, 7), backend=backend)


# The same for the other operations, with what is compared.
OTHERS: dict[str, tuple[str, str, str, Callable[[str], torch.Tensor]]] = {
    "weight-of-another-row": ("rows.cpp", "y[c] += weights[q] * upcast", "y[c] += weights[0] * upcast", weighted_rows),
    "ties-to-the-highest": (
        "select.h",
        "keys[i] <= keys[chosen[k - 1]]) return",
        "keys[i] < keys[chosen[k - 1]]) return",
        topk_of_ties,
    ),
    "softmax-over-the-chosen": ("router.h", "if (kind == kSoftmax)", "if (false)", softmax_gates),
    "gates-as-if-independent": (
        "router.h",
        "gates[j] * (grad_gates[j] - static_cast<C>(common))",
        "gates[j] * grad_gates[j]",
        gradients_of_few,
    ),
    "selector-without-the-last-token": (
        "router.h",
        "outer_of_few(d_rows.data(), x_rows.data(), tokens,",
        "outer_of_few(d_rows.data(), x_rows.data(), tokens - 1,",
        gradients_of_few,
    ),
    "open-unit-taken-for-closed": ("experts.h", "any |= ws.rows[i][g]", "any = ws.rows[i][g]", gradients_of_few),
    "first-column-for-all": ("transpose.h", "= a[i * lda + c];", "= a[i * lda];", router_logits),
}


@pytest.fixture
def variant(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernels of one mutant in place of those in use; gives its name."""
    file, old, new = MUTANTS[request.param] if request.param in MUTANTS else OTHERS[request.param][:3]
    shutil.copytree(build.SOURCES, tmp_path / "csrc")
    source = tmp_path / "csrc" / file
    text = source.read_text()
    assert old in text, f"the mutant {request.param} no longer applies"
    source.write_text(text.replace(old, new))
    path = build.compile_library(tmp_path, sources=tmp_path / "csrc", flags=FLAGS)
    library = ctypes.CDLL(str(path))
    monkeypatch.setattr(kernels, "library", lambda: library)
    kernels._functions.cache_clear()
    request.addfinalizer(kernels._functions.cache_clear)
    return request.param


# Each costs a compilation of five seconds; the quick run has one of each kind.
QUICK = ("off-by-one-tile-edge", "missing-dropout-mask", "swapped-index", "score-applied-twice")


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow])
        for name in MUTANTS
        if name not in (UNWRITTEN, RIGHT)
    ],
    indirect=True,
)
def test_mutant_is_caught(variant: str) -> None:
    """At least one of a few cases fails."""
    dropout = "mask" in variant
    with pytest.raises(AssertionError, match=r"is allowed|not finite"):
        for name in ("odd", "wide", "decoding", "empty-experts"):
            verify(CASES[name], torch.float32, activation="relu", dropout=dropout)


@pytest.mark.parametrize("variant", [pytest.param(UNWRITTEN, marks=pytest.mark.slow)], indirect=True)
def test_unwritten_scratch_shows(variant: str) -> None:
    """One element of a thread's sums that nobody set to zero comes out as NaN."""
    with pytest.raises(AssertionError, match=r"1 of .* entries are not finite"):
        verify(CASES["one-token"], torch.float32, activation="relu", inner_k=3)


@pytest.mark.slow
@pytest.mark.parametrize("variant", OTHERS, indirect=True)
def test_mutant_of_another_operation_is_caught(variant: str) -> None:
    """What the compiled kernel gives is not what PyTorch's operations give."""
    *_, compute = OTHERS[variant]
    with pytest.raises(AssertionError, match=r"not (close|equal)"):
        torch.testing.assert_close(compute("cpu"), compute("torch"))


@pytest.mark.parametrize("variant", [RIGHT], indirect=True)
def test_right_kernels_pass_where_mutants_fail(variant: str) -> None:
    """The same cases, compiled alike, so that a mutant is not caught by a test that always fails."""
    for name in ("odd", "wide", "decoding", "empty-experts"):
        for dropout in (False, True):
            verify(CASES[name], torch.float32, activation="relu", dropout=dropout)
    verify(CASES["one-token"], torch.float32, activation="relu", inner_k=3)
    for *_, compute in OTHERS.values():
        torch.testing.assert_close(compute("cpu"), compute("torch"))
