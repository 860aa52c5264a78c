"""No speed is reported for what is not correct."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from sparseffn.bench.candidates import Candidate, backend_restored, build_layer
from sparseffn.bench.correctness import check, clear_tokens, compared_tokens, find_truth, near_kink
from sparseffn.errors import UserError
from sparseffn.ffn import FeedForward, FFNConfig, list_methods, method_class
from sparseffn.ffn.pkm import PKMConfig
from sparseffn.ffn.sigma_moe import SigmaMoEConfig
from sparseffn.ffn.topk import TopKConfig

from .conftest import DENSE, SIGMA, setting
from .wrong_backends import wrong_backends

TOPK = TopKConfig(d_model=32, d_ff=400, k=60)
INNER = SigmaMoEConfig(d_model=32, n_experts=8, expert_size=40, k=3, inner_k=20, activation="gelu")
PKM_OF_TWO = PKMConfig(d_model=32, n_subkeys=20, k=12, n_heads=2)


@pytest.fixture
def wrong() -> Iterator[None]:
    """The wrong backends, beside the real ones."""
    with wrong_backends():
        yield


def held(candidate: Candidate, n_tokens: int, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """Check one candidate."""
    here = setting(n_tokens, dtype)
    layer = build_layer(candidate.config, here, 0)
    with backend_restored():
        return check(candidate, layer, candidate.module(layer), find_truth(candidate.config, here))


@pytest.mark.usefixtures("wrong")
@pytest.mark.parametrize(
    ("backend", "quantity"), [("last-row", "output"), ("scores", "gradient of")], ids=["forward", "backward"]
)
def test_wrong_kernel_is_refused(backend: str, quantity: str) -> None:
    """By label, backend and the quantity that is off, where one token of 200 is wrong, or one gradient by a per cent."""
    with pytest.raises(UserError, match=f"sigma-moe must agree.*in the {quantity}.*, 200 tokens.*backend {backend}"):
        held(Candidate(label="sigma-moe", config=SIGMA, backend=backend), 200)


@pytest.mark.parametrize("method", list_methods())
@pytest.mark.parametrize("n_tokens", [1, 63], ids=["one", "many"])
def test_every_method_passes(method: str, n_tokens: int) -> None:
    """All examples, forward and all gradients."""
    for config in method_class(method).examples():
        errors = held(Candidate(label=method, config=config), n_tokens)
        assert {"output", "gradient of x"} < set(errors)


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 4e-2), (torch.float16, 1e-2)], ids=["bfloat16", "float16"])
def test_half_precision_passes(dtype: torch.dtype, most: float) -> None:
    """Within what the dtype can do, and not within what float32 must."""
    assert 1e-4 < held(Candidate(label="sigma-moe", config=SIGMA), 100, dtype)["output"] < most


def test_formula_is_the_reference() -> None:
    """Dense products over all pairs give what the slow reference gives."""
    selecting = [config for name in ("topk", "pkm") for config in method_class(name).examples()]
    for config in (DENSE, SIGMA, INNER, dataclasses.replace(INNER, inner_k=100), *selecting):
        layer = build_layer(config, setting(9), 0).double().eval()
        x = torch.randn(9, config.d_model, dtype=torch.float64)
        torch.testing.assert_close(layer.formula_TD(x), layer.reference(x))


def test_long_batches_are_compared_at_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the truth would take too long, evenly spaced tokens stand for all."""
    monkeypatch.setattr("sparseffn.bench.correctness._MOST_FLOPS", 12 * 16 * 64 * 5)
    tokens = compared_tokens(SIGMA.build(), 1001)
    assert tokens.tolist() == [0, 250, 500, 750, 1000]
    assert held(Candidate(label="sigma-moe", config=SIGMA), 1001)["gradient of experts.keys"] < 1e-5


@pytest.mark.parametrize("config", [TOPK, PKM_OF_TWO, INNER], ids=["topk", "pkm", "inner-top-k"])
def test_pairs_are_compared_on_every_token(config: FFNConfig) -> None:
    """Methods that rank hundreds of pairs, each of 700 tokens, whose choices do not hang on rounding."""
    truth = find_truth(config, setting(700))
    assert truth.tokens.tolist() == list(range(700)) and int((truth.grad != 0).any(dim=1).sum()) > 680
    assert held(Candidate(label=config.name, config=config), 700)["output"] < 1e-5


@pytest.mark.parametrize("config", [TOPK, PKM_OF_TWO, INNER], ids=["topk", "pkm", "inner-top-k"])
def test_wrong_row_of_a_late_token_is_refused(config: FFNConfig) -> None:
    """One of 700 tokens, that a sample of eight would miss."""

    class Wrong(nn.Module):
        def __init__(self, layer: FeedForward) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            return torch.cat((y[:-7], -y[-7:-6], y[-6:]))

    with pytest.raises(UserError, match="must agree with float64"):
        held(Candidate(label="wrong", config=config, wrap=Wrong), 700)


def test_tokens_have_a_clear_choice() -> None:
    """No choice of an expert hangs on rounding."""
    layer = build_layer(SIGMA, setting(500), 0).double()
    x = clear_tokens(layer, setting(500), seed=0)
    logits = (x.double() @ layer.router.selector.t()).sort(dim=1, descending=True).values
    assert x.shape == (500, 16) and bool(((logits[:, 1] - logits[:, 2]) > 1e-4 * (logits[:, 0] - logits[:, -1])).all())


def test_no_gradient_is_sent_through_a_kink() -> None:
    """A token all of whose scores are 0 is at the kink; of drawn ones hardly any is."""
    layer = build_layer(DENSE, setting(400), 0).double()
    x = torch.randn(400, 16, dtype=torch.float64)
    x[7] = 0
    near = near_kink(layer, x)
    assert bool(near[7]) and int(near.sum()) < 8
    truth = find_truth(DENSE, setting(4000))
    silent = (truth.grad == 0).all(dim=1)
    assert 0 < int(silent.sum()) < 40
    assert torch.equal(silent, near_kink(build_layer(DENSE, setting(4000), 0).double(), truth.x.double()))
