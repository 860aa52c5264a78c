"""Incremental generation: keys and values of the past are cached, so that a token costs one pass over a window of one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import final

import torch
from torch import Tensor

from sparseffn.devices import to_device
from sparseffn.errors import UserError
from sparseffn.models.attention import RelativeAttention
from sparseffn.models.decoder import Decoder
from sparseffn.models.rotary_attention import RecentKeysValues
from sparseffn.models.transformer_xl import Block, TransformerXL


@final
class _LayerCache:
    """Keys and values of one layer's last `length` positions, and the position keys of every distance."""

    def __init__(self, block: Block, batch: int, length: int) -> None:
        assert isinstance(block.attention, RelativeAttention), "generation needs relative positions"
        self.block, self.attention, self.length, self.filled = block, block.attention, length, 0
        weight = self.attention.key.weight
        # Twice the length, so that the oldest fall out by moving the window, and moving data is rare.
        shape = (batch, 2 * length, self.attention.n_heads, self.attention.d_head)
        self.keys, self.values = weight.new_zeros(shape), weight.new_zeros(shape)
        # Distances length - 1 .. 0, as keys are stored from the oldest on.
        self.positions = self.attention.position_keys(torch.arange(length - 1, -1, -1, device=weight.device))
        self.start = 0

    def append(self, k_BLHC: Tensor, v_BLHC: Tensor) -> tuple[Tensor, Tensor]:
        """Store one position; returns keys and values of the last `length`, oldest first."""
        if self.start + self.filled == self.keys.shape[1]:
            for buffer in (self.keys, self.values):
                buffer[:, : self.length - 1] = buffer[:, self.start + 1 : self.start + self.filled].clone()
            self.start, self.filled = 0, self.length - 1
        end = self.start + self.filled
        self.keys[:, end], self.values[:, end] = k_BLHC[:, 0], v_BLHC[:, 0]
        if self.filled < self.length:
            self.filled += 1
        else:
            self.start += 1
        window = slice(self.start, self.start + self.filled)
        return self.keys[:, window], self.values[:, window]

    def step(self, x_B1D: Tensor) -> Tensor:
        """One layer for one new position."""
        block, attention = self.block, self.attention
        normed = block.attention_norm(x_B1D)
        q = attention.heads(attention.query(normed))[:, 0]
        k, v = self.append(attention.heads(attention.key(normed)), attention.heads(attention.value(normed)))
        content = torch.einsum("bhc,bshc->bhs", q + attention.content_bias, k)
        position = torch.einsum("bhc,shc->bhs", q + attention.position_bias, self.positions[-self.filled :])
        weights = ((content + position) * attention.scale).softmax(dim=-1)
        mixed = torch.einsum("bhs,bshc->bhc", weights, v).flatten(1)[:, None]
        x_B1D = x_B1D + attention.output(mixed)
        return x_B1D + block.ffn(block.ffn_norm(x_B1D))


@torch.no_grad()
def generate_tokens(
    model: TransformerXL | Decoder,
    prompt: Sequence[int],
    n_tokens: int,
    *,
    memory_length: int = 1024,
    temperature: float = 0.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Tokens that follow a prompt, one at a time.

    Args:
        model: put into evaluation mode.
        prompt: at least one token.
        n_tokens: how many to generate.
        memory_length: positions that a token may attend to, itself included; the oldest fall out.
        temperature: 0 takes the most likely token; above, samples from the softmax of logits / temperature.
        top_k: sample among the K most likely only; None among all.
        generator: of the samples, which are drawn on the CPU wherever the model is.

    Raises:
        UserError: the prompt is empty or holds an unknown token, or a setting is out of range.
    """
    _check(prompt, n_tokens, memory_length, temperature, top_k)
    vocab_size = model.config.vocab_size
    if unknown := [token for token in prompt if not 0 <= token < vocab_size]:
        raise UserError(f"`prompt` must hold tokens below vocab_size = {vocab_size}; got {unknown[0]}; fix: use the tokenizer")
    model.eval()
    read = _reader(model, memory_length)
    given_1L = to_device(torch.tensor([list(prompt)], device="cpu"), model.embedding.weight.device)
    for token_11 in given_1L.split(1, dim=1)[:-1]:
        read(token_11)
    token_11 = given_1L[:, -1:]
    for _ in range(n_tokens):
        token_11 = _pick(read(token_11), temperature, top_k, generator)
        yield int(token_11)


def generate(model: TransformerXL | Decoder, prompt: Sequence[int], n_tokens: int, **settings: object) -> list[int]:
    """`generate_tokens` as a list; the settings and errors are the same."""
    return list(generate_tokens(model, prompt, n_tokens, **settings))  # pyright: ignore[reportArgumentType]


def _reader(model: TransformerXL | Decoder, memory_length: int) -> Callable[[Tensor], Tensor]:
    """What reads one more token, `[1, 1]`, and returns the logits after it, `[vocab_size]`."""
    if isinstance(model, Decoder):
        cache = RecentKeysValues(memory_length)
        return lambda token_11: model(token_11, cache=cache).logits[0, 0]
    caches = [_LayerCache(block, 1, memory_length) for block in model.layers if isinstance(block, Block)]
    return lambda token_11: _advance(model, caches, token_11)


def _advance(model: TransformerXL, caches: Sequence[_LayerCache], token_11: Tensor) -> Tensor:
    """Logits `[vocab_size]` after one more token."""
    x = model.embedding(token_11)
    for cache in caches:
        x = cache.step(x)
    return model.project(x)[0, 0]


def _pick(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """The next token, int64 `[1, 1]` on the logits' device."""
    if temperature == 0:
        return logits.argmax().view(1, 1)
    scaled = logits.float() / temperature
    if top_k is not None and top_k < scaled.shape[0]:
        scaled = scaled.masked_fill(scaled < scaled.topk(top_k).values[-1], -torch.inf)
    drawn = torch.multinomial(scaled.softmax(dim=0).cpu(), 1, generator=generator)
    return to_device(drawn, logits.device).view(1, 1)


def _check(prompt: Sequence[int], n_tokens: int, memory_length: int, temperature: float, top_k: int | None) -> None:
    if not prompt:
        raise UserError("`prompt` must hold at least one token; got none; fix: --prompt TEXT")
    limits: dict[str, tuple[float, int, str]] = {
        "n_tokens": (n_tokens, 0, "pass 0 or more"),
        "memory_length": (memory_length, 1, "use the training memory or more"),
        "temperature": (temperature, 0, "0 is greedy, 1 the model's own"),
        "top_k": (1 if top_k is None else top_k, 1, "leave it out to sample among all"),
    }
    for name, (value, least, fix) in limits.items():
        if not value >= least:
            raise UserError(f"`{name}` must be at least {least}; got {value}; fix: {fix}")
