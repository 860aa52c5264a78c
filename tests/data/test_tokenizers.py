"""Tokenisers lose nothing, can be stored, and say what they cannot encode."""

from __future__ import annotations

import importlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseffn.data import Tokenizer, list_tokenizers, tokenizer_class, tokenizer_from_json
from sparseffn.data.bpe import BpeTokenizer, _short, _thinned, _word_counts
from sparseffn.errors import UserError

SAMPLE = "def f(x):\n\treturn x + 12345  # café\n    for i in range(10): print(i)\n" * 60
# No lone surrogates: they are not text in UTF-8.
TEXT = st.text(st.characters(exclude_categories=["Cs"]))


def fitted(name: str) -> Tokenizer:
    """The tokeniser, fitted on the sample."""
    pytest.importorskip("sentencepiece") if name == "bpe" else None
    return tokenizer_class(name).fit([SAMPLE.encode()], vocab_size=300 if name == "bpe" else None)


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    """One model for all drawn texts."""
    return fitted("bpe")


@pytest.mark.parametrize("name", list_tokenizers())
class TestEvery:
    def test_is_the_same_after_json(self, name: str) -> None:
        """Stored and read, it has the same digest and gives the same tokens."""
        tokenizer = fitted(name)
        again = tokenizer_from_json(tokenizer.to_json())
        assert again.digest == tokenizer.digest
        assert type(again) is type(tokenizer)
        assert np.array_equal(again.encode(SAMPLE.encode()), tokenizer.encode(SAMPLE.encode()))

    def test_is_the_same_when_fitted_twice(self, name: str) -> None:
        """Fitting draws nothing at random."""
        assert fitted(name).digest == fitted(name).digest

    def test_numbers_are_inside_the_vocabulary(self, name: str) -> None:
        """0 <= number < vocab_size."""
        tokenizer = fitted(name)
        ids = tokenizer.encode(SAMPLE.encode())
        assert ids.ndim == 1
        assert 0 <= ids.min() <= ids.max() < tokenizer.vocab_size

    def test_empty_text_has_no_tokens(self, name: str) -> None:
        """And no tokens are empty text."""
        assert fitted(name).encode(b"").shape == (0,)
        assert fitted(name).decode([]) == ""

    def test_text_can_be_encoded_in_blocks_of_lines(self, name: str) -> None:
        """A cut after a line end changes nothing."""
        tokenizer, lines = fitted(name), SAMPLE.encode().splitlines(keepends=True)
        parts = [tokenizer.encode(line) for line in lines]
        assert np.array_equal(np.concatenate(parts), tokenizer.encode(SAMPLE.encode()))

    def test_decoding_foreign_numbers_is_refused(self, name: str) -> None:
        """Neither too large nor negative."""
        tokenizer = fitted(name)
        with pytest.raises(UserError, match=f"`ids` must be between 0 and .*got {tokenizer.vocab_size}"):
            tokenizer.decode([0, tokenizer.vocab_size])
        with pytest.raises(UserError, match="got -1"):
            tokenizer.decode([-1])


class TestBytes:
    @given(st.binary())
    def test_tokens_are_the_bytes(self, data: bytes) -> None:
        """Anything can be encoded, invalid UTF-8 included."""
        assert bytes(fitted("bytes").encode(data).tolist()) == data

    @given(TEXT)
    def test_text_comes_back(self, text: str) -> None:
        """For UTF-8 decoding is the inverse."""
        tokenizer = fitted("bytes")
        assert tokenizer.decode(tokenizer.encode(text.encode())) == text

    def test_cut_characters_decode_visibly(self) -> None:
        """A sampled half character is no error."""
        assert fitted("bytes").decode([0xC3]) == "\ufffd"


class TestChars:
    @given(TEXT)
    def test_text_comes_back(self, text: str) -> None:
        """Line ends, NUL and characters beyond 16 bits included."""
        tokenizer = tokenizer_class("chars").fit([text.encode()])
        assert tokenizer.vocab_size == len(set(text))
        assert tokenizer.decode(tokenizer.encode(text.encode())) == text
        assert tokenizer_from_json(tokenizer.to_json()).digest == tokenizer.digest

    def test_unknown_character_is_named(self) -> None:
        """Below, between and above the known ones."""
        tokenizer = tokenizer_class("chars").fit([b"bd"])
        for character in "ace":
            with pytest.raises(UserError, match=f"2 characters; got '{character}'; fix: use tokenizer=bytes"):
                tokenizer.encode(b"b" + character.encode())

    def test_invalid_utf8_is_named_with_its_offset(self) -> None:
        """The remedy is the bytes tokeniser."""
        with pytest.raises(UserError, match="got byte 0xff at offset 2 of the data; fix: use tokenizer=bytes"):
            tokenizer_class("chars").fit([b"ab\xff"])


