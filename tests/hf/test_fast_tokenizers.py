"""Our tokenisers in transformers: the same tokens, the same text, from files that need no package of ours."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs transformers: pip install 'sparseffn[hf]'")

from transformers import AutoTokenizer

from sparseffn.data import Tokenizer
from sparseffn.data.tokenizers import list_tokenizers, tokenizer_class
from sparseffn.hf.fast_tokenizers import fast_tokenizer

TEXT = (
    Path(random.__file__).read_text(encoding="utf-8")
    + "naïve café — 日本語 <unk> 123 4567\n\tend\n\n  two  spaces\x1c \x85 last\u2028line"
)
PIECES = [
    "the ",
    "\n",
    " ",
    "  ",
    "\t",
    "def",
    "random",
    "1234",
    "<unk>",
    "<eos>",
    "<0x0A>",
    "日",
    "é",
    "<s>",
    "##x",
    "\u2581",
    "\x00",
    # What stands for that byte inside.
    "\u0100",
    "<0x00>",
]


def fitted(name: str, text: str = TEXT) -> Tokenizer:
    return tokenizer_class(name).fit([text.encode()], vocab_size=600 if name == "bpe" else None)


def samples(tokenizer: Tokenizer) -> list[str]:
    """Texts that the tokeniser can encode: the one that it was made for, and pieces of it in disorder."""
    draw = random.Random(0)
    found = [TEXT, "", " ", "\n", "x\n", "x", "\n\n x"]
    known = [piece for piece in PIECES if piece in TEXT] if tokenizer.name in ("chars", "seen-bytes") else PIECES
    found += ["".join(draw.choices([*known, *TEXT.split(" ")[:200]], k=40)) for _ in range(50)]
    return found


@pytest.mark.parametrize("name", list_tokenizers())
class TestSameTokens:
    def test_every_text_has_our_tokens(self, name: str, tmp_path: Path) -> None:
        """Loaded by `AutoTokenizer` from a folder that holds nothing else."""
        pytest.importorskip("sentencepiece", reason="bpe needs it")
        ours = fitted(name)
        fast_tokenizer(ours).save_pretrained(tmp_path)
        theirs = AutoTokenizer.from_pretrained(tmp_path)
        assert len(theirs) == ours.vocab_size
        for text in samples(ours):
            expected = ours.encode(text.encode()).tolist()
            assert theirs(text)["input_ids"] == expected, text
            assert theirs.decode(expected) == ours.decode(expected), text

    def test_every_token_has_our_text(self, name: str) -> None:
        """Of whole characters: what becomes of half a character is not ours to compare."""
        ours = fitted(name)
        theirs = fast_tokenizer(ours)
        for number in range(ours.vocab_size):
            if "\ufffd" not in (text := ours.decode([number])):
                assert theirs.decode([number]) == text, number


@pytest.mark.parametrize("name", ["bytes", "bpe", "chars", "seen-bytes", "words"])
def test_the_end_of_a_text_is_what_no_text_has(name: str, tmp_path: Path) -> None:
    """NUL where the vocabulary has it, as padding too; a text's own characters are never taken for it."""
    pytest.importorskip("sentencepiece", reason="bpe needs it")
    ours = fitted(name)
    fast_tokenizer(ours).save_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    if name not in ("bytes", "bpe"):
        assert theirs.eos_token_id is None and theirs.pad_token_id is None
        return
    (end,) = ours.encode(b"\0")
    assert theirs.eos_token_id == theirs.pad_token_id == end
    assert theirs.decode([end]) == "\0" and theirs.decode([end], skip_special_tokens=True) == ""
    padded = theirs(["a", "some text"], padding=True)
    assert padded["input_ids"][0][-1] == end and 0 in padded["attention_mask"][0]


def test_a_character_without_a_token_is_an_error() -> None:
    """As with ours; nothing is dropped."""
    for name in ("chars", "seen-bytes", "words"):
        ours = fitted(name, "some words\n")
        with pytest.raises(Exception, match=r"UNK|unk"):
            fast_tokenizer(ours)("other z words")


def test_all_white_space_separates_words() -> None:
    """Every character that `str.split` takes for white space."""
    spaces = [chr(point) for point in range(sys.maxunicode) if chr(point).isspace()]
    text = "".join(f"word{space}" for space in spaces) + "\n"
    ours = fitted("words", text)
    assert fast_tokenizer(ours)(text)["input_ids"] == ours.encode(text.encode()).tolist()
