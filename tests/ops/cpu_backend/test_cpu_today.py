"""The compiled experts of today's models: gated, biased, every activation, in any layout, against float64."""

from __future__ import annotations

import pytest
import torch
from expert_cases import CASES, LARGE, Case
from today_cases import ACTIVATIONS, LAYOUTS, Options, compiled, composed, draw

from sparseffn.ops.cpu import build
from sparseffn.ops.spec import check_against_truth

pytestmark = [
    pytest.mark.skipif(build.unavailable() is not None, reason="no compiled kernels here"),
    pytest.mark.usefixtures("poison"),
]

# The names that ops/spec.py has bounds for.
BOUNDS = {"gate_keys": "keys", "key_bias": "keys", "gate_bias": "keys", "value_bias": "values"}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def verify(case: Case, options: Options, dtype: torch.dtype) -> None:
    """To rounding in float64; else as near the truth as ops/spec.py demands."""
    drawn = draw(case, options, dtype)
    got, truth = compiled(*drawn, options.inner_k), composed(*drawn, options.inner_k, torch.float64)
    assert got.keys() == truth.keys()
    if dtype == torch.float64:
        for name, wanted in truth.items():
            torch.testing.assert_close(got[name], wanted, atol=1e-12, rtol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
        return
    plain = composed(*drawn, options.inner_k, dtype)
    for name, wanted in truth.items():
        field = BOUNDS.get(name, name)
        check_against_truth(f"expert_mlp.{field}" if field else "expert_mlp", got[name], plain[name], wanted, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", ["one-token", "decoding", "wide", "empty-experts", "no-tokens"])
def test_layouts(case: str, layout: str, dtype: torch.dtype) -> None:
    """Gated SiLU, whatever the strides."""
    verify(CASES[case], Options(layout), dtype)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", ["chunks", "hot-chunks"])
def test_layouts_of_many_rows(case: str, layout: str, dtype: torch.dtype) -> None:
    """More than one chunk of an expert."""
    verify(LARGE[case], Options(layout), dtype)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("activation", [*ACTIVATIONS, "clamped_swiglu"])
def test_activations(activation: str, gated: bool, dtype: torch.dtype) -> None:
    """Forward and backward, with biases and dropout."""
    if activation == "clamped_swiglu" and not gated:
        pytest.skip("it is of gated experts alone")
    # Of few numbers the largest error is luck: only rounding is held there.
    for case in ("odd", "wide") if dtype == torch.float64 else ("wide",):
        for dropout in (False, True):
            verify(CASES[case], Options("halves", activation, gated, biased=True, dropout=dropout), dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_inner_top_k(layout: str, gated: bool) -> None:
    """The largest coefficients of a token's experts, with biases and dropout; in float64, where no choice is close."""
    for case in ("decoding", "odd", "hot"):
        for dropout in (False, True):
            options = Options(layout, "silu", gated, biased=True, dropout=dropout, inner_k=5)
            verify(CASES[case], options, torch.float64)


@pytest.mark.parametrize("layout", ["in-out", "out-in"])
def test_gradients_have_the_memory_order_of_the_weights(layout: str) -> None:
    """So that an optimizer's step reads both in the same order."""
    inputs, indices, direction = draw(CASES["odd"], Options(layout), torch.float32)
    got = compiled(inputs, indices, direction, None)
    for name in ("keys", "gate_keys", "values"):
        assert got[name].stride() == getattr(inputs, name).stride()
