"""Transformer-XL in transformers: the same network, memory as cache, what saves and loads it, its loss."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="needs transformers: pip install 'sparseffn[hf]'")

from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import sparseffn.hf
from sparseffn.errors import UserError
from sparseffn.ffn import build
from sparseffn.hf import TransformerXLForCausalLM, TransformerXLHubConfig, XLMemory

FFN = {
    "dense": {"method": "dense", "d_ff": 24},
    "sigma-moe": {"method": "sigma-moe", "n_experts": 4, "expert_size": 8, "k": 2, "entropy_weight": 0.1},
    "pkm": {"method": "pkm", "n_subkeys": 5, "k": 4, "n_heads": 2},
}
VOCABULARY = 31


def small(method: str = "sigma-moe", seed: int = 0, **changes: Any) -> TransformerXLForCausalLM:
    """In float64 and evaluation mode, noise on all parameters."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 6, "memory_length": 40}
    torch.manual_seed(seed)
    config = TransformerXLHubConfig(
        vocab_size=VOCABULARY, **{**sizes, **changes}, ffn={**FFN[method], "d_model": 16, "n_layers": 2}
    )
    model = TransformerXLForCausalLM(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def text(length: int, batch: int = 2, seed: int = 1) -> Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def in_windows(model: TransformerXLForCausalLM, tokens: Tensor, sizes: list[int]) -> Tensor:
    """Logits of all windows joined, the memory carried on."""
    memory = model.new_memory()
    return torch.cat([model(window, past_key_values=memory).logits for window in tokens.split(sizes, dim=1)], dim=1)


class TestMemory:
    @pytest.mark.parametrize("method", list(FFN))
    def test_logits_are_the_networks_own(self, method: str) -> None:
        """Without a memory, and window by window with one that forgets."""
        model, tokens = small(method, memory_length=5), text(16)
        assert_same(model(tokens, use_cache=False).logits, model.transformer(tokens).logits)
        sizes, expected, memory = [7, 1, 1, 4, 3], [], None
        with torch.no_grad():
            for window in tokens.split(sizes, dim=1):
                out = model.transformer(window, memory, memory_length=5)
                expected.append(out.logits)
                memory = out.memory
        assert_same(in_windows(model, tokens, sizes), torch.cat(expected, dim=1))

    @pytest.mark.parametrize("beams", [1, 3], ids=["greedy", "beams"])
    def test_generate_with_memory_is_generate_without(self, beams: int) -> None:
        """While prompt and output fit."""
        model, prompt = small(), text(6)
        settings = {"max_new_tokens": 30, "num_beams": beams, "do_sample": False}
        with_memory, without = (model.generate(prompt, use_cache=cached, **settings) for cached in (True, False))
        assert torch.equal(with_memory, without)

    def test_generate_forgets_what_does_not_fit(self) -> None:
        """Every token sees `memory_length` positions, however long the text grows."""
        model, prompt = small(memory_length=8), text(6)
        out = model.generate(prompt, max_new_tokens=200, do_sample=False, return_dict_in_generate=True)
        assert out.sequences.shape == (2, 206)
        assert out.past_key_values.layers[0].memory().shape == (2, 8, 16)
        assert out.past_key_values.get_seq_length() == 205

    def test_padding_is_remembered_until_it_is_forgotten(self) -> None:
        """Window by window, with a memory shorter than what was seen; the mask is of all tokens so far."""
        model, prompt = small(memory_length=5), text(9)
        padded = torch.cat((torch.zeros(2, 3, dtype=torch.int64), prompt), dim=1)
        mask = (torch.arange(12) >= 3).long().repeat(2, 1)
        memory, found = model.new_memory(), []
        with torch.no_grad():
            for start in (0, 4, 8):
                window = padded[:, start : start + 4]
                found.append(model(window, attention_mask=mask[:, : start + 4], past_key_values=memory).logits)
        assert_same(torch.cat(found, dim=1)[:, 3:], in_windows(model, prompt, [1, 4, 4]))

    def test_padding_before_a_prompt_changes_nothing(self) -> None:
        """Logits, and what is generated."""
        model, prompt = small(), text(6)
        padded = torch.cat((torch.zeros(2, 3, dtype=torch.int64), prompt), dim=1)
        mask = (torch.arange(9) >= 3).long().repeat(2, 1)
        assert_same(model(padded, attention_mask=mask).logits[:, 3:], model(prompt).logits)
        alone = model.generate(prompt, max_new_tokens=20, do_sample=False)
        assert torch.equal(model.generate(padded, attention_mask=mask, max_new_tokens=20, do_sample=False)[:, 3:], alone)

    def test_gradient_reaches_the_projections_of_the_memory(self) -> None:
        """As in `TransformerXL`; also after windows without gradient, whose projections are then of no use."""
        model, tokens = small(), text(9)
        memory = model.new_memory()
        with torch.no_grad():
            model(tokens[:, :3], past_key_values=memory)
        for start in (3, 6):
            loss = model(tokens[:, start : start + 3], past_key_values=memory).logits.square().sum()
        loss.backward()
        plain = small()
        state = None
        for start in (0, 3, 6):
            out = plain.transformer(tokens[:, start : start + 3], state, memory_length=40)
            state = out.memory
        out.logits.square().sum().backward()
        for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-9, msg=name)

    def test_a_copy_goes_its_own_way(self) -> None:
        """As prompts that are computed once are used."""
        model, tokens = small(), text(8)
        memory = model.new_memory()
        with torch.no_grad():
            model(tokens[:, :5], past_key_values=memory)
            other = copy.deepcopy(memory)
            first = model(tokens[:, 5:], past_key_values=memory).logits
            assert_same(model(tokens[:, 5:], past_key_values=other).logits, first)

    def test_another_cache_or_a_mask_of_another_length_is_refused(self) -> None:
        model, tokens = small(), text(4)
        with pytest.raises(UserError, match="`past_key_values` must be an XLMemory of 2 layers; got DynamicCache"):
            model(tokens, past_key_values=DynamicCache())
        with pytest.raises(UserError, match="must be an XLMemory of 2 layers; got 3 layers"):
            model(tokens, past_key_values=XLMemory(3, 5))
        memory = model(text(3, batch=1)).past_key_values
        with pytest.raises(UserError, match="must be of 2 texts, as the window is; got 1"):
            model(tokens, past_key_values=memory)
        with pytest.raises(UserError, match=r"`attention_mask` must be \[batch, 4\]"):
            model(tokens, attention_mask=torch.ones(2, 3))


