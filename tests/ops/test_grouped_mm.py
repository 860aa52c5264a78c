"""The backend `grouped_mm` on the CPU, against the reference in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sparseffn import ops
from sparseffn.errors import UserError
from sparseffn.ops.grouped_mm import grouped_mm_backend
from sparseffn.ops.spec import check_against_truth

pytestmark = pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="PyTorch before 2.10 has no grouped_mm")

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
ROUTINGS = pytest.mark.parametrize(
    ("n_tokens", "n_experts", "k"),
    [(1, 8, 8), (63, 5, 2), (20, 4, 4), (3, 12, 1), (0, 3, 2)],
    ids=["one-token", "odd", "all-experts", "empty-experts", "no-tokens"],
)


@DTYPES
@ROUTINGS
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_experts_are_near_the_truth(n_tokens: int, n_experts: int, k: int, gated: bool, dtype: torch.dtype) -> None:
    """Output and every gradient against plain PyTorch and the truth."""
    indices = torch.rand(n_tokens, n_experts).topk(k, dim=1).indices
    inputs = {"x": torch.randn(16, n_tokens).t(), "keys": torch.randn(n_experts, 16, 24) / 4}
    inputs |= {"values": torch.randn(n_experts, 24, 16) / (24 * k) ** 0.5}
    inputs |= {"gate_keys": torch.randn(n_experts, 16, 24) / 4} if gated else {}
    inputs, gates, found = {n: t.to(dtype) for n, t in inputs.items()}, torch.rand(n_tokens, k) + 0.5, []
    for backend in ("grouped_mm", "torch", "reference"):
        wide = torch.float64 if backend == "reference" else None
        leaves = {n: t.detach().to(wide or dtype).requires_grad_() for n, t in inputs.items()}
        leaves["gates"] = gates.detach().to(wide or torch.float32).requires_grad_()
        y = ops.experts(**leaves, indices=indices, activation="silu", backend=backend)
        direction = torch.sin(torch.arange(y.numel())).to(dtype).to(y.dtype).view(y.shape)
        found.append([y.detach(), *torch.autograd.grad(y, list(leaves.values()), direction)])
    for what, *tensors in zip(["experts", *(f"experts.{name}" for name in leaves)], *found, strict=True):
        check_against_truth(what, *tensors, dtype)


@pytest.mark.parametrize(
    ("dtype", "width", "words"),
    [
        (torch.float64, 16, "computes in torch.float32, torch.bfloat16, torch.float16 there, not in torch.float64; fix"),
        (torch.float32, 6, r"multiples of 4 .* got \(3, 6, 8\)"),
        (torch.bfloat16, 12, r"multiples of 8 .* got \(3, 12, 8\)"),
    ],
    ids=["float64", "width", "half-width"],
)
def test_what_pytorch_cannot_compute_is_refused(dtype: torch.dtype, width: int, words: str) -> None:
    """With the remedy."""
    x, keys = torch.randn(5, width, dtype=dtype), torch.randn(3, width, 8, dtype=dtype)
    gates, indices = torch.ones(5, 1), torch.zeros(5, 1, dtype=torch.int64)
    with pytest.raises(UserError, match=words):
        ops.experts(x, keys, keys.mT, gates, indices, backend="grouped_mm")


def test_it_is_never_automatic() -> None:
    """And says so where it has no kernel."""
    backend = grouped_mm_backend()
    assert not backend.automatic and backend.unavailable(torch.device("cpu"), torch.float32) is None
    assert backend.unavailable(torch.device("meta"), torch.float32) == "torch.nn.functional.grouped_mm has no kernel for meta"
