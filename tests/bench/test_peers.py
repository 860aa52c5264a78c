"""Peers compute the very same layer, or are refused by name."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor, nn

from sparseffn.bench import peers
from sparseffn.bench.benchmark import benchmark
from sparseffn.bench.candidates import Candidate
from sparseffn.bench.peers import PeerMixture, peers_of
from sparseffn.errors import UserError

from .conftest import DENSE, SIGMA, setting
from .test_correctness import held

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="needs transformers: pip install 'sparseffn[hf]'"
)


@needs_transformers
@pytest.mark.parametrize("implementation", peers.HF_IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_peer_equals_sigma_moe(implementation: str, dtype: torch.dtype) -> None:
    """Output, gradient of x, and gradients of our own parameters."""
    found, _ = peers_of(SIGMA, setting(30, dtype))
    candidate = next(c for c in found if c.label == f"hf {implementation}")
    assert set(held(candidate, 30, dtype)) >= {"output", "gradient of experts.keys", "gradient of router.selector"}


@pytest.mark.usefixtures("quick")
def test_peer_that_disagrees_is_refused_by_name() -> None:
    """Here one that forgets the scores."""

    class Unscaled(nn.Module):
        def __init__(self, layer) -> None:
            super().__init__()
            self.keys, self.values = layer.experts.keys, layer.experts.values

        def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
            u = torch.relu(torch.einsum("td,tkdg->tkg", x, self.keys[indices]))
            return torch.einsum("tkg,tkgd->td", u, self.values[indices])

    wrong = Candidate(label="other library", config=SIGMA, wrap=lambda layer: PeerMixture(layer, Unscaled))
    with pytest.raises(UserError, match="other library must agree with float64"):
        benchmark([Candidate(label="dense", config=DENSE), wrong], setting(70), rounds=1)


def test_absent_peers_are_listed_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without transformers."""
    monkeypatch.setattr(peers, "_installed", lambda module: False)
    found, absent = peers_of(SIGMA, setting(4))
    assert found == [] and len(absent) == 3 and all("sparseffn[hf]" in reason for reason in absent.values())


@needs_transformers
def test_copies_of_all_tokens_matrices_are_left_out() -> None:
    """`batched_mm` beyond a gibibyte."""
    _, absent = peers_of(SIGMA.replace(d_model=1024, expert_size=128), setting(4096))
    assert list(absent) == ["hf batched_mm"] and "8.0 GiB" in absent["hf batched_mm"]


def test_peers_refuse_what_they_do_not_compute() -> None:
    """Other activations and the inner top-K."""
    found, absent = peers_of(SIGMA.replace(activation="gelu"), setting(4))
    assert found == [] and "ReLU" in absent["peers"]
