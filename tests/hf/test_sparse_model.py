"""The decoder in transformers: saved, loaded, cached, padded, checkpointed; what a checkpoint lacks is drawn as ours are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("transformers", reason="needs transformers: pip install 'sparseffn[hf]'")

from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

from sparseffn.errors import UserError
from sparseffn.hf import SparseFFNConfig, SparseFFNForCausalLM

VOCAB = 31
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 6,
}  # fmt: skip
GATED = {"gated": True, "activation": "silu"}
FFN: dict[str, dict[str, Any] | None] = {
    "llama": None,
    "sigma-moe": {"method": "sigma-moe", "n_experts": 4, "expert_size": 8, "k": 2, "entropy_weight": 0.1, **GATED},
    "topk": {"method": "topk", "d_ff": 24, "k": 5},
    "pkm": {"method": "pkm", "n_subkeys": 5, "k": 4, "n_heads": 2},
}


def small(method: str = "sigma-moe", *, seed: int = 0, **changes: Any) -> SparseFFNForCausalLM:
    """In evaluation mode, noise on all parameters."""
    torch.manual_seed(seed)
    model = SparseFFNForCausalLM(SparseFFNConfig(**{**SIZES, "ffn": FFN[method], **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def text(length: int, batch: int = 2) -> Tensor:
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("method", FFN)
def test_loads_what_it_saved(method: str, tied: bool, tmp_path: Path) -> None:
    """By the Auto classes, from many files, every parameter to the bit; and the config says all that there is."""
    model = small(method, tie_word_embeddings=tied, rope_theta=500.0)
    model.save_pretrained(tmp_path, max_shard_size="3KB")
    assert (tmp_path / "model.safetensors.index.json").exists() and len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, SparseFFNForCausalLM) and not loaded.training
    assert loaded.decoder.config == model.decoder.config and loaded.decoder.config.rope_base == 500.0
    assert all(map(torch.equal, loaded.parameters(), model.parameters()))
    assert (loaded.decoder.output.weight is loaded.decoder.embedding.weight) == tied
    assert torch.equal(loaded(text(6)).logits, model(text(6)).logits)


def test_a_config_is_completed_and_checked(tmp_path: Path) -> None:
    """Width and depth of the blocks are the model's; what makes no model is refused, by name."""
    config = SparseFFNConfig(**SIZES, ffn={"method": "sigma-moe", "n_experts": 4, "expert_size": 8, "k": 2})
    assert config.model_config.ffn.d_model == 16 and config.model_config.ffn.n_layers == 3
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()
    assert SparseFFNConfig.of_model(config.model_config).model_config == config.model_config
    with pytest.raises(UserError, match="unknown method 'sigma-mo'; fix: did you mean 'sigma-moe'"):
        SparseFFNConfig(**SIZES, ffn={"method": "sigma-mo"})
    with pytest.raises(UserError, match="`n_kv_heads` must be a divisor of n_heads = 4; got 3"):
        SparseFFNConfig(**{**SIZES, "num_key_value_heads": 3})


def test_what_a_checkpoint_lacks_is_drawn_as_ours_are(tmp_path: Path) -> None:
    """A part of a block, a projection, a norm: as `init_parameters`; everything else as it was saved."""
    model = small()
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    lost = [
        "decoder.layers.0.ffn.experts.gate_keys", "decoder.layers.1.ffn.router.selector", "decoder.norm.weight",
        "decoder.layers.1.attention.query.weight",
    ]  # fmt: skip
    save_file({name: value for name, value in state.items() if name not in lost}, tmp_path / "model.safetensors")
    torch.manual_seed(7)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded.decoder.init_parameters(loaded._seed, only=())
    drawn = SparseFFNForCausalLM(model.config).decoder
    drawn.init_parameters(loaded._seed)
    for name, parameter in loaded.named_parameters():
        wanted = drawn.get_parameter(name.removeprefix("decoder.")) if name in lost else state[name]
        assert torch.equal(parameter, wanted), name


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_checkpoint_of_other_names_is_refused(tied: bool, tmp_path: Path) -> None:
    """By whatever class loads it: not one parameter would be its own."""
    small(tie_word_embeddings=tied).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file({f"model.{name}": value for name, value in state.items()}, tmp_path / "model.safetensors")
    wanted = r"must hold parameters such as decoder\..*\.weight; got none of SparseFFNForCausalLM's, but model\.decoder"
    for loader in (SparseFFNForCausalLM, AutoModelForCausalLM):
        with pytest.raises(UserError, match=f"{wanted}.*fix: load what this class saved"):
            loader.from_pretrained(tmp_path)