class TestFiles:
    @pytest.mark.parametrize("shared", [False, True], ids=["own-layers", "shared-layers"])
    def test_saved_in_shards_it_is_the_same_model(self, shared: bool, tmp_path: Path) -> None:
        """By `AutoModelForCausalLM`, bit for bit; shared layers are one block, stored once."""
        model = small(shared_layers=shared).float()
        model.save_pretrained(tmp_path, max_shard_size="3KB")
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
        loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert isinstance(loaded, TransformerXLForCausalLM)
        assert not any(info.values())
        assert torch.equal(loaded(text(8)).logits, model(text(8)).logits)
        assert (loaded.transformer.layers[0] is loaded.transformer.layers[1]) is shared
        assert AutoConfig.from_pretrained(tmp_path).model_config == model.transformer.config

    def test_router_stays_in_float32(self, tmp_path: Path) -> None:
        small().float().save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
        dtypes = {name.rpartition("ffn.")[2]: p.dtype for name, p in loaded.named_parameters() if "layers.0.ffn." in name}
        assert dtypes["router.selector"] == torch.float32
        assert dtypes["experts.keys"] == torch.bfloat16
        assert loaded(text(8)).logits.isfinite().all()

    def test_what_a_checkpoint_lacks_is_initialised(self, tmp_path: Path) -> None:
        """As a new model of that seed has it; what is there is kept."""
        model = small().float()
        model.save_pretrained(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        lost = {
            "transformer.embedding.weight",
            "transformer.layers.0.ffn.experts.keys",
            "transformer.layers.1.ffn.router.selector",
            "transformer.layers.1.attention.scale",
            "transformer.layers.1.attention.key.weight",
        }
        kept = {name: weight for name, weight in weights.items() if name not in lost}
        save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
        torch.manual_seed(7)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        new = small().float()
        new.transformer.init_parameters(loaded._seed)
        for name, parameter in loaded.named_parameters():
            assert torch.equal(parameter, new.get_parameter(name) if name in lost else weights[name]), name

    @pytest.mark.parametrize("shared", [False, True], ids=["own-layers", "shared-layers"])
    def test_a_checkpoint_of_other_names_is_refused(self, shared: bool, tmp_path: Path) -> None:
        """Not one parameter would be its own."""
        small(shared_layers=shared).float().save_pretrained(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        renamed = {f"model.{name}": weight for name, weight in weights.items()}
        save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
        wanted = r"must hold parameters such as transformer\..*; got none of TransformerXLForCausalLM's, but model\.transformer"
        with pytest.raises(UserError, match=f"{wanted}.*fix: load what this class saved"):
            AutoModelForCausalLM.from_pretrained(tmp_path)

    def test_a_new_model_is_one_of_ours(self) -> None:
        """Drawn by `init_parameters` from the global seed: two seeds differ, one gives the same model."""
        one, same, other = (TransformerXLForCausalLM(small(seed=seed).config) for seed in (1, 1, 2))
        weights = [model.transformer.embedding.weight for model in (one, same, other)]
        assert torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[0], weights[2])
        drawn = copy.deepcopy(one.transformer)
        drawn.init_parameters(one._seed)
        for ours, expected in zip(one.transformer.parameters(), drawn.parameters(), strict=True):
            assert torch.equal(ours, expected)

    def test_a_vocabulary_that_grows_is_drawn_as_ours(self, tmp_path: Path) -> None:
        """New rows have the spread of a new model's; the old ones stay, and the larger model is saved and loaded."""
        model = small().float()
        before = model.transformer.embedding.weight.detach().clone()
        model.resize_token_embeddings(VOCABULARY + 200, mean_resizing=False)
        weight = model.transformer.embedding.weight.detach()
        assert torch.equal(weight[:VOCABULARY], before)
        assert float(weight[VOCABULARY:].std()) == pytest.approx((2 / (VOCABULARY + 200 + 16)) ** 0.5, rel=0.1)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(loaded(text(4)).logits, model(text(4)).logits)

    @pytest.mark.parametrize("shared", [False, True], ids=["own-layers", "shared-layers"])
    def test_of_a_model_of_ours(self, shared: bool) -> None:
        """A copy: the other model may train on."""
        ours = small(shared_layers=shared).transformer
        model = TransformerXLForCausalLM.of_model(ours, memory_length=7)
        assert (model.config.memory_length, model.config.model_config) == (7, ours.config)
        assert torch.equal(model(text(8)).logits, ours(text(8)).logits)
        assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in ours.parameters()}
        assert not model.training

    def test_an_unknown_method_or_size_is_refused(self) -> None:
        config = small().config
        for ffn, words in (({"method": "sigma-mo"}, "did you mean 'sigma-moe'"), ({"method": "dense"}, "d_model")):
            broken = copy.deepcopy(config)
            broken.ffn = ffn
            with pytest.raises(UserError, match=words):
                TransformerXLForCausalLM(broken)


