"""The fused attention: its gradient, its blocks, and the sinusoids it is given."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from models.small import assert_same
from sparseffn.models.attention import sinusoids
from sparseffn.models.relative_mix import future_mask, relative_mix, relative_shift


def inputs(batch: int, n_queries: int, n_keys: int, n_heads: int = 2, d_head: int = 3) -> list[Tensor]:
    """Content and position queries, keys, position keys, values; all with gradient."""
    generator = torch.Generator().manual_seed(0)
    lengths = [(batch, n_queries), (batch, n_queries), (batch, n_keys), (n_keys + 1,), (batch, n_keys)]
    shapes = [(*length, n_heads, d_head) for length in lengths]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("block_elements", [None, 1, 20], ids=["one-block", "row-blocks", "small-blocks"])
@pytest.mark.parametrize(("n_queries", "n_keys"), [(1, 1), (1, 4), (3, 3), (3, 5)], ids=lambda n: str(n))
def test_gradient_is_that_of_differences(n_queries: int, n_keys: int, block_elements: int | None) -> None:
    """`gradcheck` of all five inputs."""

    def mix(*tensors: Tensor) -> Tensor:
        return relative_mix(*tensors, block_elements=block_elements)

    assert torch.autograd.gradcheck(mix, inputs(2, n_queries, n_keys))


@pytest.mark.parametrize("block_elements", [1, 7, 40, 1000], ids=lambda n: f"elements{n}")
def test_blocks_do_not_change_the_result(block_elements: int) -> None:
    """Output and gradients, for blocks of rows and of sequences that do not divide evenly."""
    results = []
    for elements in (None, block_elements):
        tensors = inputs(3, 7, 11)
        y = relative_mix(*tensors, block_elements=elements)
        (y * torch.arange(y.numel()).reshape(y.shape).sin()).sum().backward()
        results.append([y, *(t.grad for t in tensors)])
    for blocked, whole in zip(results[1], results[0], strict=True):
        assert_same(blocked, whole)


@pytest.mark.parametrize("block_elements", [None, 1, 20], ids=["one-block", "row-blocks", "small-blocks"])
def test_nobody_sees_padding(block_elements: int | None) -> None:
    """Behind padding the result is that of the text alone, `gradcheck` holds, and nothing becomes NaN."""
    content, position, k, r, v = inputs(2, 4, 6)
    padding = torch.tensor([[True, True, True, False, False, False], [False] * 6])

    def mix(*tensors: Tensor) -> Tensor:
        return relative_mix(*tensors, padding_BS=padding, block_elements=block_elements)

    y = mix(content, position, k, r, v)
    assert_same(y[1:], relative_mix(content[1:], position[1:], k[1:], r, v[1:]))
    assert_same(y[:1, 1:], relative_mix(content[:1, 1:], position[:1, 1:], k[:1, 3:], r[3:], v[:1, 3:]))
    assert y.isfinite().all()
    assert torch.autograd.gradcheck(mix, inputs(2, 4, 6))


def test_shift_puts_each_distance_at_its_key() -> None:
    """Entry (i, j) of the shifted columns has distance S - L + i - j wherever that is not negative."""
    n_queries, n_keys = 4, 6
    columns = torch.arange(n_keys - 1, -2, -1).repeat(n_queries, 1)
    shifted = relative_shift(columns, n_keys)
    expected = n_keys - n_queries + torch.arange(n_queries)[:, None] - torch.arange(n_keys)
    past = ~future_mask(n_queries, n_keys, shifted.device)
    assert torch.equal(past, expected >= 0)
    assert torch.equal(shifted[past], expected[past])


@pytest.mark.parametrize("d_model", [2, 8, 7], ids=lambda d: f"d{d}")
def test_sinusoids_are_the_formula(d_model: int) -> None:
    """sin and cos of d / 10000^(2 i / d_model); an odd width lacks the last cosine."""
    distances = [0, 1, 5, 300]
    frequencies = [10000.0 ** (-2 * i / d_model) for i in range((d_model + 1) // 2)]
    rows = [[f(d * w) for f in (math.sin, math.cos) for w in frequencies][:d_model] for d in distances]
    torch.testing.assert_close(sinusoids(torch.tensor(distances), d_model), torch.tensor(rows), rtol=0, atol=5e-5)


def test_sinusoids_tell_distances_apart() -> None:
    """No two of a thousand distances share their vector."""
    positions = sinusoids(torch.arange(1000), 16)
    assert (torch.cdist(positions, positions) + torch.eye(1000)).min() > 1e-3