def test_what_was_loaded_is_told_when_asked_for(tmp_path: Path) -> None:
    """A pair as from any model, which names what the checkpoint lacks."""
    small().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    name = "decoder.layers.0.ffn.experts.gate_keys"
    save_file({other: value for other, value in state.items() if other != name}, tmp_path / "model.safetensors")
    loaded, info = SparseFFNForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(loaded, SparseFFNForCausalLM) and set(info["missing_keys"]) == {name}


def test_a_seed_decides_the_first_parameters() -> None:
    """And they are those of the plain decoder."""
    config = SparseFFNConfig(**SIZES, ffn=FFN["sigma-moe"])
    models = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        models.append(AutoModelForCausalLM.from_config(config))
    first, again, other = ([p.detach() for p in model.parameters()] for model in models)
    assert all(map(torch.equal, first, again)) and not torch.equal(first[0], other[0])
    models[0].decoder.init_parameters(models[0]._seed)
    assert all(map(torch.equal, first, models[0].parameters()))


def test_the_router_stays_in_float32(tmp_path: Path) -> None:
    """In a model that is loaded in bfloat16, which computes, forward and backward; saving keeps it."""
    small().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).train()
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert {name for name in dtypes if dtypes[name] == torch.float32} == {name for name in dtypes if ".router." in name}
    assert len(set(dtypes.values())) == 2
    output = model(text(6), labels=text(6))
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16 and all(p.grad is not None and p.grad.any() for p in model.parameters())
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="auto")
    assert {name: parameter.dtype for name, parameter in again.named_parameters()} == dtypes


@pytest.mark.parametrize("method", FFN)
def test_generates_with_a_cache_as_without(method: str) -> None:
    """Greedily, texts of two lengths in one batch as each by itself."""
    model, tokens = small(method), text(7)
    kwargs: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    wanted = [model.generate(row[None], use_cache=False, **kwargs)[0] for row in (tokens[0], tokens[1, :4])]
    assert all(torch.equal(model.generate(row[None, : len(row) - 9], **kwargs)[0], row) for row in wanted)
    batch = torch.stack([tokens[0], F.pad(tokens[1, :4], (3, 0))])
    found = model.generate(batch, attention_mask=(batch != 0).long(), **kwargs)
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1, 3:], wanted[1])


@pytest.mark.parametrize("cache", [DynamicCache, StaticCache], ids=lambda cache: cache.__name__)
def test_a_cache_changes_no_logits(cache: Any) -> None:
    """Of texts of two lengths, whatever the pieces in which they are read."""
    model, tokens, mask = small(), text(9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :2] = 0
    wanted = model(tokens, attention_mask=mask, use_cache=False).logits
    for pieces in ([5, 1, 1, 1, 1], [3, 6]):
        filled = cache(config=model.config, **({"max_cache_len": 12} if cache is StaticCache else {}))
        found, end = [], 0
        for piece in tokens.split(pieces, dim=1):
            end += piece.shape[1]
            found.append(model(piece, attention_mask=mask[:, :end], past_key_values=filled).logits)
        torch.testing.assert_close(torch.cat(found, dim=1)[mask == 1], wanted[mask == 1])


def test_generates_by_samples_and_beams() -> None:
    """What transformers offers beyond the greedy text."""
    model, tokens = small(), text(5)
    kwargs: dict[str, Any] = {"max_new_tokens": 4, "pad_token_id": 0}
    greedy, static = (
        model.generate(
            tokens, do_sample=False, cache_implementation=name, output_logits=True, return_dict_in_generate=True, **kwargs
        )
        for name in ("dynamic", "static")
    )
    torch.testing.assert_close(greedy.logits, static.logits)
    assert model.generate(tokens, num_beams=3, **kwargs).shape == model.generate(tokens, do_sample=True, **kwargs).shape


