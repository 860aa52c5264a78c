"""What the routers promise, by hand-checked cases."""

from __future__ import annotations

import math
from collections import Counter
from types import SimpleNamespace
from typing import Any, AnyStr, Generic, Literal, cast

import pytest
import torch
from torch import Tensor

from sparseffn.errors import UserError
from sparseffn.ffn import list_methods, method_class
from sparseffn.ffn.base import BASEConfig
from sparseffn.ffn.dense import DenseConfig
from sparseffn.ffn.mixture import MixtureConfig
from sparseffn.ffn.noisy_moe import NoisyMoEConfig
from sparseffn.ffn.pkm import PKMConfig
from sparseffn.ffn.routers import Batch, Routing, TopKRouter, cv_loss, entropy_loss, switch_loss
from sparseffn.ffn.s_base import SBASEConfig
from sparseffn.ffn.sigma_moe import SigmaMoEConfig
from sparseffn.ffn.softmax_moe import SoftmaxMoEConfig, SoftmaxRouter
from sparseffn.ffn.softmax_renorm_moe import RenormRouter, SoftmaxRenormMoEConfig
from sparseffn.ffn.switch import SwitchConfig
from sparseffn.ops.plain import gates_plain

SIZES = {"d_model": 8, "n_experts": 6, "expert_size": 4}


def routing(logits: Tensor, chosen: list[list[int]], weights: list[list[float]]) -> Routing:
    """A routing by hand."""
    return Routing(logits, torch.tensor(chosen), torch.tensor(weights))


def test_entropy_loss_is_minus_the_entropy_of_the_mean() -> None:
    """Two tokens that are sure of different experts are balanced: minus log 2."""
    logits = torch.tensor([[50.0, 0.0], [0.0, 50.0]])
    assert float(entropy_loss(logits, None)) == pytest.approx(-math.log(2))


def test_entropy_loss_is_of_the_whole_batch_and_not_of_its_tokens() -> None:
    """Tokens that agree are unbalanced: 0, the largest there is."""
    logits = torch.tensor([[50.0, 0.0], [50.0, 0.0]])
    assert float(entropy_loss(logits, None)) == pytest.approx(0.0, abs=1e-6)


def test_switch_loss_of_equal_loads_is_one() -> None:
    """`N_E f . p` is 1 when both are uniform, and N_E when all is one expert's, for every K."""
    even = routing(torch.zeros(2, 2), [[0], [1]], [[0.5], [0.5]])
    assert float(switch_loss(even, None)) == pytest.approx(1.0)
    one = routing(torch.tensor([[50.0, 0.0]] * 2), [[0], [0]], [[1.0], [1.0]])
    assert float(switch_loss(one, None)) == pytest.approx(2.0)


def test_cv_loss_is_variance_over_squared_mean() -> None:
    """Loads 3 and 1: variance 1, mean 2."""
    found = cv_loss(routing(torch.zeros(2, 2), [[0, 1], [0, 1]], [[1.0, 0.5], [2.0, 0.5]]))
    assert float(found) == pytest.approx(0.25)


@pytest.mark.parametrize("config_class", [SigmaMoEConfig, SoftmaxMoEConfig, SoftmaxRenormMoEConfig, SBASEConfig])
def test_expert_dropout_of_nearly_everything_gives_zeros_and_no_nan(config_class: type[SigmaMoEConfig]) -> None:
    """Missing selections weigh exactly 0, and gradients stay finite."""
    layer = config_class(**SIZES, k=3, expert_dropout=0.95).build().train()
    y, stats = layer(torch.randn(64, 8), return_stats=True)
    (y.sum() + stats.balance_loss).backward()
    assert int(stats.counts.sum()) < 64 * 3 * 0.3
    assert bool((y == 0).all(dim=1).any())
    assert all(bool(p.grad.isfinite().all()) for p in layer.parameters() if p.grad is not None)


def test_expert_dropout_does_not_rescale() -> None:
    """A surviving expert keeps its sigmoid (equation 22)."""
    layer = SigmaMoEConfig(**SIZES, k=6, expert_dropout=0.5).build().train()
    x = torch.randn(40, 8)
    routed = layer.router(x, None)
    alive = routed.weights_TK != 0
    wanted = routed.logits_TE.gather(1, routed.indices_TK).sigmoid()
    torch.testing.assert_close(routed.weights_TK[alive], wanted[alive])
    assert 0.4 < float(alive.float().mean()) < 0.6