class TestWords:
    def test_words_are_numbered_by_count_then_alphabet(self) -> None:
        """And a line end is a word."""
        tokenizer = tokenizer_class("words").fit([b" b a \n b\n"])
        assert tokenizer.state() == {"words": ["<eos>", "b", "a"]}
        assert tokenizer.encode(b" b a \n b\n").tolist() == [1, 2, 0, 1, 0]

    @pytest.mark.parametrize("text", ["a b\nb\n", "\n\na\n", "a\n", ""], ids=["words", "empty-lines", "one", "empty"])
    def test_lines_come_back(self, text: str) -> None:
        """Text with single spaces is decoded as it was."""
        tokenizer = tokenizer_class("words").fit([b"a b\n"])
        assert tokenizer.decode(tokenizer.encode(text.encode())) == text

    def test_unknown_word_becomes_unk(self) -> None:
        """Where the training text has that word."""
        tokenizer = tokenizer_class("words").fit([b"a <unk>\n"])
        assert tokenizer.decode(tokenizer.encode(b"a new\n")) == "a <unk>\n"

    def test_unknown_word_is_refused_without_unk(self) -> None:
        """The message names the word and another tokeniser."""
        with pytest.raises(UserError, match="no '<unk>'; got 'new'; fix: use tokenizer=bpe"):
            tokenizer_class("words").fit([b"a b\n"]).encode(b"a new\n")


