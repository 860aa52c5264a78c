"""Tokens by expert: counts and lifts worked out by hand, and tokens as one can print them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import sparseffn.analysis.tokens as tokens_module
from sparseffn.analysis.tokens import ServedTokens, token_text
from sparseffn.data import tokenizer_class
from sparseffn.ffn import CollectedStats, RoutingStats
from sparseffn.ops import Selection

BYTES = tokenizer_class("bytes").fit([])


def window(indices: list[list[int]], weights: list[list[float]], n_experts: int = 2) -> CollectedStats:
    """One layer's selection, all that is read of its statistics."""
    zero = torch.zeros((), dtype=torch.int64)
    selection = Selection.fixed(torch.tensor(indices), torch.tensor(weights), n_experts)
    none = torch.zeros(n_experts)
    stats = RoutingStats(zero, none.long(), none, zero, zero.float(), zero, selection)
    collected = CollectedStats(layer=[stats])
    return collected


def test_lift_is_the_frequency_among_the_experts_over_that_in_the_text() -> None:
    """Of a a a b c c: expert 0 serves a a b, expert 1 a c c, and a weight of 0 is no choice."""
    text = np.frombuffer(b"aaabcc", dtype=np.uint8)
    served = ServedTokens([text], 256)
    inputs = torch.from_numpy(text.astype(np.int64))
    first = [[0, 1], [0, 1], [1, 0]]
    served.observe(window(first, [[1.0, 0.0]] * 3), inputs[:3].view(1, 3))
    served.observe(window([[0, 1], [1, 0], [1, 0]], [[1.0, 0.0]] * 3), inputs[3:].view(3, 1))
    (layer,) = served.result(BYTES)
    zero = {token.text: token for token in layer[0].tokens}
    one = {token.text: token for token in layer[1].tokens}
    assert layer[0].load == layer[1].load == 0.5
    # P(a | 0) = 2/3 against 1/2 in the text; P(b | 0) = 1/3 against 1/6; c is served by 1 alone.
    assert {t: zero[t].lift for t in zero} == pytest.approx({"a": 4 / 3, "b": 2.0}, abs=1e-4)
    assert {t: one[t].lift for t in one} == pytest.approx({"c": 2.0}, abs=1e-4)
    assert zero["b"].share == pytest.approx(1 / 3, abs=1e-6)


def test_a_rare_token_by_chance_does_not_lead() -> None:
    """x once, lift 2; a forty times of sixty, lift 4/3: a says more of the expert."""
    text = np.frombuffer(b"a" * 60 + b"b" * 59 + b"x", dtype=np.uint8)
    served = ServedTokens([text], 256)
    own = [0] * 40 + [1] * 20 + [0] * 19 + [1] * 40 + [0]
    served.observe(window([[e] for e in own], [[1.0]] * 120), torch.from_numpy(text.astype(np.int64)).view(1, -1))
    assert [token.text for token in served.result(BYTES)[0][0].tokens] == ["a", "x"]


def test_rare_tokens_of_a_large_vocabulary_share_a_column(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table keeps its size, the counts their sum, and no expert is said to serve the rest."""
    monkeypatch.setattr(tokens_module, "MAX_TOKENS", 2)
    text = np.array([5, 5, 5, 9, 9, 1, 2, 3], dtype=np.int64)
    served = ServedTokens([text], 10_000)
    served.observe(window([[0]] * 3 + [[1]] * 5, [[1.0]] * 8), torch.from_numpy(text).view(1, -1))
    assert served.ids.tolist() == [5, 9] and served.totals.tolist() == [3, 2, 3]
    assert served.layers["layer"].tolist() == [[3, 0, 0], [0, 2, 3]]
    listed = [
        token.token
        for expert in served.result(tokenizer_class("words").fit([b"w%d " % i for i in range(20)]))[0]
        for token in expert.tokens
    ]
    assert listed == [5, 9]


PRINTED = {" ": "␣", "\n": "\\n", "\t": "\\t", "a": "a", "\x00": "\\x00", "\xe9": "\\xe9"}


@pytest.mark.parametrize(("character", "shown"), PRINTED.items(), ids=["space", "line", "tab", "letter", "null", "high"])
def test_every_byte_can_be_printed(character: str, shown: str) -> None:
    """Spaces are seen, control characters and halves of characters are escaped."""
    assert token_text(BYTES, ord(character)) == shown
    assert all(token_text(BYTES, byte).isprintable() for byte in range(256))


def test_words_and_pieces_keep_what_sets_them_apart() -> None:
    """A line end is visible; a piece that begins a word keeps its space."""
    words = tokenizer_class("words").fit([b"the cat the\n"])
    assert {token_text(words, i) for i in range(words.vocab_size)} == {"the", "cat", "\\n"}
    pytest.importorskip("sentencepiece", reason="the extra `data` is not installed here")
    bpe = tokenizer_class("bpe").fit([b"the cat and the dog and the hen\n" * 50], vocab_size=290)
    pieces = {token_text(bpe, i) for i in range(bpe.vocab_size)}
    assert {"␣the", "t", "\\n"} <= pieces and all(piece.isprintable() for piece in pieces)
