"""The decoder: Llama's function, caches, padding, checkpointing, counts, initial parameters."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.small import assert_same
from sparseffn.errors import UserError
from sparseffn.ffn import list_methods, method_class
from sparseffn.models import Decoder, DecoderConfig, TransformerXLConfig, build_model, model_config_from_json
from sparseffn.models.generation import generate
from sparseffn.models.rotary_attention import RecentKeysValues

VOCAB = 23
SIZES: dict[str, Any] = {"vocab_size": VOCAB, "d_model": 8, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_head": 6}
GATED = {"activation": "silu", "gated": True}
BLOCKS = {
    "dense": {"method": "dense", "d_model": 8, "d_ff": 12, "n_layers": 2, **GATED},
    "sigma-moe": {"method": "sigma-moe", "d_model": 8, "n_experts": 5, "expert_size": 4, "k": 2, "n_layers": 2, **GATED},
    "s-base": {"method": "s-base", "d_model": 8, "n_experts": 5, "expert_size": 4, "k": 2, "n_layers": 2},
}


def small(block: str = "sigma-moe", **changes: Any) -> Decoder:
    """In float64 and evaluation mode, noise on all parameters."""
    model = Decoder(DecoderConfig.from_json({**SIZES, **changes, "ffn": BLOCKS[block]})).double().eval()
    model.init_parameters(0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype), alpha=0.3)
    return model


def text(batch: int, length: int) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_is_the_llama_of_transformers(tied: bool) -> None:
    """With its weights and no biases in the blocks: the same logits, as near as its float32 angles are; under padding too."""
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'sparseffn[hf]'")
    model = small("dense", tied_embeddings=tied, rope_base=500.0, norm_eps=1e-3)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=6, rms_norm_eps=1e-3, tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )  # fmt: skip
    llama = transformers.LlamaForCausalLM(config).double().eval()
    llama.load_state_dict(as_llama(model), strict=not tied)
    tokens, mask = text(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    with torch.no_grad():
        for padded in (None, mask):
            wanted = llama(tokens, attention_mask=padded).logits
            found = model(tokens, mask=None if padded is None else padded == 1).logits
            seen = slice(None) if padded is None else padded == 1
            torch.testing.assert_close(found[seen], wanted[seen], rtol=1e-6, atol=1e-6)


@torch.no_grad()
def as_llama(model: Decoder) -> dict[str, Tensor]:
    """Parameters by transformers' names; biases, which Llama has not, are cleared."""
    state = {"model.embed_tokens.weight": model.embedding.weight, "model.norm.weight": model.norm.weight}
    if not model.config.tied_embeddings:
        state["lm_head.weight"] = model.output.weight
    for i, layer in enumerate(model.layers):
        ffn, attention = layer.ffn, layer.attention
        for bias in (ffn.key_bias, ffn.gate_bias, ffn.bias):
            bias.zero_()
        own = {
            "input_layernorm": layer.attention_norm.weight, "post_attention_layernorm": layer.ffn_norm.weight,
            "self_attn.q_proj": attention.query.weight, "self_attn.k_proj": attention.key.weight,
            "self_attn.v_proj": attention.value.weight, "self_attn.o_proj": attention.output.weight,
            "mlp.gate_proj": ffn.keys, "mlp.up_proj": ffn.gate_keys, "mlp.down_proj": ffn.values.t(),
        }  # fmt: skip
        state |= {f"model.layers.{i}.{name}.weight": weight for name, weight in own.items()}
    return state


@pytest.mark.parametrize("pieces", [[1] * 8, [5, 1, 2], [8]], ids=str)
def test_a_cache_changes_nothing(pieces: list[int]) -> None:
    """Whatever the pieces in which a text is read."""
    model, tokens, cache = small(), text(2, 8), RecentKeysValues(100)
    with torch.no_grad():
        parts = [model(piece, cache=cache).logits for piece in tokens.split(pieces, dim=1)]
        assert_same(torch.cat(parts, dim=1), model(tokens).logits)


def test_a_cache_forgets_what_is_too_far() -> None:
    """A token sees the last 4 positions: in one layer the logits of the text that begins there."""
    model, tokens = small(n_layers=1), text(1, 9)
    with torch.no_grad():
        cache = RecentKeysValues(4)
        found = torch.cat([model(piece, cache=cache).logits for piece in tokens.split(1, dim=1)], dim=1)
        for end in range(1, 10):
            assert_same(found[:, end - 1], model(tokens[:, max(0, end - 4) : end]).logits[:, -1])


def test_generates_the_most_likely_text() -> None:
    """Token by token from the cache as from the whole text."""
    model, written = small(), text(1, 4)[0].tolist()
    found = generate(model, written, 6)
    for token in found:
        assert token == int(model(torch.tensor([written])).logits[0, -1].argmax())
        written.append(token)
    assert len(set(found)) > 1


