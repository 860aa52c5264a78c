"""Top-K activation and product-key reads against float64, whatever the dtype, the number of tokens and the options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparseffn import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Tokens, width, units, survivors: few and many tokens, one and all survivors, ragged widths.
SIZES = [(1, 17, 33, 5), (7, 63, 100, 100), (200, 100, 63, 1), (129, 412, 500, 64), (1030, 20, 70, 9)]
WORSE_THAN_PLAIN = 2.0


def over_survivors(x: Tensor, keys: Tensor, values: Tensor, chosen: Tensor) -> Tensor:
    """Equation 7 by two products, of the units that are given."""
    return (F.silu(x @ keys.t()) * chosen.to(x.dtype)) @ values


def leaves(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [t.to(dtype).detach().requires_grad_() for t in tensors]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_topk_rows_are_near_the_truth(size: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """Output and gradients err at most twice as much as PyTorch's products over the same survivors."""
    n_tokens, width, n_units, k = size
    torch.manual_seed(sum(size))
    drawn = [torch.randn(n, width).to(dtype) for n in (n_tokens, n_units, n_units)]
    grad = torch.randn(n_tokens, width).to(dtype)
    ours = leaves(drawn, dtype)
    y, indices, _ = ops.topk_rows(*ours, k=k, activation="silu")
    y.backward(grad)
    chosen = torch.zeros(n_tokens, n_units, dtype=torch.bool).scatter_(1, indices, True)
    assert int(chosen.sum()) == n_tokens * k
    plain, true = leaves(drawn, dtype), leaves(drawn, torch.float64)
    y_plain, y_true = over_survivors(*plain, chosen), over_survivors(*true, chosen)
    y_plain.backward(grad)
    y_true.backward(grad.double())
    grads: list[list[Any]] = [[t.grad for t in of] for of in (ours, plain, true)]
    for got, near, truth in zip((y, *grads[0]), (y_plain, *grads[1]), (y_true, *grads[2]), strict=True):
        limit = WORSE_THAN_PLAIN * (near.double() - truth).abs().max() + torch.finfo(dtype).eps * truth.abs().max()
        assert (got.double() - truth).abs().max() <= limit


@pytest.mark.parametrize("n_tokens", [4, 300], ids=["few", "many"])
def test_a_token_that_is_not_finite_costs_its_own_row(n_tokens: int) -> None:
    """Nothing raises, and no other row is reached, nor its gradient of x."""
    x = torch.randn(n_tokens, 20)
    x[2] = torch.nan
    others = torch.arange(n_tokens) != 2
    x.requires_grad_()
    y, *_ = ops.topk_rows(x, torch.randn(50, 20), torch.randn(50, 20), k=7)
    z, *_ = ops.product_key_rows(x, torch.randn(2, 5, 10), torch.randn(2, 5, 10), torch.randn(25, 20), k=6)
    for out in (y, z):
        assert out[2].isnan().any() and out[others].isfinite().all()
    (gradient,) = torch.autograd.grad((y + z)[others].sum(), x)
    assert gradient[others].isfinite().all()


def test_ties_go_to_the_lowest_index() -> None:
    """Of zeros too, as ReLU makes them."""
    indices = ops.topk_rows(torch.zeros(12, 3), torch.randn(99, 3), torch.randn(99, 3), k=40)[1]
    assert torch.equal(indices.sort(dim=1).values, torch.arange(40).expand(12, 40))


@pytest.mark.parametrize("n_a", [20, 300], ids=["counted", "sorted"])
def test_product_key_rows_are_the_best_of_all_sums(n_a: int) -> None:
    """Each head's reads have the k largest sums, and every value once where all are read."""
    x, keys_a, keys_b = torch.randn(40, 24), torch.randn(3, n_a, 12), torch.randn(3, 20, 12)
    values, k = torch.randn(20 * n_a, 24), 200
    _, indices, sums = ops.product_key_rows(x, keys_a, keys_b, values, k=k, activation="identity")
    u_a = torch.einsum("bd,hnd->bhn", x[:, :12].double(), keys_a.double())
    u_b = torch.einsum("bd,hnd->bhn", x[:, 12:].double(), keys_b.double())
    every = (u_b[..., :, None] + u_a[..., None, :]).flatten(2)
    torch.testing.assert_close(sums.view(40, 3, k).double(), every.gather(2, indices.view(40, 3, k)), atol=1e-4, rtol=0)
    torch.testing.assert_close(sums.view(40, 3, k).min(2).values.double(), every.topk(k).values[..., -1], atol=1e-4, rtol=0)
    all_read = ops.product_key_rows(x[:2, :6], keys_a[:1, :4, :3], keys_b[:1, :5, :3], values[:20, :6], k=20)[1]
    assert torch.equal(all_read.sort(dim=1).values, torch.arange(20).expand(2, 20))
