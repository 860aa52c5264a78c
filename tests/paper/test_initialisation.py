"""What the framework predicts of initialisation, held against measurements."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sparseffn.errors import UserError
from sparseffn.ffn.dense import DenseConfig
from sparseffn.ffn.sigma_moe import SigmaMoEConfig
from sparseffn.ffn.softmax_moe import SoftmaxMoEConfig
from sparseffn.ffn.softmax_renorm_moe import SoftmaxRenormMoEConfig
from sparseffn.models import TransformerXLConfig, keyed_generator
from sparseffn.paper.initialisation import (
    BlockScale,
    Inputs,
    gaussian_inputs,
    measure_block,
    measure_load,
    measure_start,
    text_inputs,
)
from sparseffn.paper.predictions import (
    Ranking,
    gate_square,
    largest_of_normals,
    load_norm_correlation,
    load_variation,
    load_variation_on,
    ranking,
    ratios,
)

SEEDS = range(10)
SCHEMES = [(init, rows) for init in ("shared", "standard", "switch") for rows in ("equal-norm", "free")]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Products are so small here that threads cost more than they give."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def mixture(**changes: Any) -> SigmaMoEConfig:
    """Sixteen experts of sixteen pairs, of which four are used."""
    sizes: dict[str, Any] = {"d_model": 64, "n_layers": 2, "n_experts": 16, "expert_size": 16, "k": 4}
    return SigmaMoEConfig(**{**sizes, **changes})


@cache
def dense_beside(seed: int) -> tuple[Inputs, BlockScale]:
    """Tokens of a seed, and the dense block on them."""
    inputs = gaussian_inputs(d_model=64, n_tokens=512, n_gradients=512, seed=seed)
    return inputs, measure_block(DenseConfig(d_model=64, d_ff=256, n_layers=2), inputs, seed=seed)


def measured_ratios(config: SigmaMoEConfig) -> dict[str, np.ndarray]:
    """Every ratio to the dense block, one a seed."""
    found: dict[str, list[float]] = {}
    for seed in SEEDS:
        inputs, dense = dense_beside(seed)
        start = measure_start(config, dense, inputs, seed=seed)
        for key, value in {**dataclasses.asdict(start.ratios), "gate_square": start.gate_square}.items():
            found.setdefault(key, []).append(value)
    return {key: np.array(values) for key, values in found.items()}


def distance(values: np.ndarray, wanted: float) -> float:
    """Of the mean from a prediction, in standard errors."""
    return abs(values.mean() - wanted) / (values.std(ddof=1) / math.sqrt(len(values)))


@pytest.mark.parametrize(("init", "rows"), SCHEMES, ids=[f"{init}-{rows}" for init, rows in SCHEMES])
def test_output_and_gradients_are_as_predicted(init: Any, rows: Any) -> None:
    """Within five standard errors over seeds, all five at once."""
    config = mixture(init=init, selector_init=rows)
    wanted = {**dataclasses.asdict(ratios(config)), "gate_square": gate_square(config)}
    found = measured_ratios(config)
    assert {key: distance(found[key], wanted[key]) for key in wanted if distance(found[key], wanted[key]) > 5} == {}


def test_prediction_of_another_scheme_is_refuted() -> None:
    """The test above can fail: by a factor of N_E, and by a gate of 1/2 that selection does not sharpen."""
    found = measured_ratios(mixture())
    assert distance(found["output"], ratios(mixture(init="standard")).output) > 50
    assert distance(found["output"], 4 / 16 * 0.25) > 5


def test_expert_size_does_not_enter_the_prediction() -> None:
    """Only K, N_E and depth do."""
    assert ratios(mixture(expert_size=64)) == ratios(mixture(expert_size=8))


@pytest.mark.parametrize("equal_norm", [True, False], ids=["equal-norm", "free"])
def test_law_of_the_selected_is_that_of_sorted_draws(equal_norm: bool) -> None:
    """Mean and mean square of the four largest of sixteen, drawn fifty thousand times."""
    law = Ranking(n_experts=16, k=4, d_model=16, equal_norm=equal_norm)
    rows = torch.randn(50_000, 16, 16, generator=keyed_generator(0, "rows"))
    if equal_norm:
        rows = rows / rows.norm(dim=2, keepdim=True) * 4
    # The token is 4 times the first unit vector; a row has norm 4 times its variance's root, hence t is its first entry.
    best = rows[:, :, 0].topk(4, dim=1).values
    assert law.mean_of_selected(lambda t: t) == pytest.approx(float(best.mean()), rel=0.01)
    assert law.mean_of_selected(lambda t: t**2) == pytest.approx(float(best.square().mean()), rel=0.01)
    assert law.mean_of_selected(np.ones_like) == pytest.approx(1.0, abs=1e-4)


def test_elasticity_is_the_tail_law_for_many_experts() -> None:
    """`tau phi(tau) / Q(tau)`: 1.2711 for a quarter is 0.6745 x 0.3178 / 0.25 = 0.857; zero for a half."""
    quarter = Ranking(n_experts=1024, k=256, d_model=4096, equal_norm=False)
    assert quarter.elasticity == pytest.approx(0.6745 * 0.3178 / 0.25, rel=0.01)
    assert Ranking(n_experts=64, k=32, d_model=64, equal_norm=False).elasticity == pytest.approx(0.0, abs=1e-6)


def loads(config: SigmaMoEConfig, n_tokens: int, seeds: range = SEEDS) -> list[Any]:
    """Load on isotropic tokens."""
    found = []
    for seed in seeds:
        inputs = gaussian_inputs(d_model=config.d_model, n_tokens=n_tokens, n_gradients=8, seed=seed)
        dense = measure_block(DenseConfig(d_model=config.d_model, d_ff=16), inputs, seed=seed)
        found.append(measure_start(config, dense, inputs, seed=seed).load)
    return found


@pytest.mark.parametrize("rows", ["equal-norm", "free"])
def test_load_varies_as_predicted(rows: Any) -> None:
    """Within 15%: first order in 1 / d_model, 12 seeds of 16 experts."""
    config = mixture(d_model=256, selector_init=rows, expert_size=1, k=2)
    found = math.sqrt(np.mean([load.variation**2 for load in loads(config, 8192)]))
    assert found == pytest.approx(load_variation(config, 8192), rel=0.15)


def test_long_rows_win_below_half_and_lose_above() -> None:
    """The correlation of load and norm changes sign at K = N_E / 2; equal norms have none."""
    few, half, most = (mixture(selector_init="free", expert_size=1, k=k) for k in (2, 8, 14))
    means = [np.mean([load.norm_correlation for load in loads(config, 4096)]) for config in (few, half, most)]
    assert means[0] == pytest.approx(load_norm_correlation(few, 4096), abs=0.1)
    assert means[2] == pytest.approx(load_norm_correlation(most, 4096), abs=0.1)
    assert means[0] > 0.8 and abs(means[1]) < 0.3 and means[2] < -0.8
    assert loads(mixture(expert_size=1), 64, range(1))[0].norm_correlation is None
    assert load_norm_correlation(mixture(), 64) is None


def test_tokens_that_repeat_make_the_load_uneven_as_predicted() -> None:
    """Sixty-four directions with Zipf's frequencies: far from isotropic, and row norms do not matter."""
    config = mixture(n_experts=64, k=8, expert_size=1)
    share = 1 / torch.arange(1, 65)
    variations, wanted = [], []
    for seed in SEEDS:
        generator = keyed_generator(seed, "directions")
        kinds = torch.multinomial(share, 2048, replacement=True, generator=generator)
        x_TD = F.layer_norm(torch.randn(64, 64, generator=generator), (64,))[kinds]
        inputs = dataclasses.replace(gaussian_inputs(d_model=64, n_tokens=8, n_gradients=8, seed=seed), x_TD=x_TD)
        dense = measure_block(DenseConfig(d_model=64, d_ff=16), inputs, seed=seed)
        variations.append(measure_start(config, dense, inputs, seed=seed).load.variation ** 2)
        wanted.append(load_variation_on(x_TD.double().numpy()[::2], config, 2048) ** 2)
    assert np.mean(variations) == pytest.approx(np.mean(wanted), rel=0.1)
    assert np.sqrt(np.mean(wanted)) > 5 * load_variation(config, 2048)