@pytest.mark.parametrize("released", [False, True], ids=["correct", "released"])
def test_sinkhorn_balances_only_as_published(released: bool) -> None:
    """Largest over mean load in training: about 1 when correct, clearly more as released."""
    config = SBASEConfig(d_model=16, n_experts=16, expert_size=4, k=4, sinkhorn="released" if released else "correct")
    layer = config.build().train()
    with torch.no_grad():
        layer.router.selector.normal_(0.0, 0.75)
    _, stats = layer(torch.randn(4096, 16), return_stats=True)
    worst = float(stats.counts.max() / stats.counts.float().mean())
    assert (worst > 1.3) if released else (worst < 1.25)


@pytest.mark.parametrize("sinkhorn", ["correct", "released"])
def test_released_sinkhorn_balances_each_sequence_by_itself(sinkhorn: Literal["correct", "released"]) -> None:
    """By hand: `a = (-12.59, -10.78)` for logits (2, 0), (1, 0), so that the second token prefers the second expert.

    Its mirror image (0, 2), (0, 1) gives the mirrored choice. Over both as one sequence a is equal for both experts.
    """
    layer = SBASEConfig(d_model=2, n_experts=2, expert_size=4, k=1, sinkhorn=sinkhorn).build().train()
    with torch.no_grad():
        layer.router.selector.copy_(torch.eye(2))
    x = torch.tensor([[[2.0, 0.0], [1.0, 0.0]], [[0.0, 2.0], [0.0, 1.0]]])
    chosen = [layer(y, return_stats=True)[1].selection.indices.tolist() for y in (x, x.flatten(0, 1))]
    assert chosen == [[0, 1, 1, 0] if sinkhorn == "released" else [0, 0, 1, 1], [0, 0, 1, 1]]
    torch.testing.assert_close(layer(x), layer.reference(x))
    assert not layer(x, mask=torch.tensor([[True, True], [True, False]]))[1, 1].any()


def test_released_sinkhorn_is_exported_for_any_number_of_sequences_of_any_length() -> None:
    """No length becomes a constant of the graph."""
    layer = SBASEConfig(d_model=8, n_experts=5, expert_size=4, k=2, sinkhorn="released").build().train()
    sizes = {0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("length", min=2)}
    exported = torch.export.export(layer, (torch.randn(3, 7, 8),), dynamic_shapes=[sizes]).module()
    for shape in ((4, 9, 8), (2, 3, 8)):
        x = torch.randn(shape)
        torch.testing.assert_close(exported(x), layer(x))


def test_base_gives_every_expert_its_share_in_training() -> None:
    """19 tokens on 6 experts: 3 or 4 each; padding takes no place."""
    layer = BASEConfig(**SIZES).build().train()
    mask = torch.arange(25) < 19
    _, stats = layer(torch.randn(25, 8), mask=mask, return_stats=True)
    assert sorted(stats.counts.tolist()) == [3, 3, 3, 3, 3, 4]


def test_switch_capacity_serves_the_first_and_counts_the_rest() -> None:
    """All tokens want one expert; 2 of 8 find a place in each of 4 experts at factor 1."""
    layer = SwitchConfig(d_model=8, n_experts=4, expert_size=4, capacity_factor=1.0).build().train()
    x = torch.randn(1, 8).expand(8, 8)
    y, stats = layer(x, return_stats=True)
    assert int(stats.dropped) == 6
    assert bool(y[:2].any(dim=1).all()) and not bool(y[2:].any())
    assert int(layer.eval()(x, return_stats=True)[1].dropped) == 0