class TestLoss:
    def test_balancing_loss_is_added_in_training_and_reported_apart(self) -> None:
        model, tokens = small().train(), text(8)
        out = model(tokens, labels=tokens)
        cross_entropy = torch.nn.functional.cross_entropy(
            model(tokens).logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten()
        )
        expected = sum(s.balance_loss for s in model.transformer(tokens, return_stats=True).stats or ())
        torch.testing.assert_close(out.cross_entropy, cross_entropy)
        torch.testing.assert_close(out.balance_loss, torch.as_tensor(expected, dtype=torch.float32))
        torch.testing.assert_close(out.loss, cross_entropy + expected, check_dtype=False)
        assert small("dense").train()(tokens, labels=tokens).balance_loss is None

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_has_no_part_in_the_losses(self, side: str) -> None:
        """Cross-entropy, balancing loss and every gradient are those of the text alone: the router does not see padding."""
        model, tokens = small().train(), text(9)
        blank = torch.zeros(2, 5, dtype=torch.int64)
        at, padded = (5, torch.cat((blank, tokens), dim=1)) if side == "left" else (0, torch.cat((tokens, blank), dim=1))
        mask = torch.zeros_like(padded)
        mask[:, at : at + 9] = 1
        found = []
        for ids, options in ((tokens, {}), (padded, {"attention_mask": mask})):
            labels = ids.clone() if not options else torch.where(mask == 1, ids, -100)
            # Padding on the left would predict it, as in every model of transformers.
            labels[:, at if options else 0] = -100
            output = model(ids, labels=labels, **options)
            gradients = torch.autograd.grad(output.loss, list(model.parameters()))
            found.append((output.cross_entropy, output.balance_loss, *gradients))
        assert found[0][1] != 0
        torch.testing.assert_close(*found, rtol=1e-8, atol=1e-9)

    def test_micro_batches_add_up_to_the_batch(self) -> None:
        """With `num_items_in_batch`, as `Trainer` passes it; padding is no target."""
        model, tokens = small("dense").train(), text(8)
        labels = tokens.clone()
        labels[0, 5:] = -100
        whole = model(tokens, labels=labels).loss
        n_targets = int((labels[:, 1:] != -100).sum())
        parts = [
            model(t[None], labels=la[None], num_items_in_batch=n_targets).loss for t, la in zip(tokens, labels, strict=True)
        ]
        torch.testing.assert_close(sum(parts), whole)

    @pytest.mark.parametrize("method", ["dense", "sigma-moe"])
    def test_checkpointing_changes_no_gradient(self, method: str) -> None:
        """Balancing loss included; and each block is computed again."""
        gradients, calls = [], []
        for checkpointed in (False, True):
            model = small(method).train()
            if checkpointed:
                model.activation_checkpointing_enable()
            # Before a block: computing again ends as soon as there is everything that the backward pass needs.
            counted: list[int] = []
            for i, layer in enumerate(model.transformer.layers):
                layer.ffn.register_forward_pre_hook(lambda *_, i=i, counted=counted: counted.append(i))
            model(text(8), labels=text(8)).loss.backward()
            gradients.append([p.grad for p in model.parameters()])
            calls.append(sorted(counted))
        assert calls == [[0, 1], [0, 0, 1, 1]]
        for plain, again in zip(*gradients, strict=True):
            assert_same(again, plain)


