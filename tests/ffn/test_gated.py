"""Gated units: what they select by, how they start, and that runs without them keep their identity."""

from __future__ import annotations

import pytest
import torch

from sparseffn.contract import run_check
from sparseffn.errors import UserError
from sparseffn.ffn import FFNConfig, config_from_json, list_methods, method_class
from sparseffn.ffn.dense import DenseConfig
from sparseffn.ffn.options import field_infos
from sparseffn.ffn.sigma_moe import SigmaMoEConfig
from sparseffn.ffn.topk import TopKConfig
from sparseffn.matching import match
from sparseffn.ops.activations import ACTIVATIONS

MOE = SigmaMoEConfig(d_model=64, n_experts=8, expert_size=32, k=2, n_layers=16)
GATED = [method_class(name) for name in list_methods() if "gated" in field_infos(method_class(name))]


@pytest.mark.parametrize("config", [DenseConfig(d_model=64, d_ff=256, n_layers=16), MOE], ids=["dense", "sigma-moe"])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_coefficients_start_with_the_second_moment_that_they_have_without_a_gate(config: FFNConfig, activation: str) -> None:
    """At 16 layers gate keys drawn like keys would make them 8 times smaller."""
    torch.manual_seed(0)
    x = torch.randn(2000, 64)
    plain, gated = (config.replace(activation=activation, gated=gate).build() for gate in (False, True))
    with torch.no_grad():
        moments = [layer.coefficients(x).square().mean() for layer in (plain, gated)]
    assert 0.8 < float(moments[1] / moments[0]) < 1.25


@pytest.mark.parametrize("config_class", GATED, ids=[c.name for c in GATED])
def test_a_config_without_a_gate_is_the_one_it_was(config_class: type[FFNConfig]) -> None:
    """Runs are stored under the digest of their JSON, which was written before there was a gate."""
    config = config_class.examples()[0].replace(gated=False)
    assert "gated" not in config.to_json()
    gated = config.replace(gated=True)
    assert gated.to_json()["gated"] is True
    assert config_from_json(gated.to_json()) == gated and config_from_json(config.to_json()) == config


@pytest.mark.parametrize("config_class", GATED, ids=[c.name for c in GATED])
def test_a_gated_block_is_matched_to_the_dense_one(config_class: type[FFNConfig]) -> None:
    """Three matrices where there were two: two thirds of the pairs."""
    sizes = {"d_model": 64, "n_layers": 2, "n_experts": 16, "expert_size": 32, "k": 2, "d_ff": 512}
    fields = {name: value for name, value in sizes.items() if name in field_infos(config_class)}
    target = DenseConfig(d_model=64, d_ff=512).num_params()
    found = match(config_class(**fields, gated=True), target, tolerance=0.02)
    assert found.equal
    assert 0.6 * 512 < found.config.n_channels < 0.72 * 512
    assert sum(p.numel() for p in found.config.build().parameters()) == found.block_params


def test_a_gated_topk_ranks_by_size() -> None:
    """A coefficient of either sign counts by its size, as in the error bound."""
    layer = TopKConfig(d_model=8, d_ff=24, k=5, gated=True, activation="identity").build()
    x = torch.randn(50, 8)
    with torch.no_grad():
        u = (x @ layer.keys.t()) * (x @ layer.gate_keys.t())
        kept = layer.coefficients(x)
    assert bool((kept < 0).any())
    assert torch.equal((kept != 0).sum(dim=1), torch.full((50,), 5))
    torch.testing.assert_close(kept, torch.where(u.abs() >= u.abs().topk(5).values[:, -1:], u, 0.0))


@pytest.mark.parametrize("config_class", GATED, ids=[c.name for c in GATED])
def test_clamped_swiglu_needs_a_gate(config_class: type[FFNConfig]) -> None:
    """The error says which option is missing."""
    config = config_class.examples()[0].replace(gated=False)
    with pytest.raises(UserError, match=r"`activation` must be .*got 'clamped_swiglu'; fix: gated=true"):
        config.replace(activation="clamped_swiglu")
    assert config.replace(activation="clamped_swiglu", gated=True).activation == "clamped_swiglu"


INNER = [
    MOE.replace(d_model=8, n_experts=4, expert_size=4, inner_k=3, gated=True, activation=activation, dropout=dropout)
    for activation in (*ACTIVATIONS, "clamped_swiglu")
    for dropout in (0.0, 0.25)
]


@pytest.mark.parametrize("check", ["reference", "sum_of_values", "saved_bytes", "flops", "second_derivatives"])
def test_gated_units_survive_an_inner_top_k(check: str) -> None:
    """Every activation, beyond what the examples hold."""

    class Config(SigmaMoEConfig):
        """A sigma-MoE with other examples."""

        __slots__ = ()

        @classmethod
        def examples(cls) -> list[FFNConfig]:
            return list(INNER)

    assert run_check(check, Config) == len(INNER)
