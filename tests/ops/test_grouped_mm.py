"""The backend `grouped_mm` on the CPU, against the reference in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparseffn import ops
from sparseffn.errors import UserError
from sparseffn.ops.grouped_mm import grouped_mm_backend
from sparseffn.ops.spec import check_against_truth

pytestmark = pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="PyTorch before 2.10 has no grouped_mm")

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
ROUTINGS = pytest.mark.parametrize(
    ("n_tokens", "n_experts", "k"),
    [(1, 1, 1), (63, 5, 2), (20, 4, 4), (3, 12, 1), (0, 3, 2)],
    ids=["one", "odd", "all-experts", "empty-experts", "no-tokens"],
)


def routed(n_tokens: int, n_experts: int, k: int) -> ops.ExpertRows:
    """A random selection, sorted by expert."""
    indices = torch.rand(n_tokens, n_experts).topk(k, dim=1).indices
    return ops.sort_by_expert(ops.Selection.fixed(indices, torch.ones(n_tokens, k), n_experts))


def check(name: str, function: Callable[..., Tensor], inputs: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Output and gradients against plain PyTorch and the truth."""
    found = []
    for backend in ("grouped_mm", "torch", "reference"):
        wide = torch.float64 if backend == "reference" else None
        leaves = [x.detach().to(wide or x.dtype).requires_grad_() for x in inputs.values()]
        y = function(*leaves, backend=backend)
        direction = torch.sin(torch.arange(y.numel())).to(dtype).to(y.dtype).view(y.shape)
        found.append([y.detach(), *torch.autograd.grad(y, leaves, direction)])
    for what, *tensors in zip([name, *(f"{name}.{x}" for x in inputs)], *found, strict=True):
        check_against_truth(what, *tensors, dtype)


@DTYPES
@ROUTINGS
def test_products_are_near_the_truth(n_tokens: int, n_experts: int, k: int, dtype: torch.dtype) -> None:
    """Up with a transposed input, down with scores."""
    rows = routed(n_tokens, n_experts, k)
    up = {"x": torch.randn(16, n_tokens).t().to(dtype), "weight": torch.randn(n_experts, 16, 24).to(dtype)}
    check("expert_up", lambda x, w, backend: ops.expert_up(x, w, rows, backend=backend), up, dtype)
    n_rows = len(rows.order)
    down = {"a": torch.randn(n_rows, 24).to(dtype), "weight": torch.randn(n_experts, 24, 16).to(dtype)}
    down["gates"] = torch.rand(n_rows) + 0.5
    check("expert_down", lambda a, w, g, backend: ops.expert_down(a, w, g, rows, backend=backend), down, dtype)


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
    x, weight = torch.randn(5, width, dtype=dtype), torch.randn(3, width, 8, dtype=dtype)
    with pytest.raises(UserError, match=words):
        ops.expert_up(x, weight, routed(5, 3, 1), backend="grouped_mm")


def test_it_is_never_automatic() -> None:
    """And says so where it has no kernel."""
    backend = grouped_mm_backend()
    assert not backend.automatic and backend.unavailable(torch.device("cpu"), torch.float32) is None
    assert backend.unavailable(torch.device("meta"), torch.float32) == "torch.nn.functional.grouped_mm has no kernel for meta"