def test_both_forms_of_the_load_agree_on_isotropic_tokens() -> None:
    """By pairs of tokens, and by norms and angles of rows."""
    config = mixture(d_model=512, n_experts=256, k=32, selector_init="free")
    x_TD = gaussian_inputs(d_model=512, n_tokens=2048, n_gradients=1, seed=0).x_TD
    assert load_variation_on(x_TD.double().numpy(), config, 10**9) == pytest.approx(load_variation(config, 10**9), rel=0.05)


def softmax_gates(kind: Any) -> tuple[float, float]:
    """Predicted and measured mean square."""
    config = kind(d_model=64, n_layers=8, n_experts=64, expert_size=1, k=4)
    x_TD = gaussian_inputs(d_model=64, n_tokens=4096, n_gradients=1, seed=0).x_TD
    squares = []
    for seed in range(8):
        layer = config.build()
        layer.reset_parameters(keyed_generator(seed, "block"))
        squares.append(float(layer.router(x_TD, None).weights_TK.detach().square().mean()))
    gate = "softmax" if kind is SoftmaxMoEConfig else "renormalised"
    return gate_square(config, gate), float(np.mean(squares))


@pytest.mark.parametrize("kind", [SoftmaxMoEConfig, SoftmaxRenormMoEConfig], ids=["before", "after"])
def test_softmax_gates_are_about_as_predicted(kind: Any) -> None:
    """The denominator's mean stands for the denominator: 5%."""
    wanted, found = softmax_gates(kind)
    assert found == pytest.approx(wanted, rel=0.05)


