"""Whose gradient moves whose logit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sparseffn.errors import UserError
from sparseffn.ffn import FFNConfig
from sparseffn.ffn.dense import DenseConfig
from sparseffn.ffn.mixture import Mixture
from sparseffn.ffn.sigma_moe import SigmaMoEConfig
from sparseffn.ffn.softmax_moe import SoftmaxMoEConfig
from sparseffn.ffn.softmax_renorm_moe import SoftmaxRenormMoEConfig
from sparseffn.models import TransformerXL, TransformerXLConfig
from sparseffn.paper.competition import gradient_parts, probe, split_gradient
from sparseffn.paper.predictions import interference_bounds

GATES: list[tuple[Any, Any]] = [
    (SigmaMoEConfig, "sigmoid"),
    (SoftmaxMoEConfig, "softmax"),
    (SoftmaxRenormMoEConfig, "renormalised"),
]
gates = pytest.mark.parametrize(("kind", "gate"), GATES, ids=[gate for _, gate in GATES])


def config(kind: Any) -> Any:
    """Eight experts, of which three are used."""
    return kind(d_model=8, n_experts=8, expert_size=4, k=3)


def routed(kind: Any, scale: float = 1.0) -> Any:
    """A router's decision on random tokens."""
    layer = config(kind).build()
    assert isinstance(layer, Mixture)
    with torch.no_grad():
        layer.router.selector.mul_(scale)
    return layer.router(torch.randn(500, 8), None)


@gates
def test_parts_add_up_to_the_gradient(kind: Any, gate: Any) -> None:
    """Own and others' together are what autograd says."""
    routing = routed(kind)
    routing.logits_TE.retain_grad()
    c_TK = torch.randn_like(routing.weights_TK)
    (routing.weights_TK * c_TK).sum().backward()
    own_TE, cross_TE = split_gradient(routing, c_TK, gate)
    torch.testing.assert_close(own_TE + cross_TE, routing.logits_TE.grad)
    assert bool(cross_TE.any()) == (gate != "sigmoid")


@gates
def test_interference_at_equal_logits_lies_at_the_bounds(kind: Any, gate: Any) -> None:
    """Independent contributions at the lower bound, equal ones at the upper."""
    low, high = interference_bounds(config(kind), gate)
    routing = routed(kind, scale=0.0)
    for c_TK, wanted, tolerance in (
        (torch.randn_like(routing.weights_TK), low, 0.05),
        (torch.ones_like(routing.weights_TK), high, 1e-5),
    ):
        own, cross = gradient_parts(routing, c_TK, gate)
        assert cross / (own + cross) == pytest.approx(wanted, rel=tolerance)


def model(ffn: FFNConfig) -> TransformerXL:
    """Two layers."""
    built = TransformerXL(TransformerXLConfig(vocab_size=16, d_model=8, n_layers=2, n_heads=2, d_head=4, ffn=ffn))
    built.init_parameters(0)
    return built


@gates
def test_probe_changes_nothing(kind: Any, gate: Any) -> None:
    """It reads a model in training mode and leaves mode, parameters, gradients and generator alone."""
    watched = model(config(kind)).train()
    before, state = {k: v.clone() for k, v in watched.state_dict().items()}, torch.get_rng_state()
    seen = probe(watched, np.arange(400) % 16, batch=2, context=16)
    assert watched.training and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in watched.state_dict().items())
    assert all(p.grad is None for p in watched.parameters())
    assert 0 < seen.load_entropy <= 1 and seen.norm_spread < 1e-5 and seen.largest_over_mean >= 1
    assert (seen.interference > 0) == (gate != "sigmoid")


def test_one_busy_expert_has_no_entropy() -> None:
    """All tokens to one of two experts: entropy 0, half of the experts dead, twice the mean load."""
    watched = model(SigmaMoEConfig(d_model=8, n_experts=2, expert_size=4, k=1))
    with torch.no_grad():
        for _, layer in watched.ffn_layers():
            layer.router.selector[1] = layer.router.selector[0]  # pyright: ignore
    seen = probe(watched, np.arange(400) % 16, batch=2, context=16)
    assert (seen.load_entropy, seen.dead, seen.largest_over_mean) == (0.0, 0.5, 2.0)


def test_dense_blocks_have_no_selectors() -> None:
    """Refused."""
    with pytest.raises(UserError, match="`model` must have mixtures"):
        probe(model(DenseConfig(d_model=8, d_ff=16)), np.arange(400) % 16, batch=2, context=16)
