"""The compiled Top-K blocks and product-key memories over drawn sizes, layouts, options and dtypes; see `block_draws.py`."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import nullcontext

import block_draws
import pytest
import torch

from sparseffn.ops.cpu import build

pytestmark = [
    pytest.mark.skipif(build.unavailable() is not None, reason="no compiled kernels here"),
    pytest.mark.usefixtures("poison"),
]


@pytest.mark.parametrize("seeds", [range(40), pytest.param(range(40, 1000), marks=pytest.mark.slow)], ids=["some", "many"])
@pytest.mark.parametrize("check", [block_draws.topk_block, block_draws.product_key_block], ids=["topk", "product-keys"])
def test_drawn_blocks_are_near_their_equations(check: Callable[[random.Random], None], seeds: range) -> None:
    """Choice, output, coefficients and every gradient."""
    for seed in seeds:
        torch.manual_seed(seed)
        try:
            check(random.Random(seed))
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


@pytest.mark.parametrize("spoilt", ["y", "coefficients", "gradients"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nothing_in_place_of_a_result_is_seen(dtype: torch.dtype, spoilt: str) -> None:
    """What the comparison allows is less than a block of zeros would need, with many tokens and few bits too."""
    torch.manual_seed(0)
    inputs = {name: block_draws.numbers(n, 24, terms=terms) for name, n, terms in (("x", 400, 1), ("w", 24, 24))}

    def block(*, zero: bool, **given: torch.Tensor) -> list[torch.Tensor]:
        y = given["x"] @ given["w"]
        nothing = {"y": [0 * y, y], "coefficients": [y, 0 * y], "gradients": [y.detach() + 0 * y, y.detach() + 0 * y]}
        return nothing[spoilt] if zero else [y, y]

    indices = torch.zeros(1)
    for zero in (False, True):
        with pytest.raises(AssertionError, match="is allowed") if zero else nullcontext():
            block_draws.hold(
                inputs, dtype, lambda zero=zero, **given: [*block(zero=zero, **given), indices],
                lambda _, **given: block(zero=False, **given),
            )  # fmt: skip


def test_gradients_of_biases_are_summed_in_double() -> None:
    """Of one unit's bias, a sum over all tokens: one rounding, where a sum in float32 has thousands."""
    torch.manual_seed(0)
    x, keys, values = torch.randn(8192, 4), torch.randn(1, 4), torch.randn(1, 4)
    bias, direction = torch.zeros(1, requires_grad=True), torch.randn(8192, 4)
    tensors = [x, keys, values, 1, None, bias, None, None, None, 1.0, "identity", 1.702, 7.0, False, False]
    y, *_ = torch.ops.sparseffn.topk_rows(*tensors)
    (gradient,) = torch.autograd.grad(y, bias, direction)
    # Products of four terms err by some roundings each, independently.
    terms = direction.double() @ values.double().T
    assert abs(float(gradient) - float(terms.sum())) < 2 * torch.finfo(torch.float32).eps * float(terms.square().sum().sqrt())
