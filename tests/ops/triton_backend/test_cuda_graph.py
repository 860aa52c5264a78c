"""A trainer's loop captured in a CUDA graph; where there is no GPU `device_is_not_waited_for` says that nothing hinders it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sparseffn.ffn import method_class

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU")

# Whose training draws nothing, so that a replay is the step itself.
CAPTURED: dict[str, tuple[str, dict[str, Any]]] = {
    "sigma-moe": ("sigma-moe", {"k": 2, "entropy_weight": 0.01}),
    "gated": ("sigma-moe", {"k": 2, "entropy_weight": 0.01, "gated": True}),
    "capacity": ("switch", {"capacity_factor": 1.0}),
    "s-base": ("s-base", {"k": 2}),
}
COUNTED = {**CAPTURED, "noisy-moe": ("noisy-moe", {"k": 2})}


@pytest.mark.parametrize("name", CAPTURED)
def test_training_step_is_captured(name: str) -> None:
    """Steps of SGD with statistics and the balancing loss, replayed: the same parameters as without a graph."""
    method, options = CAPTURED[name]
    config = method_class(method)(d_model=64, n_experts=8, expert_size=32, **options)
    torch.manual_seed(0)
    batches = [torch.randn(100, 64, device="cuda") for _ in range(4)]
    plain, captured = (config.build().cuda().train() for _ in range(2))
    captured.load_state_dict(plain.state_dict())

    def step(layer: torch.nn.Module, x: Tensor) -> None:
        y, stats = layer(x, return_stats=True)
        loss = (y - x).square().mean() + stats.balance_loss
        parameters = list(layer.parameters())
        with torch.no_grad():
            for p, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                p.sub_(grad, alpha=0.1)

    before = {name: p.clone() for name, p in captured.state_dict().items()}
    stream, x = torch.cuda.Stream(), batches[0].clone()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # What is compiled or allocated once must not be captured.
        step(captured, x)
    torch.cuda.current_stream().wait_stream(stream)
    captured.load_state_dict(before)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(captured, x)
    for batch in batches:
        x.copy_(batch)
        graph.replay()
        step(plain, batch)
    for got, wanted in zip(captured.parameters(), plain.parameters(), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("name", COUNTED)
def test_layer_launches_few_kernels(name: str) -> None:
    """By PyTorch's profiler: 12 kernels forward, 14 backward, statistics 4 more."""
    from torch.profiler import ProfilerActivity, profile

    method, options = COUNTED[name]
    layer = method_class(method)(d_model=512, n_experts=16, expert_size=128, **options).build().cuda().bfloat16().train()
    x = torch.randn(1024, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn_like(x)
    leaves = [x, *layer.parameters()]

    def launched(call) -> int:
        call()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            call()
            torch.cuda.synchronize()
        return sum(e.count for e in seen.key_averages() if e.self_device_time_total > 0)

    forward, with_statistics = launched(lambda: layer(x)), launched(lambda: layer(x, return_stats=True))
    whole = launched(lambda: torch.autograd.grad(layer(x), leaves, grad))
    assert forward <= 12 and with_statistics - forward <= 4 and whole - forward <= 14, (forward, with_statistics, whole)