@pytest.mark.parametrize("seed", range(4))
def test_places_go_to_those_who_come_first(seed: int) -> None:
    """As a loop hands them out, past padding and experts that dropout removed; a token that is not finite takes one too."""
    sizes = {"d_model": 8, "n_experts": 3, "expert_size": 4}
    layer = SwitchConfig(**sizes, k=2, capacity_factor=0.5, expert_dropout=0.3, selector_init="free").build().train()
    x, mask = torch.randn(40, 8, generator=torch.Generator().manual_seed(seed)), torch.arange(40) % 5 != 2
    x[0] = torch.nan
    routings = []
    for route in (SoftmaxRouter.forward, type(layer.router).forward):
        torch.manual_seed(seed)
        routings.append(route(layer.router, x, mask))
    (free, found), capacity = routings, 0.5 * 2 * int(mask.sum()) / 3
    wanted, taken, lost = free.weights_TK.clone(), Counter[int](), 0
    for t, experts in enumerate(free.indices_TK.tolist()):
        for slot, expert in enumerate(experts):
            if bool(free.weights_TK[t, slot] != 0):
                # Which a NaN is, too.
                taken[expert] += 1
                if taken[expert] > capacity:
                    wanted[t, slot], lost = 0.0, lost + 1
    assert lost > 5 and int(found.dropped) == lost
    torch.testing.assert_close(found.weights_TK, wanted, rtol=0, atol=0, equal_nan=True)


def test_noise_is_drawn_in_training_only_and_starts_undecided() -> None:
    """Evaluation of a fresh layer sees ties, which go to the first experts."""
    layer = NoisyMoEConfig(**SIZES, k=2).build()
    _, training = layer.train()(torch.randn(300, 8), return_stats=True)
    _, evaluation = layer.eval()(torch.randn(300, 8), return_stats=True)
    assert int((training.counts > 0).sum()) == 6
    assert evaluation.counts.tolist() == [300, 300, 0, 0, 0, 0]


@pytest.mark.parametrize("method", [name for name in list_methods() if issubclass(method_class(name), MixtureConfig)])
def test_router_does_what_its_config_says(method: str) -> None:
    """What weights, and when that is one operation with the logits: studies and predictions go by the config."""
    for config in method_class(method).examples():
        router = config.build().router
        assert router.gate == config.gate
        if getattr(config, "capacity_factor", None) is None:
            assert router.in_one_operation == ("always" if config.trains_as_it_evaluates else "evaluation")


def test_select_that_overrides_another_is_called() -> None:
    """Also where its parent selects in one operation."""

    class LastRouter(SoftmaxRouter):
        def select(self, logits_TE: Tensor, batch: Batch) -> Routing:
            return super().select(logits_TE.flip(1), batch)._replace(logits_TE=logits_TE)

    class Mixin:
        def select(self, logits_TE: Tensor, batch: Batch) -> Routing:
            return LastRouter.select(self, logits_TE, batch)  # pyright: ignore[reportArgumentType]

    class MixedRouter(Mixin, SoftmaxRouter, Generic[AnyStr]):
        """And what else hangs on being made a subclass works."""

    class DoubledRouter(SoftmaxRouter):
        def logits(self, x_TD: Tensor) -> Tensor:
            return 2 * super().logits(x_TD)

    class Silent(TopKRouter):
        score = SoftmaxRouter.score

    assert {router.in_one_operation for router in (LastRouter, MixedRouter, DoubledRouter)} == {"never"}
    assert SoftmaxRouter.in_one_operation == "always" and MixedRouter[str]
    layer = SoftmaxMoEConfig(**SIZES, k=2, expert_dropout=0.3).build()
    with pytest.raises(TypeError, match="Silent must have a `select` of its own, or a config with a `gate`"):
        Silent(cast("Any", SimpleNamespace(gate=None)))
    x, plain = torch.randn(20, 8), layer.router
    layer.router = LastRouter(layer.config)
    layer.router.selector = plain.selector
    for training in (False, True):
        torch.manual_seed(0)
        found = layer.train(training).router(x, None)
        torch.manual_seed(0)
        keep = layer.router.draw_keep(x)
        wanted = gates_plain(
            found.logits_TE.flip(1), found.indices_TK, "softmax", None if keep is None else keep.gather(1, found.indices_TK)
        )
        torch.testing.assert_close(found.weights_TK, wanted)


@pytest.mark.parametrize("gate_of", [SigmaMoEConfig, SoftmaxMoEConfig, SoftmaxRenormMoEConfig])
def test_one_operation_is_what_select_does(gate_of: Any) -> None:
    """With expert dropout, which leaves some tokens fewer than K experts, and without."""
    router = gate_of(**SIZES, k=4, expert_dropout=0.5).build().router
    x = torch.randn(50, 8)
    for training in (False, True):
        torch.manual_seed(0)
        found = router.train(training)(x, None)
        torch.manual_seed(0)
        wanted = router.select(found.logits_TE, Batch(x, keep_TE=router.draw_keep(x)))
        assert torch.equal(found.indices_TK, wanted.indices_TK)
        torch.testing.assert_close(found.weights_TK, wanted.weights_TK)


