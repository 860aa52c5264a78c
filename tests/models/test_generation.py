"""Cached generation against the model without a cache."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import pytest
import torch
from torch import nn

from models.small import METHODS, VOCAB, small_model, text
from sparseffn.errors import UserError
from sparseffn.models import TransformerXL
from sparseffn.models.generation import generate, generate_tokens

PROMPT = [3, 1, 4, 1, 5]


@torch.no_grad()
def greedy_uncached(model: TransformerXL, prompt: list[int], n_tokens: int, last: int | None = None) -> list[int]:
    """Greedy tokens, each from a pass over the whole text so far, or over its `last` tokens."""
    tokens = list(prompt)
    for _ in range(n_tokens):
        seen = tokens if last is None else tokens[-last:]
        tokens.append(int(model(torch.tensor([seen])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@torch.no_grad()
def greedy_with_memory(model: TransformerXL, prompt: list[int], n_tokens: int, length: int) -> list[int]:
    """Greedy tokens from windows of one, the model's own memory holding the `length - 1` positions before."""
    memory, logits, tokens = None, torch.empty(0), list(prompt)
    for i in range(len(prompt) + n_tokens):
        if i >= len(prompt):
            tokens.append(int(logits[0, -1].argmax()))
        out = model(torch.tensor([[tokens[i]]]), memory, memory_length=length - 1)
        logits, memory = out.logits, out.memory
    return tokens[len(prompt) :]


def cpu_seconds(model: TransformerXL, n_tokens: int) -> float:
    """Processor time, which other programs on the machine do not add to."""
    start = time.process_time()
    generate(model, PROMPT, n_tokens)
    return time.process_time() - start


def projected_rows(model: TransformerXL, call: Callable[[], object]) -> list[int]:
    """Positions whose keys each layer's attention computes during a call."""
    counts = [0] * len(model.layers)

    def count(layer: int) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            counts[layer] += output.shape[:-1].numel()

        return hook

    keys = [layer.get_submodule("attention.key") for layer in model.layers]
    handles = [key.register_forward_hook(count(i)) for i, key in enumerate(keys)]
    call()
    for handle in handles:
        handle.remove()
    return counts


class TestGreedy:
    @pytest.mark.parametrize("method", METHODS)
    def test_equals_the_uncached_model(self, method: str) -> None:
        """60 tokens, with room for all of them; the text does not just repeat one token."""
        model = small_model(method)
        expected = greedy_uncached(model, PROMPT, 60)
        assert len(set(expected)) > 1
        assert generate(model, PROMPT, 60, memory_length=len(PROMPT) + 60) == expected
        assert generate(model, PROMPT, 60) == expected

    def test_time_grows_with_the_tokens_only(self) -> None:
        """200 tokens take less than three times what 100 take."""
        model = small_model()
        times = [(cpu_seconds(model, 100), cpu_seconds(model, 200)) for _ in range(3)]
        short, long = (min(column) for column in zip(*times, strict=True))
        assert long < 3 * short

    @pytest.mark.parametrize("prompt", [PROMPT, PROMPT[:1]], ids=["prompt5", "prompt1"])
    def test_every_position_is_computed_once(self, prompt: list[int]) -> None:
        """Each layer's attention projects each token but the last, which nothing follows, once and never again."""
        model = small_model()
        assert projected_rows(model, lambda: generate(model, prompt, 20)) == [len(prompt) + 19] * len(model.layers)
        again = projected_rows(model, lambda: greedy_uncached(model, prompt, 20))
        assert min(again) > 2 * (len(prompt) + 19), "the count must tell a generator without a cache"

    def test_tokens_come_one_at_a_time(self) -> None:
        """A prefix of a longer text; the consumer's gradient mode is its own."""
        stream = generate_tokens(small_model(), PROMPT, 1000)
        first = [next(stream) for _ in range(4)]
        assert torch.is_grad_enabled()
        assert first == generate(small_model(), PROMPT, 4)
        assert generate(small_model(), PROMPT, 0) == []

    def test_model_is_put_into_evaluation(self) -> None:
        """Dropout does not reach the text."""
        model = small_model(dropout=0.5).train()
        assert generate(model, PROMPT, 20) == greedy_uncached(small_model(), PROMPT, 20)
        assert not model.training


