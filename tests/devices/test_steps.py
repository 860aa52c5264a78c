"""Whole steps of every method under modes that refuse mixed devices and tensors whose device nobody named."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from devices import modes
from devices.modes import NamedDevice, OneDevice
from sparseffn.analysis.run import RunCounts
from sparseffn.devices import PRECISIONS
from sparseffn.evaluation import evaluate
from sparseffn.ffn import FFNConfig, list_methods, method_class
from sparseffn.models import TransformerXL, TransformerXLConfig
from sparseffn.models.generation import generate
from sparseffn.training import TrainConfig
from sparseffn.training import stepper as stepping
from sparseffn.training.stepper import Stepper, read_steps

VOCAB = 31
CONFIG = TrainConfig(steps=2, batch=4, context=6, memory=6, eval_memory=9, eval_batch=3, accumulation=2, lr=1e-3)
CASES = [
    pytest.param(config, id=f"{name}-{i}") for name in list_methods() for i, config in enumerate(method_class(name).examples())
]
META = torch.device("meta")


@contextmanager
def refusing() -> Iterator[None]:
    """Both modes."""
    with ExitStack() as stack:
        stack.enter_context(OneDevice())
        stack.enter_context(NamedDevice())
        yield


def model(ffn: FFNConfig) -> TransformerXL:
    """Two layers with dropout."""
    config = TransformerXLConfig(vocab_size=VOCAB, d_model=ffn.d_model, n_layers=2, n_heads=2, d_head=4, dropout=0.1, ffn=ffn)
    net = TransformerXL(config)
    net.init_parameters(0)
    return net


def window(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of a step."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCAB, (CONFIG.batch, CONFIG.context + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


TEXT = np.arange(100) * 7 % VOCAB


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("ffn", CASES)
def test_training_names_every_device(ffn: FFNConfig, precision: Any) -> None:
    """Two steps of two micro-batches, the second with memory, read in one piece; only scaled gradients may overflow."""
    config = dataclasses.replace(CONFIG, precision=precision)
    stepper = Stepper(model(ffn).train(), config)
    with refusing():
        done = [stepper.take(*window(i), lr=1e-3) for i in range(2)]
        read = read_steps(done, config)
    assert all(numbers.finite or (numbers.overflowed and precision == "float16") for numbers in read)


@pytest.mark.parametrize("ffn", CASES)
def test_references_name_every_device(ffn: FFNConfig) -> None:
    """They are compared with kernels on a GPU."""
    layer, x = ffn.build().eval(), torch.randn(3, ffn.d_model)
    with refusing():
        assert layer.reference(x).shape == x.shape


@pytest.mark.parametrize("ffn", CASES)
def test_evaluation_and_analysis_name_every_device(ffn: FFNConfig) -> None:
    """With a last window that is not full, and everything that an analysis counts."""
    net = model(ffn)
    counts = RunCounts(net, [TEXT])
    with refusing():
        evaluate(net, TEXT, batch=3, context=8, memory=12)
        counts.read(net, TEXT[:91], CONFIG, None)
    assert counts.usage.result().usage


@pytest.mark.parametrize("ffn", CASES)
def test_generation_names_every_device(ffn: FFNConfig) -> None:
    """Greedy and sampled, past the length of the cache."""
    net = model(ffn)
    with refusing():
        greedy = generate(net, [1, 2, 3], 6, memory_length=4)
        sampled = generate(net, [1, 2, 3], 2, temperature=1.0, top_k=3, generator=torch.Generator().manual_seed(0))
    assert len(greedy) == 6 and len(sampled) == 2


@pytest.mark.parametrize("ffn", CASES)
def test_a_training_step_reads_no_number(ffn: FFNConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device there are none; every tensor of a step is there, losses and gradient norm included."""
    # PyTorch's fused optimisers have no kernel there.
    monkeypatch.setattr(
        stepping, "make_optimizer", lambda net, config, groups: torch.optim.RMSprop(net.parameters(), foreach=True)
    )
    stepper = Stepper(model(ffn).to(META).train(), CONFIG)
    with refusing():
        done = [stepper.take(*window(i), lr=1e-3) for i in range(2)]
    assert [numbers.device for numbers in done] == [META, META]
    assert all(p.grad is not None and p.grad.device == META for p in stepper.model.parameters())


@pytest.mark.parametrize("ffn", CASES)
def test_a_window_of_evaluation_reads_no_number(ffn: FFNConfig) -> None:
    """Statistics and counts of an analysis included."""
    net, done = model(ffn).to(META), []
    counts = RunCounts(net, [TEXT])
    with refusing(), pytest.raises(RuntimeError, match="cannot be called on meta tensors"):
        # The result is read, and that after the last window.
        counts.read(net, TEXT[:91], CONFIG, lambda n_done, n_tokens: done.append(n_tokens - n_done))
    assert done[-1] == 0
    assert [layer.counts.device for layer in counts.usage.layers.values()] == [META, META]


def test_modes_find_what_they_are_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixed devices, a tensor on no named device, and numbers copied to a device, each made by a file of the package."""
    assert Stepper.take.__code__.co_filename.removesuffix("training/stepper.py") == modes.PACKAGE
    with OneDevice(), pytest.raises(AssertionError, match="got tensors on"):
        torch.add(torch.zeros(2, device=META), torch.zeros(2))
    with OneDevice():
        torch.add(torch.zeros(2, device=META), torch.zeros(()))
    for made, message in (
        (lambda: torch.zeros(2), "without a device"),
        (lambda: torch.zeros(2, device=META).new_tensor(3.0), "copies Python numbers"),
        (lambda: torch.tensor([1], device=META), "copies Python numbers"),
    ):
        monkeypatch.setattr(modes, "PACKAGE", __file__.removesuffix("test_steps.py"))
        with NamedDevice(), pytest.raises(AssertionError, match=message):
            made()
