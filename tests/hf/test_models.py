"""Whole models of transformers compute the same with `experts_implementation="sparseffn"`."""

from __future__ import annotations

import importlib
import logging
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers: pip install 'sparseffn[hf]'")

from transformers import AutoModelForCausalLM

import sparseffn.hf
from hf.tiny import CONFIGS, build, largest_deviation, results, tokens
from sparseffn.hf import experts

# bfloat16 rounds by 2^-9 at each step, transformers' experts more often than ours; most tensors deviate by 1%, biases of keys,
# whose gradients nearly cancel, by 2.2%. Another activation changes them by more than 15%, see below.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("family", [name for name in CONFIGS if name != "hy_v4"])
def test_logits_and_gradients_are_those_of_eager(family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """And ours computed them."""
    calls = []
    monkeypatch.setattr(experts.ops, "experts", lambda *a, f=experts.ops.experts, **k: calls.append(1) or f(*a, **k))
    model = build(family, dtype)
    wanted = results(model, "eager")
    assert not calls
    assert largest_deviation(results(model, "sparseffn"), wanted) < TOLERANCES[dtype]
    assert len(calls) == 1


def test_another_implementation_deviates_more_than_the_tolerance() -> None:
    """What the test above allows is less than what another activation changes."""
    model = build("olmoe")
    wanted = results(model, "eager")
    model.model.layers[0].mlp.experts.act_fn = torch.nn.ReLU()
    assert largest_deviation(results(model, "sparseffn"), wanted) > 5 * TOLERANCES[torch.bfloat16]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_an_unknown_gate_is_computed_by_transformers_and_said_once(
    dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    """To the bit, with the reason."""
    experts._say_once.cache_clear()
    model = build("hy_v4", dtype)
    with caplog.at_level(logging.WARNING, logger="sparseffn"):
        found = [results(model, name) for name in ("sparseffn", "sparseffn", "grouped_mm", "eager")]
    assert largest_deviation(found[0], found[2]) == 0 and largest_deviation(found[0], found[3]) < max(1e-5, TOLERANCES[dtype])
    (said,) = [record.getMessage() for record in caplog.records if record.name.startswith("sparseffn")]
    assert "HYV4Experts" in said and "gate" in said and "is unknown" in said


def test_without_transformers_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an import alone would not."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match=r"must have transformers; got none; fix: pip install 'sparseffn\[hf\]'"):
        importlib.reload(sparseffn.hf)


def test_loads_with_the_implementation_and_generates(tmp_path: Path) -> None:
    """`from_pretrained(..., experts_implementation="sparseffn")`; the tokens are those of eager, with a cache."""
    build("olmoe").save_pretrained(tmp_path)
    found = []
    for name in ("eager", sparseffn.hf.IMPLEMENTATION):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation=name)
        assert model.config._experts_implementation == name
        found.append(model.generate(tokens(), max_new_tokens=8, do_sample=False, eos_token_id=None))
    assert found[0].shape == (2, 20) and torch.equal(*found)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "hy_v4"])
def test_compiles_without_a_break(family: str) -> None:
    """In one graph, value and gradients; also where transformers computes it."""
    model = build(family)
    model.set_experts_implementation("sparseffn")
    block = next(m for name, m in model.named_modules() if name.endswith("experts"))
    x, indices = torch.randn(5, 32, requires_grad=True), torch.rand(5, 8).topk(2).indices
    gates = torch.rand(5, 2, requires_grad=True)
    found = []
    for call in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        y = call(x, indices, gates)
        found.append((y, *torch.autograd.grad(y.square().sum(), (x, gates, *block.parameters()))))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_whole_model_compiles_without_a_break(backend: str) -> None:
    """Loss and gradients as without, also where nothing ran before; inductor sums in other orders."""
    torch.compiler.reset()
    model = build("olmoe")
    wanted = results(model, "sparseffn")
    model.zero_grad()
    torch.compile(model, fullgraph=True, backend=backend)(input_ids=tokens(), labels=tokens()).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    tolerance = 1e-6 if backend == "aot_eager" else TOLERANCES[torch.float32]
    assert largest_deviation(found, {name: t for name, t in wanted.items() if name != "logits"}) < tolerance


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "nemotron_h", "aria"])
def test_logits_and_gradients_on_cuda(family: str, dtype: torch.dtype) -> None:
    """By the Triton kernels; sums in another order than on the CPU."""
    model = build(family, dtype).cuda()
    wanted = results(model, "eager")
    assert largest_deviation(results(model, "sparseffn"), wanted) < 5 * TOLERANCES[dtype]


def test_autocast_computes_in_its_dtype() -> None:
    """As eager's linear layers do, forward and backward."""
    model = build("olmoe")
    found = []
    for name in ("eager", "sparseffn"):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(results(model, name))
    assert 1e-5 < largest_deviation(found[1], found[0]) < TOLERANCES[torch.bfloat16]


def test_trainer_trains(tmp_path: Path) -> None:
    """Losses of a few steps as with eager."""
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    from transformers import Trainer, TrainingArguments

    losses = []
    for name in ("eager", "sparseffn"):
        model = build("olmoe").train()
        model.set_experts_implementation(name)
        # All of the data in each batch: its order does not matter.
        options = {"per_device_train_batch_size": 2, "max_steps": 3, "learning_rate": 1e-2, "logging_steps": 1}
        arguments = TrainingArguments(
            output_dir=str(tmp_path / name), report_to=[], save_strategy="no", use_cpu=True, **options
        )
        data = [{"input_ids": row, "labels": row} for row in tokens()]
        trainer = Trainer(model=model, args=arguments, train_dataset=data)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0][-1] < losses[0][0] and losses[1] == pytest.approx(losses[0], rel=1e-4)