class TestBpe:
    @given(text=TEXT)
    def test_any_text_comes_back(self, bpe: Tokenizer, text: str) -> None:
        """Characters that were never seen go by their bytes."""
        assert bpe.decode(bpe.encode(text.encode())) == text

    @pytest.mark.parametrize(
        "text",
        [
            "  lead\n\n  x  \n",
            "a▁b ▁",
            "\0x\r\n\t",
            "日本 \U0001f600",
            "<unk> <0x0A>",
            "\u00a0\u3000\u200b\ufeff",
            "ﬁe\u0301",
        ],
        ids=["spaces", "space-mark", "controls", "unseen", "piece-names", "odd-spaces", "compatibility"],
    )
    def test_awkward_text_comes_back(self, bpe: Tokenizer, text: str) -> None:
        """Nothing is normalised, stripped or read as a piece's name."""
        ids = bpe.encode(text.encode())
        assert bpe.decode(ids) == text
        assert 0 not in ids

    def test_digits_are_split(self, bpe: Tokenizer) -> None:
        """12345 occurs in every other line and is five tokens all the same."""
        assert len(bpe.encode(b"x12345")) == 1 + 5

    @pytest.mark.parametrize("size", [0, 10, 100_000], ids=["zero", "under-bytes", "over-text"])
    def test_unsuitable_vocabulary_size_is_refused(self, size: int) -> None:
        """With the size in the message."""
        pytest.importorskip("sentencepiece")
        with pytest.raises(UserError, match=f"`vocab_size` must suit .*; got {size} .*; fix: choose another"):
            tokenizer_class("bpe").fit([SAMPLE.encode()], vocab_size=size)

    def test_missing_package_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The error has the command that installs it."""
        real = importlib.import_module

        def refuse(name: str, package: str | None = None) -> object:
            if name == "sentencepiece":
                raise ImportError(name)
            return real(name, package)

        monkeypatch.setattr(importlib, "import_module", refuse)
        with pytest.raises(UserError, match=r"fix: pip install 'sparseffn\[data\]'"):
            tokenizer_class("bpe").fit([SAMPLE.encode()], vocab_size=300)


class TestNames:
    def test_unknown_name_offers_the_nearest(self) -> None:
        """`byte` is nearly `bytes`."""
        with pytest.raises(UserError, match="unknown tokenizer 'byte'; fix: did you mean 'bytes'"):
            tokenizer_class("byte")

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "{}",
            "[]",
            '{"tokenizer": "words"}',
            '{"tokenizer": "words", "words": 1}',
            '{"tokenizer": "words", "words": "a"}',
        ],
    )
    def test_stored_rubbish_is_refused(self, text: str) -> None:
        """Whatever is wrong with it."""
        with pytest.raises(UserError, match=r"a stored tokenizer must be what `Tokenizer\.to_json` wrote"):
            tokenizer_from_json(text)


class TestSeenBytes:
    def test_only_bytes_that_occur_are_tokens(self) -> None:
        """In numeric order, whatever the order of the text; text need not be UTF-8."""
        tokenizer = tokenizer_class("seen-bytes").fit([b"zab", b"\xffa"])
        assert tokenizer.vocab_size == 4
        assert tokenizer.encode(b"ab\xffz").tolist() == [0, 1, 3, 2]
        with pytest.raises(UserError, match="must consist of the vocabulary's 4 bytes; got 0x63; fix: use tokenizer=bytes"):
            tokenizer.encode(b"abc")


class TestCounted:
    def test_words_with_counts_give_the_model_of_the_lines(self) -> None:
        """Pieces do not reach over a space; the memory of the one grows with the text, of the other with its words."""
        pytest.importorskip("sentencepiece")
        text = SAMPLE.replace("\t", "    ") + "two  spaces and a space at the end \n" * 9
        lines = BpeTokenizer.fit([text.encode()], vocab_size=300)
        counted = BpeTokenizer.fit_counted(iter(text.splitlines(keepends=True)), vocab_size=300)
        pieces = [[tokenizer.decode([i]) for i in range(300)] for tokenizer in (lines, counted)]
        assert pieces[0] == pieces[1]
        assert np.array_equal(lines.encode(text.encode()), counted.encode(text.encode()))

    def test_a_long_text_is_counted_in_place_of_held(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """By `fit` itself, above a size; all of the text counts."""
        pytest.importorskip("sentencepiece")
        blocks = [SAMPLE.replace("\t", " ").encode(), b"quokka zebrafish\n" * 50]
        held = BpeTokenizer.fit(blocks, vocab_size=320)
        monkeypatch.setattr("sparseffn.data.bpe.MAX_BYTES_OF_LINES", len(blocks[0]))
        assert BpeTokenizer.fit(blocks, vocab_size=320).digest == held.digest

    @pytest.mark.parametrize("times", [149, 150, 5000], ids=["just-short", "just-long", "long"])
    def test_lines_of_any_length_are_learned_from(self, times: int) -> None:
        """The same pieces as from the same words in short lines, also where a word is too long for a line."""
        pytest.importorskip("sentencepiece")
        words = b" zebrafish xylophone quokkas"
        short, long = (BpeTokenizer.fit([text], vocab_size=290) for text in ((words + b"\n") * times, words * times + b"\n"))
        assert long.pieces() == short.pieces()
        assert len(BpeTokenizer.fit([b"zebra" * 2000], vocab_size=270).encode(b"zebra" * 10)) <= 10
        assert len(BpeTokenizer.fit_counted(["zebra" * 2000], vocab_size=270).encode(b"zebra" * 10)) <= 10

    @pytest.mark.parametrize(
        "text", ["ab cd  " * 999, "zebra" * 1000, "\u00e4\U0001f600 " * 4000], ids=["words", "one", "wide"]
    )
    def test_long_lines_are_cut_without_loss(self, text: str) -> None:
        """In parts of at most 4192 bytes that begin with words, where words are that short."""
        parts = list(_short(text))
        assert "".join(parts) == text and max(len(part.encode()) for part in parts) <= 4192
        assert text.startswith("zebra") or all(part.startswith(" ") for part in parts[1:])

    def test_tabs_only_separate_words(self) -> None:
        """They are spelled in bytes, and nothing is lost."""
        pytest.importorskip("sentencepiece")
        tokenizer = BpeTokenizer.fit_counted([SAMPLE], vocab_size=300)
        assert tokenizer.decode(tokenizer.encode(SAMPLE.encode())) == SAMPLE

    @pytest.mark.parametrize("times", [1, 3], ids=["once", "thrice"])
    def test_the_number_of_words_is_bounded(self, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
        """Also where none of them is seen once alone; the rarest go first."""
        monkeypatch.setattr("sparseffn.data.bpe.MAX_WORDS", 100)
        counts = _word_counts("often" + f" word{i}" * times + " often" for i in range(1000))
        assert len(counts) <= 100
        assert counts["often"] == counts[" often"] == 1000

    def test_words_within_the_bound_are_counted_exactly(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Rare ones too. Beyond it they go up to a floor, 14 of each count here, until at most half of the bound are left."""
        texts = [f"word{i}" for i in range(98) for _ in range(1 + i % 7)]
        monkeypatch.setattr("sparseffn.data.bpe.MAX_WORDS", 98)
        assert _word_counts(texts) == Counter(texts)
        assert _thinned(Counter(texts)) == {word: count for word, count in Counter(texts).items() if count > 4}
