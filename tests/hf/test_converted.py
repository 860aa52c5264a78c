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
from hf.folder_hub import FolderHub
from sparseffn.errors import UserError
from sparseffn.hf import ConvertedForCausalLM, Upcycle, replace_ffn, save_converted


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


def test_a_loaded_model_gets_further_blocks(tmp_path: Path) -> None:
    """Which its config and its card then name."""
    model = build("llama")
    replace_ffn(model, "topk", 0, k=12)
    save_converted(model, tmp_path / "first")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    replace_ffn(loaded, "sigma-moe", init="upcycle", n_experts=3, k=1)
    card = (save_converted(loaded, tmp_path / "second") / "README.md").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    assert torch.equal(again(ids()).logits, loaded(ids()).logits) and "`same`, `upcycle`" in card
    assert list(again.config.blocks) == ["model.layers.0.mlp", "model.layers.1.mlp"]


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


def test_the_card_says_what_was_replaced(tmp_path: Path) -> None:
    """In what, by what, filled how; losses and a licence are claimed of none."""
    model = build("llama")
    model.name_or_path = "people/llama-tiny"
    replace_ffn(model, "topk", 0, k=12)
    replace_ffn(model, "sigma-moe", 0, init=Upcycle(redraw=0.5), n_experts=3, k=1)
    card = (save_converted(model, tmp_path / "cheaper") / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and "\nbase_model: people/llama-tiny\n" in card
    assert "\n- topk\n- sigma-moe\n---" in card and "license" not in card and "## Results" not in card
    assert "| replaced | `model.layers.*.mlp`, * = 0 to 1 |" in card
    assert "| filled from the dense blocks by | `same`, `upcycle redraw=0.5` |" in card
    assert f"| parameters | {model.num_parameters():,} |" in card
    # 12 of 48 and one expert of three, each of 48.
    assert "| pairs that take part | 60 of 192 in all replaced blocks (31.2%) |" in card
    assert 'AutoModelForCausalLM.from_pretrained("cheaper")' in card and "AutoTokenizer" not in card
    AutoModelForCausalLM.from_pretrained(tmp_path / "cheaper").save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again["base_model"] == "people/llama-tiny" and again["blocks"]["model.layers.1.mlp"]["fill"] == "upcycle redraw=0.5"


def test_a_folders_name_is_no_name_on_the_hub(tmp_path: Path) -> None:
    """Nor does a card tell where the folder was."""
    build("llama").save_pretrained(tmp_path / "somewhere" / "tiny")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "somewhere" / "tiny")
    replace_ffn(model, "topk", k=12)
    card = (save_converted(model, tmp_path / "cheaper") / "README.md").read_text()
    assert (
        "| base model | tiny, of the family `llama` |" in card
        and "This is tiny, in which 2 dense feedforward blocks became" in card
    )
    assert "base_model" not in card and "somewhere" not in card


def test_what_is_pushed_has_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that was never saved has it too; the hub's folder is loaded again as it was."""
    hub, model = FolderHub(tmp_path, monkeypatch), build("llama")
    replace_ffn(model, "topk", k=12)
    ConvertedForCausalLM.wrap(model).push_to_hub("me/cheaper")
    assert hub.commits == [{"config.json", "generation_config.json", "model.safetensors", "README.md"}]
    pushed = tmp_path / "me" / "cheaper"
    assert 'AutoModelForCausalLM.from_pretrained("me/cheaper")' in (pushed / "README.md").read_text()
    assert torch.equal(AutoModelForCausalLM.from_pretrained(pushed)(ids()).logits, model(ids()).logits)