class TestSmallMemory:
    @pytest.mark.parametrize("length", [1, 2, 3, 7], ids=lambda n: f"memory{n}")
    def test_one_layer_depends_on_the_last_tokens_only(self, length: int) -> None:
        """The cache wraps around many times in 50 tokens; each is what the last m tokens alone give."""
        model = small_model(n_layers=1)
        tokens = generate(model, PROMPT, 50, memory_length=length)
        assert tokens == greedy_uncached(model, PROMPT, 50, last=length)
        assert all(0 <= token < VOCAB for token in tokens)

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("length", [1, 2, 5, 16], ids=lambda n: f"memory{n}")
    def test_cache_is_the_models_memory(self, length: int, method: str) -> None:
        """Two layers, 50 tokens: the same as windows of one token with m - 1 positions of memory."""
        model = small_model(method)
        expected = greedy_with_memory(model, PROMPT, 50, length)
        assert generate(model, PROMPT, 50, memory_length=length) == expected

    def test_what_fell_out_is_forgotten(self) -> None:
        """Prompts that share their last m tokens go on alike; with a larger memory they do not."""
        model, tail = small_model(n_layers=1), text(6, batch=1)[0].tolist()
        prompts = [[start] * 9 + tail for start in range(8)]
        assert len({tuple(generate(model, p, 20, memory_length=6)) for p in prompts}) == 1
        assert len({tuple(generate(model, p, 20, memory_length=40)) for p in prompts}) > 1


class TestSampling:
    def test_a_generator_decides(self) -> None:
        """Equal seeds give equal texts, whatever the global generator; other seeds other texts."""
        model = small_model()

        def sample(seed: int) -> list[int]:
            generator = torch.Generator().manual_seed(seed)
            return generate(model, PROMPT, 30, temperature=1.0, generator=generator)

        first = sample(0)
        torch.manual_seed(5)
        assert sample(0) == first
        assert sample(1) != first

    def test_the_likeliest_alone_is_greedy(self) -> None:
        """top_k 1 at any temperature, and a temperature near zero."""
        model = small_model()
        greedy = generate(model, PROMPT, 30)
        assert generate(model, PROMPT, 30, temperature=5.0, top_k=1) == greedy
        assert generate(model, PROMPT, 30, temperature=1e-6) == greedy

    def test_frequencies_are_the_softmax(self) -> None:
        """First tokens of 600 samples at temperature 2, among the 3 likeliest."""
        model, generator = small_model(), torch.Generator().manual_seed(0)
        settings = {"temperature": 2.0, "top_k": 3, "generator": generator}
        counts = torch.zeros(VOCAB)
        for _ in range(600):
            counts[generate(model, PROMPT[:1], 1, **settings)[0]] += 1
        top = (model(torch.tensor([PROMPT[:1]])).logits[0, -1].detach() / 2.0).topk(3)
        assert counts[top.indices].sum() == 600
        torch.testing.assert_close(counts[top.indices] / 600, top.values.softmax(0).float(), rtol=0, atol=0.06)

    def test_top_k_beyond_the_vocabulary_is_all_of_it(self) -> None:
        """No error, and no restriction."""
        texts = [
            generate(small_model(), PROMPT, 20, temperature=1.0, top_k=k, generator=torch.Generator().manual_seed(0))
            for k in (None, VOCAB, 10 * VOCAB)
        ]
        assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ([], {}, "`prompt` must hold at least one token; got none"),
        ([1, VOCAB, 2], {}, f"`prompt` must hold tokens below vocab_size = {VOCAB}; got {VOCAB}"),
        ([2, -1], {}, f"`prompt` must hold tokens below vocab_size = {VOCAB}; got -1"),
        ([1], {"temperature": -0.5}, "`temperature` must be at least 0; got -0.5"),
        ([1], {"temperature": float("nan")}, "`temperature` must be at least 0; got nan"),
        ([1], {"top_k": 0}, "`top_k` must be at least 1; got 0"),
        ([1], {"memory_length": 0}, "`memory_length` must be at least 1; got 0"),
        ([1], {"n_tokens": -1}, "`n_tokens` must be at least 0; got -1"),
    ],
    ids=["empty", "unknown-token", "negative-token", "temperature", "nan", "top-k", "memory", "negative-count"],
)
def test_errors_name_the_setting(prompt: list[int], settings: dict[str, float], message: str) -> None:
    """Value and bound are in the message."""
    with pytest.raises(UserError, match=re.escape(message)):
        generate(small_model(), prompt, **{"n_tokens": 1, **settings})
