"""The compiled Top-K blocks and product-key memories over drawn sizes, layouts, options and dtypes; see `block_draws.py`."""

from __future__ import annotations

import random
from collections.abc import Callable

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
