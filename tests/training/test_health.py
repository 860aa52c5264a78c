"""What goes wrong in training is found and named: not finite, spikes, collapsed experts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from test_train import losses, weights

import sparseffn.training.loop as loop
import sparseffn.training.stepper as stepping
from sparseffn.data import Corpus
from sparseffn.errors import UserError
from sparseffn.ffn.base import BASEConfig
from sparseffn.ffn.sigma_moe import SigmaMoEConfig
from sparseffn.models import TransformerXL, TransformerXLConfig
from sparseffn.training import NonFiniteLossError, RunFolder, TrainConfig, train
from sparseffn.training.health import SPIKE_WINDOW, LossSpikes, collapse, where_not_finite


class Poison:
    """Losses of some calls with one token that is not a number; two calls are a step."""

    def __init__(self, calls: set[int]) -> None:
        self.calls, self.count, self.honest = calls, 0, stepping.token_losses

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        found = self.honest(logits, targets)
        self.count += 1
        if self.count not in self.calls:
            return found
        # By a product, so that the gradients of the step are not finite either.
        spoilt = torch.ones_like(found)
        spoilt[1, 9] = torch.nan
        return found * spoilt


def test_the_stream_and_the_token_are_named(
    tmp_path: Path, corpus: Corpus, model: TransformerXLConfig, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the second micro-batch of step 8: stream 2 + 1 of window 7."""
    monkeypatch.setattr(stepping, "token_losses", Poison({16}))
    with pytest.raises(NonFiniteLossError, match=r"at step 8.*token 9 in stream 3 of window 7.*--non-finite skip"):
        train(model, config, corpus, tmp_path / "run")


def test_a_skipped_step_is_noted_and_a_run_with_one_goes_on_bit_by_bit(
    tmp_path: Path, corpus: Corpus, model: TransformerXLConfig, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped run takes the step again; without poison no number changes."""
    monkeypatch.setattr(stepping, "token_losses", Poison({16}))
    result = train(model, config, corpus, tmp_path / "run", non_finite="skip")
    folder = RunFolder(tmp_path / "run")
    assert [record["step"] for record in losses(folder.path) if "loss" in record] == [*range(1, 8), *range(9, 13)]
    assert "1 step was left out: loss or gradient were not finite" in result.notes and folder.n_skipped() == 1
    assert all(bool(tensor.isfinite().all()) for tensor in weights(folder.path).values())
    monkeypatch.setattr(stepping, "token_losses", Poison({16}))
    with pytest.raises(NonFiniteLossError):
        train(model, config, corpus, tmp_path / "stopped")
    # The checkpoint is of step 5: step 8 is its third, of the sixth call.
    monkeypatch.setattr(stepping, "token_losses", Poison({6}))
    again = train(model, config, corpus, tmp_path / "stopped", non_finite="skip")
    assert (again.valid, losses(tmp_path / "stopped")) == (result.valid, losses(folder.path))
    monkeypatch.undo()
    plain = [train(model, config, corpus, tmp_path / policy, non_finite=policy).test for policy in ("stop", "skip")]  # pyright: ignore[reportArgumentType]
    assert plain[0] == plain[1] != result.test


def test_skipping_ends_when_nothing_else_comes(
    tmp_path: Path, corpus: Corpus, model: TransformerXLConfig, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After ten steps in a row; no checkpoint holds what is not finite."""
    monkeypatch.setattr(stepping, "token_losses", Poison(set(range(1, 100))))
    with pytest.raises(NonFiniteLossError, match="at step 11, which was not taken"):
        train(model, config, corpus, tmp_path / "run", non_finite="skip")
    assert all(bool(tensor.isfinite().all()) for tensor in weights(tmp_path / "run").values())
    with pytest.raises(UserError, match=r"unknown `non_finite` 'skip_'; fix: did you mean 'skip'"):
        train(model, config, corpus, tmp_path / "run", non_finite="skip_")  # pyright: ignore[reportArgumentType]


def test_the_tensor_is_named(model: TransformerXLConfig) -> None:
    """A parameter, a module's output, a gradient: whatever is the first in the chain."""
    net, tokens = TransformerXL(model), torch.zeros(2, 3, dtype=torch.int64)
    net.init_parameters(0)
    finite = torch.zeros(2, 3)
    assert where_not_finite(net, finite, tokens, tokens, 0) == ""
    parameters = dict(net.named_parameters())
    selector = parameters["layers.1.ffn.router.selector"]
    selector.grad = torch.full_like(selector, torch.inf)
    assert where_not_finite(net, finite, tokens, tokens, 0) == "the gradients of layers.1.ffn.router.selector"
    with torch.no_grad():
        parameters["layers.0.ffn.experts.values"].fill_(3e38)
    assert where_not_finite(net, finite, tokens, tokens, 0) == "the output of layers.0.ffn.experts"
    with torch.no_grad():
        net.norm.weight[0] = torch.nan
    assert where_not_finite(net, finite, tokens, tokens, 0) == "parameters norm.weight"


def test_spikes_are_told_from_noise() -> None:
    """Once there are enough losses to compare with."""
    noise = [3.0 + 0.1 * (i % 3) for i in range(SPIKE_WINDOW)]
    assert all(LossSpikes(noise[:n]).note(9.0) is None for n in (0, SPIKE_WINDOW - 1))
    assert LossSpikes(noise).note(3.5) is None
    assert "jumped to 9.000 nats, from 3.0" in str(LossSpikes([9.0, *noise]).note(9.0))


def test_collapsed_experts_are_told_with_the_remedy(
    tmp_path: Path,
    corpus: Corpus,
    model: TransformerXLConfig,
    config: TrainConfig,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The worst layer; an even load, and few experts, are none. In a run, once the router has learned."""
    ffn = SigmaMoEConfig(d_model=16, n_experts=8, expert_size=4, k=2, entropy_weight=0.01)
    even = torch.arange(1600).view(800, 2) % 8
    assert collapse([even], ffn) is None
    half = collapse([even, even % 4], ffn)
    assert half is not None and "in layer 1, 50% of 8 experts" in half and "largest load is 2.0 times" in half
    assert "fix: raise entropy_weight (now 0.01)" in half
    hot = torch.stack((torch.zeros(800, dtype=torch.int64), torch.arange(800) % 7 + 1), dim=1)
    assert "largest load is 4.0 times the mean" in str(collapse([hot], ffn))
    assert collapse([hot % 4], dataclasses.replace(ffn, n_experts=4)) is None
    assert "fix: choose a method with a balancing loss" in str(
        collapse([even % 4], BASEConfig(d_model=16, n_experts=8, expert_size=4))
    )
    off = SigmaMoEConfig(d_model=16, n_experts=32, expert_size=4, k=1, entropy_weight=0.0)
    sparse = dataclasses.replace(model, ffn=off)
    monkeypatch.setattr(loop, "COLLAPSE_FROM", 7)
    train(sparse, dataclasses.replace(config, lr=0.5), corpus, tmp_path / "run")
    assert "set entropy_weight, switch_weight, cv_weight" in caplog.text
    warned = [line for line in RunFolder(tmp_path / "run").metrics_path.read_text().splitlines() if '"experts collapse' in line]
    assert len(warned) == 1 and '"step": 12' in warned[0]