@pytest.mark.parametrize("block", ["sigma-moe", "s-base"])
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_padding_changes_nothing(block: str, training: bool) -> None:
    """Before or behind the tokens: neither their logits, nor balancing loss, nor counts, batch-wide routing included."""
    model, tokens = small(block).train(training), text(1, 6)
    wanted = model(tokens, return_stats=True)
    for before, behind in ((3, 0), (0, 2)):
        padded, mask = F.pad(tokens, (before, behind), value=7), F.pad(torch.ones(1, 6, dtype=torch.bool), (before, behind))
        found = model(padded, mask=mask, return_stats=True)
        assert found.logits.isfinite().all()
        assert_same(found.logits[mask], wanted.logits[0])
        for of_padded, of_tokens in zip(found.stats, wanted.stats, strict=True):
            assert_same(of_padded.balance_loss, of_tokens.balance_loss)
            assert of_padded.counts.tolist() == of_tokens.counts.tolist() and of_padded.n_tokens == 6
            assert of_tokens.balance_loss != 0


def test_padding_in_a_cache_is_not_seen() -> None:
    """The mask is of all positions so far."""
    model, tokens, mask = small(), text(2, 8), torch.ones(2, 8, dtype=torch.bool)
    mask[0, :3] = False
    cache = RecentKeysValues(100)
    with torch.no_grad():
        model(tokens[:, :5], mask=mask[:, :5], cache=cache)
        found = model(tokens[:, 5:], mask=mask, cache=cache).logits
        assert_same(found[:1], model(tokens[:1, 3:]).logits[:, 2:])
        assert_same(found[1:], model(tokens[1:]).logits[:, 5:])


def test_checkpointing_changes_no_gradient() -> None:
    """With dropout, balancing loss included."""
    found = []
    for checkpointed in (False, True):
        model = small(dropout=0.3).train()
        for layer in model.layers:
            layer.gradient_checkpointing = checkpointed
        torch.manual_seed(3)
        output = model(text(2, 6), return_stats=True)
        loss = output.logits.square().mean() + sum(stats.balance_loss for stats in output.stats)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("method", list_methods())
def test_takes_every_method(method: str) -> None:
    """Counts in closed form, a gradient for every parameter, and a config that JSON keeps."""
    example = method_class(method).examples()[0].replace(d_model=8)
    for tied in (False, True):
        config = DecoderConfig(**SIZES, ffn=example, tied_embeddings=tied)
        assert model_config_from_json(config.to_json()) == config
        model = build_model(config)
        model.init_parameters(0)
        assert sum(p.numel() for p in model.parameters()) == config.num_params()
        assert config.other_params() <= config.active_params() <= config.num_params()
        output = model.train()(text(2, 6), return_stats=True)
        (output.logits.square().sum() + sum(stats.balance_loss for stats in output.stats)).backward()
        assert all(p.grad is not None for p in model.parameters())


def test_models_start_alike_outside_their_blocks() -> None:
    """Bit by bit, and not all alike."""
    models = [Decoder(DecoderConfig.from_json({**SIZES, "ffn": BLOCKS[block]})) for block in ("dense", "sigma-moe")]
    for model in models:
        model.init_parameters(5)
    outside = [{n: p for n, p in model.named_parameters() if ".ffn." not in n} for model in models]
    assert all(torch.equal(outside[0][name], outside[1][name]) for name in outside[0])
    assert not torch.equal(outside[0]["layers.0.attention.query.weight"], outside[0]["layers.1.attention.query.weight"])
    assert outside[0]["norm.weight"].eq(1).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"d_head": 5}, "`d_head` must be even, as positions rotate pairs; got 5"),
        ({"n_kv_heads": 3}, "`n_kv_heads` must be a divisor of n_heads = 4; got 3"),
        ({"d_model": 9}, "`ffn.d_model` must be the model's d_model = 9; got 8"),
        ({"n_head": 4}, "unknown model option 'n_head'; fix: did you mean 'n_heads'"),
    ],
    ids=["odd", "heads", "width", "unknown"],
)
def test_bad_sizes_are_refused(changes: dict[str, Any], words: str) -> None:
    """Naming the field, what is expected and what to do."""
    with pytest.raises(UserError, match=words):
        DecoderConfig.from_json({**SIZES, "ffn": BLOCKS["dense"], **changes})


def test_bad_calls_are_refused() -> None:
    """Shapes, and a memory, which is another backbone's."""
    model, tokens = small(), text(2, 6)
    with pytest.raises(UserError, match=r"`tokens` must be \[batch, length >= 1\]; got \(6,\)"):
        model(tokens[0])
    with pytest.raises(UserError, match="`memory_length` must be 0: a decoder has no memory; got 4"):
        model(tokens, memory_length=4)
    with pytest.raises(UserError, match=r"`mask` must be bool .*\(2, 6\); got torch.int64 \(2, 6\)"):
        model(tokens, mask=torch.ones_like(tokens))


def test_configs_without_a_backbone_are_those_of_transformer_xl() -> None:
    """As runs of before wrote them; the decoder's name their backbone."""
    config = DecoderConfig.from_json({**SIZES, "ffn": BLOCKS["dense"]})
    assert config.to_json()["backbone"] == "llama"
    sizes = {key: value for key, value in SIZES.items() if key != "n_kv_heads"}
    found = model_config_from_json({**sizes, "ffn": BLOCKS["dense"]})
    assert isinstance(found, TransformerXLConfig) and "backbone" not in found.to_json()
    assert {f.name for f in dataclasses.fields(config)} > {f.name for f in dataclasses.fields(found)} - {"shared_layers"}
    with pytest.raises(UserError, match="unknown backbone 'llama2'; fix: did you mean 'llama'"):
        model_config_from_json({**config.to_json(), "backbone": "llama2"})
