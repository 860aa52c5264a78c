"""Statistics gathered from layers inside foreign models."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from sparseffn.errors import UserError
from sparseffn.ffn import collect_stats
from sparseffn.ffn.sigma_moe import SigmaMoEConfig

CONFIG = SigmaMoEConfig(d_model=8, n_experts=4, expert_size=4, k=2)


def test_foreign_model_reports_each_layer_and_call() -> None:
    """A layer that runs twice reports twice; the loss is the sum."""
    shared, once = CONFIG.build(), CONFIG.build()
    model = nn.Sequential(shared, once, shared)
    with collect_stats(model) as stats:
        model(torch.randn(5, 8))
    assert [len(calls) for calls in stats.values()] == [2, 1]
    losses = [call.balance_loss for calls in stats.values() for call in calls]
    torch.testing.assert_close(stats.balance_loss, torch.stack(losses).sum())


def test_hooks_are_gone_after_the_context() -> None:
    """The model is as before, also when an error leaves the context."""
    model = nn.Sequential(CONFIG.build())
    with pytest.raises(RuntimeError, match="stop"), collect_stats(model):
        raise RuntimeError("stop")
    assert not model[0]._forward_hooks and not model[0]._forward_pre_hooks
    assert isinstance(model(torch.randn(2, 8)), torch.Tensor)


def test_contexts_nest() -> None:
    """Both contexts see the call, and the caller sees a tensor."""
    model = nn.Sequential(CONFIG.build())
    with collect_stats(model) as outer, collect_stats(model) as inner:
        y = model(torch.randn(3, 8))
    assert isinstance(y, torch.Tensor)
    assert len(outer["0"]) == len(inner["0"]) == 1


def test_caller_who_asks_for_statistics_still_gets_them() -> None:
    """`return_stats=True` inside a context returns them as ever."""
    layer = CONFIG.build()
    with collect_stats(layer) as stats:
        _, own = layer(torch.randn(3, 8), return_stats=True)
    assert stats["layer"][0] is own


def test_model_without_layers_is_refused() -> None:
    """There is nothing to collect from."""
    with pytest.raises(UserError, match="must hold a sparseffn layer"), collect_stats(nn.Linear(2, 2)):
        pass


def test_loss_of_a_context_in_which_nothing_ran_is_an_error() -> None:
    """A missing loss is not a loss of zero."""
    with collect_stats(CONFIG.build()) as stats:
        pass
    with pytest.raises(UserError, match="no layer reported"):
        _ = stats.balance_loss


def test_entropy_is_log_of_the_number_of_experts_when_all_are_alike() -> None:
    """Weights that are equal have the largest entropy there is."""
    layer = SigmaMoEConfig(d_model=8, n_experts=4, expert_size=4, k=4).build()
    with torch.no_grad():
        layer.router.selector.zero_()
    _, stats = layer(torch.randn(6, 8), return_stats=True)
    assert float(stats.entropy) == pytest.approx(torch.tensor(4.0).log().item())


HOOKS = {
    "forward": lambda router, see: router.register_forward_hook(see),
    "forward-pre": lambda router, see: router.register_forward_pre_hook(see),
    "global": lambda router, see: register_module_forward_hook(lambda module, *_: see() if module is router else None),
}


@pytest.mark.parametrize("n_tokens", [2, 200])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("hook", HOOKS)
def test_router_is_called_where_hooks_wait(hook: str, train: bool, n_tokens: int) -> None:
    """What others hang on the router sees each call, although few tokens and evaluation need no call of it."""
    layer, calls = CONFIG.build().train(train), []
    x = torch.randn(n_tokens, 8)
    with torch.set_grad_enabled(train):
        expected = layer(x)
        handle = HOOKS[hook](layer.router, lambda *_: calls.append(1))
        torch.testing.assert_close(layer(x), expected)
        handle.remove()
        torch.testing.assert_close(layer(x), expected)
    assert calls == [1]
