"""Layers in a trace of torch.jit, and what their backward makes; the contract holds them under every other transform."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from sparseffn.ffn import FFNConfig
from sparseffn.ffn.pkm import PKMConfig
from sparseffn.ffn.sigma_moe import SigmaMoEConfig
from sparseffn.ffn.topk import TopKConfig

CONFIGS = {
    "sigma-moe": SigmaMoEConfig(d_model=8, n_experts=4, expert_size=4, k=2),
    "sigma-moe inner_k": SigmaMoEConfig(d_model=8, n_experts=4, expert_size=4, k=2, inner_k=3),
    "topk": TopKConfig(d_model=8, d_ff=16, k=4),
    "pkm": PKMConfig(d_model=8, n_subkeys=4, k=3),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_jit_trace_routes_new_tokens_anew(config: FFNConfig):
    """A kernel called behind the tracer's back would leave the traced example's output in the graph as a constant."""
    layer, x, other = config.build().eval(), torch.randn(5, 8), torch.randn(5, 8)
    with torch.no_grad():
        traced = torch.jit.trace(layer, x, check_trace=False)
        torch.testing.assert_close(traced(other), layer(other))


def test_backward_makes_no_gradients_of_what_is_kept():
    """For 512 tokens of 2 x 256 units they would be a megabyte of zeros."""
    layer = SigmaMoEConfig(d_model=4, n_experts=4, expert_size=256, k=2).build()
    y = layer(torch.randn(512, 4, requires_grad=True))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        y.sum().backward()
    hidden_bytes = 512 * 2 * 256 * 4
    assert max(event.self_cpu_memory_usage for event in profile.events()) < hidden_bytes


class _Halved(nn.Module):
    """A parametrisation."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / 2


def test_a_parametrised_expert_is_computed_as_it_is_seen():
    """Weight normalisation and its kin put a computed tensor in a parameter's place."""
    layer, x = SigmaMoEConfig(d_model=8, n_experts=4, expert_size=4, k=2, gated=True).build(), torch.randn(5, 8)
    wanted = layer(x) / 2
    # PyTorch itself refuses the names `keys` and `values` here: they are methods of its dictionary of parametrisations.
    parametrize.register_parametrization(layer.experts, "gate_keys", _Halved())
    torch.testing.assert_close(layer(x), wanted)
    layer(x).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