def test_the_layer_is_ours() -> None:
    """The blocks are what `build` makes, under the names of the config."""
    model = small()
    layer = build(**{**FFN["sigma-moe"], "d_model": 16, "n_layers": 2})
    assert type(model.transformer.layers[0].ffn) is type(layer)
    assert sparseffn.hf.TransformerXLForCausalLM is TransformerXLForCausalLM


def test_trainer_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    """With micro-batches, checkpointing and expert dropout: to the losses of a run that was not stopped."""
    pytest.importorskip("accelerate", reason="Trainer needs it: pip install accelerate")
    from transformers import Trainer, TrainingArguments, set_seed

    data = [{"input_ids": row, "labels": row} for row in text(12, batch=24)]
    sizes = {**small().config.to_dict(), "ffn": {**FFN["sigma-moe"], "d_model": 16, "n_layers": 2, "expert_dropout": 0.2}}

    def losses(folder: Path, steps: int, *, resume: bool = False) -> list[float]:
        set_seed(1)
        settings = TrainingArguments(
            str(folder), max_steps=steps, per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=1,
            save_steps=3, learning_rate=1e-2, lr_scheduler_type="constant", report_to=[], use_cpu=True, disable_tqdm=True,
            activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": False},
        )  # fmt: skip
        model = TransformerXLForCausalLM(TransformerXLHubConfig(**sizes))
        trainer = Trainer(model, settings, train_dataset=data)  # pyright: ignore[reportArgumentType]
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3") if resume else None)
        return [line["loss"] for line in trainer.state.log_history if "loss" in line]

    whole = losses(tmp_path / "whole", 6)
    assert losses(tmp_path / "part", 3) == whole[:3]
    assert losses(tmp_path / "part", 6, resume=True) == whole


def test_answers_as_the_config_and_the_arguments_say() -> None:
    """States and tuples by the config too; targets that are shifted already have a balancing loss; weights are refused."""
    model, tokens = small(output_hidden_states=True), text(12)
    output = model(tokens, shift_labels=text(12, seed=2))
    assert len(output.hidden_states) == 3 and output.balance_loss is not None
    model.config.return_dict = False
    assert isinstance(model(tokens), tuple)
    with pytest.raises(UserError, match="`output_attentions` must be false"):
        model(tokens, output_attentions=True)