def test_another_router_in_its_place_decides() -> None:
    """Not what the layer's config says."""
    layer, other = SigmaMoEConfig(**SIZES, k=2).build().eval(), SoftmaxRenormMoEConfig(**SIZES, k=2).build().eval()
    other.load_state_dict(layer.state_dict())
    layer.router = RenormRouter(other.config)
    layer.router.selector = other.router.selector
    x = torch.randn(5, 8)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), other(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_router_logits_are_float32_in_a_half_precision_layer(dtype: torch.dtype) -> None:
    """Whatever the layer's dtype, and under autocast."""
    layer = SigmaMoEConfig(**SIZES, k=2).build().to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer.router(torch.randn(5, 8, dtype=dtype), None).logits_TE.dtype == torch.float32


def test_shared_initialisation_has_the_spread_of_the_dense_block() -> None:
    """Values with all pairs as fan-in (shared), with one expert's (standard), at a tenth of the variance (switch)."""
    sizes = {"d_model": 64, "n_experts": 16, "expert_size": 32, "k": 2, "n_layers": 4}
    stds = {
        init: SigmaMoEConfig(**sizes, init=init).build().experts.values.detach().std()
        for init in ("shared", "standard", "switch")
    }
    wanted = {"shared": (2 / (512 * 4)) ** 0.5, "standard": (2 / (32 * 4)) ** 0.5, "switch": (0.2 / (32 * 4)) ** 0.5}
    assert {k: float(v) for k, v in stds.items()} == pytest.approx(wanted, rel=0.02)


def test_selector_rows_have_equal_norm_and_the_spread_of_the_keys() -> None:
    """Equal norms by default; free rows differ."""
    sizes = {"d_model": 64, "n_experts": 16, "expert_size": 32, "k": 2}
    equal = SigmaMoEConfig(**sizes).build().router.selector.detach()
    free = SigmaMoEConfig(**sizes, selector_init="free").build().router.selector.detach()
    assert float(equal.norm(dim=1).std()) < 1e-6 < float(free.norm(dim=1).std())
    assert float(equal.std(correction=0)) == pytest.approx((2 / 64) ** 0.5, rel=1e-4)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SigmaMoEConfig(**SIZES, k=7), "`k` must be at most n_experts = 6; got 7"),
        (lambda: SoftmaxRenormMoEConfig(**SIZES, k=1), "constant 1 and its selector never learns"),
        (lambda: NoisyMoEConfig(**SIZES, k=1), "constant 1 and its selector never learns"),
        (lambda: PKMConfig(d_model=7, n_subkeys=3, k=2), "`d_model` must be even"),
        (lambda: PKMConfig(d_model=8, n_subkeys=3, k=10), "at most the number of values 9"),
        (lambda: SigmaMoEConfig(**SIZES, k=2, inner_k=9), "at most k x expert_size = 8"),
        (lambda: DenseConfig(d_model=8, d_ff=0), "`d_ff` must be at least 1; got 0"),
        (lambda: method_class("sigma-mo"), "did you mean 'sigma-moe'"),
    ],
    ids=["k", "renorm-k-1", "noisy-k-1", "odd-pkm", "pkm-k", "inner-k", "d_ff", "name"],
)
def test_bad_values_are_refused_with_the_remedy(make: object, words: str) -> None:
    """The error names the value, what was expected and what to do."""
    with pytest.raises(UserError, match=words):
        make()  # type: ignore[operator]


def test_pkm_reads_exactly_k_values_a_head() -> None:
    """The sparse form reads heads x k values, the released form every value."""
    sparse = PKMConfig(d_model=8, n_subkeys=6, n_heads=3, k=4, activation="softmax").build()
    _, stats = sparse(torch.randn(10, 8), return_stats=True)
    assert int(stats.counts.sum()) == 10 * 3 * 4
    dense = PKMConfig(d_model=8, n_subkeys=6, n_heads=3, k=None, activation="softmax").build()
    assert int((dense.coefficients(torch.randn(10, 8)) != 0).sum()) == 10 * 36
