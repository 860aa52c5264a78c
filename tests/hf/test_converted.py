"""Models with replaced blocks are saved and loaded again as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers: pip install 'sparseffn[hf]'")

from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from hf.dense import build, ids
from sparseffn.errors import UserError
from sparseffn.hf import ConvertedForCausalLM, replace_ffn, save_converted


@pytest.mark.parametrize(("family", "method"), [("llama", "sigma-moe"), ("gpt2", "topk"), ("gemma3", "switch")])
def test_a_folder_loads_with_the_same_numbers(family: str, method: str, tmp_path: Path) -> None:
    """Tied or not, with GPT-2's dropout after the block, by AutoModelForCausalLM alone; and once more from what was loaded."""
    model = build(family)
    sizes = {"k": 8} if method == "topk" else {"init": "upcycle", "n_experts": 3, "k": 1}
    replace_ffn(model, method, **sizes)
    wanted = model(ids()).logits
    save_converted(model, tmp_path / "first")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    assert isinstance(loaded, ConvertedForCausalLM) and torch.equal(loaded(ids()).logits, wanted)
    loaded.save_pretrained(tmp_path / "second", max_shard_size="20KB")
    assert len(list((tmp_path / "second").glob("*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    assert torch.equal(again(ids()).logits, wanted)
    found, known = dict(again.named_parameters()), dict(model.named_parameters())
    assert found.keys() == {f"model.{name}" for name in known}
    assert type(again.model) is type(model)


def test_generate_and_loss_are_the_family_s(tmp_path: Path) -> None:
    """With the cache, sampling settings and labels passed on; in bfloat16."""
    model = build("qwen3", torch.bfloat16)
    replace_ffn(model, "topk", 1, k=24)
    wanted = model.generate(ids(2, 5), max_new_tokens=12, do_sample=False)
    save_converted(model, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded.generate(ids(2, 5), max_new_tokens=12, do_sample=False), wanted)
    assert torch.equal(loaded.generate(ids(2, 5), max_new_tokens=12, do_sample=False, use_cache=False), wanted)
    loaded.train().activation_checkpointing_enable()
    loss = loaded(input_ids=ids(), labels=ids()).loss
    loss.backward()
    # Rounding: for a backward other kernels run.
    torch.testing.assert_close(loss, model(input_ids=ids(), labels=ids()).loss, rtol=2e-3, atol=0)
    assert all(p.grad is not None for p in loaded.model.model.layers[1].mlp.parameters())


def test_a_model_without_replaced_blocks_is_not_saved(tmp_path: Path) -> None:
    """Nor is anything written, nor anything that is there overwritten."""
    with pytest.raises(UserError, match="`model` must have replaced feedforward blocks"):
        save_converted(build("llama"), tmp_path / "model")
    assert not list(tmp_path.iterdir())
    model = build("llama")
    replace_ffn(model, "topk", k=4)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="`folder` must be new or empty"):
        save_converted(model, tmp_path)


def test_a_folder_that_lacks_a_parameter_is_refused(tmp_path: Path) -> None:
    """It would be garbage; and without our registration transformers knows no such model type."""
    model = build("llama")
    replace_ffn(model, "topk", k=4)
    save_converted(model, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.model.layers.1.mlp.values"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"must hold every parameter; got none of model.model.layers.1.mlp.values; fix: "):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["model_type"] == "sparseffn_converted" and config["text_config"]["model_type"] == "llama"
    assert type(AutoConfig.from_pretrained(tmp_path / "model").get_text_config()).__name__ == "LlamaConfig"
