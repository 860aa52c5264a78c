"""PyTorch's own compiler, which the other tests replace by a quick one: a layer's graph with code generated for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sparseffn.ffn.sigma_moe import SigmaMoEConfig


def run(layer: nn.Module, function: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, and the gradients of the input and of every parameter of the layer."""
    leaf = x.clone().requires_grad_()
    y = function(leaf)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [leaf, *layer.parameters()])]


@pytest.mark.slow
# PyTorch's compiler uses what PyTorch deprecates.
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
@pytest.mark.parametrize("inner_k", [None, 5], ids=["all-units", "inner-top-k"])
def test_one_compilation_serves_all_token_counts(inner_k: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fullgraph, dynamic, from 2 tokens on; output and all gradients are the eager layer's."""
    # A folder of its own: code that an earlier run left would hide that compiling fails now.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    layer = SigmaMoEConfig(d_model=32, n_experts=6, expert_size=16, k=2, inner_k=inner_k).build()
    compiled = torch.compile(layer, backend="inductor", fullgraph=True, dynamic=True)
    counter = torch._dynamo.utils.counters["stats"]
    counter.clear()
    for n_tokens in (2, 3, 17, 64, 300):
        x = torch.randn(n_tokens, 32)
        for got, wanted in zip(run(layer, compiled, x), run(layer, layer, x), strict=True):
            torch.testing.assert_close(got, wanted, rtol=0.0, atol=1e-5 * float(wanted.abs().max()))
    assert counter["unique_graphs"] == 1
    assert list(tmp_path.rglob("*.py")), "no code was generated"