def test_load_of_counts_done_by_hand() -> None:
    """Loads 0, 2, 4 with norms 1, 2, 3: mean 2, deviation sqrt(8 / 3), correlation 1, one of three dead."""
    load = measure_load(torch.tensor([0, 2, 4]), torch.tensor([1.0, 2.0, 3.0]))
    assert load.variation == pytest.approx(math.sqrt(8 / 3) / 2) and load.largest_over_mean == 2.0
    assert load.norm_correlation == pytest.approx(1.0) and load.dead == pytest.approx(1 / 3)


def test_text_inputs_are_what_the_last_block_receives() -> None:
    """Tokens of norm sqrt(d_model), a gradient of the loss, the same for the same seed."""
    block = DenseConfig(d_model=16, d_ff=32, n_layers=2)
    model = TransformerXLConfig(vocab_size=8, d_model=16, n_layers=2, n_heads=2, d_head=8, ffn=block)
    tokens = torch.randint(0, 8, (3, 11))
    first, again = (text_inputs(model, tokens[:, :-1], tokens[:, 1:], n_gradients=20, seed=1) for _ in range(2))
    assert first.x_TD.shape == (30, 16) and first.grad_TD.shape == (20, 16)
    torch.testing.assert_close(first.x_TD.norm(dim=1), torch.full((30,), 4.0), rtol=1e-3, atol=0)
    assert torch.equal(first.x_TD, again.x_TD) and torch.equal(first.grad_TD, again.grad_TD)
    assert float(first.grad_TD.abs().sum()) > 0


def test_more_gradients_than_tokens_are_refused() -> None:
    """Before anything is computed."""
    with pytest.raises(UserError, match=r"`n_gradients` must be in 1 .. n_tokens = 4; got 5; fix:"):
        gaussian_inputs(d_model=8, n_tokens=4, n_gradients=5, seed=0)


def test_largest_of_two_normals_is_known() -> None:
    """1 / sqrt(pi)."""
    assert largest_of_normals(2) == pytest.approx(1 / math.sqrt(math.pi), rel=1e-4)
    assert ranking(mixture(selector_init="free")).mean(lambda t: t**2) == pytest.approx(1.0, rel=1e-6)