def test_padding_changes_no_loss() -> None:
    """Cross-entropy and balancing loss of a padded text are its own."""
    model, tokens = small().train(), text(6, batch=1)
    wanted = model(tokens, labels=tokens)
    padded, mask = F.pad(tokens, (2, 3), value=5), F.pad(torch.ones_like(tokens), (2, 3))
    # Padding predicts the first token in one of them.
    labels = padded.masked_fill(mask == 0, -100).index_fill(1, torch.tensor([2]), -100)
    found = model(padded, attention_mask=mask, labels=labels)
    for name in ("loss", "cross_entropy", "balance_loss"):
        torch.testing.assert_close(found[name], wanted[name])
    torch.testing.assert_close(wanted.loss, wanted.cross_entropy + wanted.balance_loss)
    assert wanted.balance_loss.item() < -0.1


@pytest.mark.parametrize("every", [1, 2])
def test_checkpointing_changes_no_gradient(every: int) -> None:
    """Balancing loss included; and something is computed again."""
    found, calls = [], []
    for checkpointed in (False, True):
        model = small(dropout=0.2).train()
        if checkpointed:
            model.activation_checkpointing_enable(every_n_layers=every)
            assert model.is_activation_checkpointing
        handles = [layer.ffn_norm.register_forward_hook(lambda *_: calls.append(1)) for layer in model.decoder.layers]
        torch.manual_seed(5)
        output = model(text(6), labels=text(6))
        output.loss.backward()
        assert len(handles) == 3
        found.append([output.loss.detach(), *(p.grad for p in model.parameters())])
    assert all(map(torch.equal, *found)) and len(calls) == 3 + 3 + (3 if every == 1 else 2)


def test_compiles_without_a_break() -> None:
    """Loss and gradients, with a mask too."""
    model, tokens = small(num_hidden_layers=1).train(), text(6)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for mask in (None, torch.ones_like(tokens)):
        found = []
        for call in (model, compiled):
            model.zero_grad()
            call(input_ids=tokens, labels=tokens, attention_mask=mask).loss.backward()
            found.append([p.grad for p in model.parameters()])
        assert all(map(torch.equal, *found))


def test_the_vocabulary_grows() -> None:
    """Old tokens keep their logits."""
    for tied in (False, True):
        model = small(tie_word_embeddings=tied)
        wanted = model(text(6)).logits
        model.resize_token_embeddings(VOCAB + 4, mean_resizing=False)
        found = model(text(6)).logits
        assert found.shape[-1] == model.config.vocab_size == VOCAB + 4
        torch.testing.assert_close(found[..., :VOCAB], wanted)
        assert model.decoder.embedding.weight[VOCAB:].abs().max() < 0.5
        assert f"| parameters | {model.num_parameters():,} |" in model.card("grown")


def test_gives_what_is_asked_for() -> None:
    """Hidden states, the last logits, a tuple, embeddings in place of tokens."""
    model, tokens = small(), text(6)
    whole = model(tokens, output_hidden_states=True)
    assert len(whole.hidden_states) == 4 and whole.past_key_values.get_seq_length() == 6
    assert torch.equal(model.decoder.project(whole.hidden_states[-1]), whole.logits)
    torch.testing.assert_close(model(tokens, logits_to_keep=2).logits, whole.logits[:, -2:])
    (logits,) = model(inputs_embeds=model.get_input_embeddings()(tokens), use_cache=False, return_dict=False)
    assert torch.equal(logits, whole.logits)


def test_bad_calls_are_refused() -> None:
    """Saying what is expected."""
    model, tokens = small(), text(6)
    with pytest.raises(UserError, match="`input_ids` or `inputs_embeds` must be given; got both or neither"):
        model()
    with pytest.raises(UserError, match=r"`attention_mask` must be \[batch, 6\].*got \(2, 5\)"):
        model(tokens, attention_mask=torch.ones(2, 5))
    with pytest.raises(UserError, match="`position_ids` must not go back: texts that are packed"):
        model(tokens, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))
    with pytest.raises(UserError, match="`output_attentions` must be false"):
        model(tokens, output_attentions=True)
