"""Tokenisers by name: `bytes`, `chars`, `words` (as in Penn Treebank) and `bpe` (SentencePiece)."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, ClassVar, Self, final

import numpy as np

from sparseffn.data.bpe import BpeTokenizer
from sparseffn.data.splits import SPLITS, Split
from sparseffn.data.tokenizer_base import Tokenizer, Unit, to_text
from sparseffn.errors import UserError, unknown_name

END_OF_LINE = "<eos>"
UNKNOWN = "<unk>"


@final
class BytesTokenizer(Tokenizer):
    """One token a byte: encodes anything, needs no fitting."""

    name: ClassVar[str] = "bytes"
    unit: ClassVar[Unit] = "byte"
    needs_text: ClassVar[bool] = False
    vocab_size = 256

    @classmethod
    def fit(cls, blocks: Iterable[bytes], *, vocab_size: int | None = None) -> Self:
        return cls()

    def state(self) -> dict[str, Any]:
        return {}

    def encode(self, data: bytes) -> np.ndarray:
        return np.frombuffer(data, dtype=np.uint8)

    def _decode(self, ids: np.ndarray) -> str:
        return ids.astype(np.uint8).tobytes().decode("utf-8", errors="replace")


@final
class SeenBytesTokenizer(Tokenizer):
    """One token a byte that occurs in the corpus, in numeric order: 205 of them in enwik8, as in the published counts."""

    name: ClassVar[str] = "seen-bytes"
    unit: ClassVar[Unit] = "byte"
    fits_on: ClassVar[tuple[Split, ...]] = SPLITS
    needs_text: ClassVar[bool] = False

    def __init__(self, values: str) -> None:
        """From the bytes as hexadecimal digits."""
        self._values = np.frombuffer(bytes.fromhex(values), dtype=np.uint8)
        self.vocab_size = len(self._values)

    @classmethod
    def fit(cls, blocks: Iterable[bytes], *, vocab_size: int | None = None) -> Self:
        return cls(bytes(sorted(set(chain.from_iterable(blocks)))).hex())

    def state(self) -> dict[str, Any]:
        return {"values": self._values.tobytes().hex()}

    def encode(self, data: bytes) -> np.ndarray:
        given = np.frombuffer(data, dtype=np.uint8)
        numbers = np.full(256, -1, dtype=np.int64)
        numbers[self._values] = np.arange(self.vocab_size)
        ids = numbers[given]
        if (ids < 0).any():
            raise UserError(
                f"data must consist of the vocabulary's {self.vocab_size} bytes; "
                f"got 0x{int(given[int(np.argmax(ids < 0))]):02x}; fix: use tokenizer=bytes"
            )
        return ids

    def _decode(self, ids: np.ndarray) -> str:
        return self._values[ids].tobytes().decode("utf-8", errors="replace")


@final
class CharsTokenizer(Tokenizer):
    """One token a Unicode character, numbered in code point order.

    The vocabulary is every character of all splits, so that bits per character are defined for each of them.
    """

    name: ClassVar[str] = "chars"
    unit: ClassVar[Unit] = "character"
    fits_on: ClassVar[tuple[Split, ...]] = SPLITS

    def __init__(self, characters: str) -> None:
        self._points = np.unique(_code_points(characters))
        self.vocab_size = len(self._points)

    @classmethod
    def fit(cls, blocks: Iterable[bytes], *, vocab_size: int | None = None) -> Self:
        return cls("".join(set(chain.from_iterable(map(to_text, blocks)))))

    def state(self) -> dict[str, Any]:
        return {"characters": _from_code_points(self._points)}

    def encode(self, data: bytes) -> np.ndarray:
        points = _code_points(to_text(data))
        ids = np.searchsorted(self._points, points)
        missing = points[np.append(self._points, 0)[ids] != points] if self.vocab_size else points
        if missing.size:
            raise UserError(
                f"text must consist of the vocabulary's {self.vocab_size} characters; "
                f"got {chr(int(missing[0]))!r}; fix: use tokenizer=bytes"
            )
        return ids

    def _decode(self, ids: np.ndarray) -> str:
        return _from_code_points(self._points[ids])


@final
class WordsTokenizer(Tokenizer):
    """One token a word, as in Penn Treebank: words are separated by white space, every line ends in `<eos>`.

    Words are numbered by falling count, equal counts in alphabetic order. A word that is not in the vocabulary becomes
    `<unk>` where the training text has that word itself.
    """

    name: ClassVar[str] = "words"
    unit: ClassVar[Unit] = "word"
    fits_on: ClassVar[tuple[Split, ...]] = ("train",)

    def __init__(self, words: Sequence[str]) -> None:
        if not (isinstance(words, list | tuple) and all(isinstance(word, str) for word in words)):
            raise TypeError("`words` must be a list of strings")
        self._words = tuple(words)
        self._numbers = {word: number for number, word in enumerate(self._words)}
        self.vocab_size = len(self._words)

    @classmethod
    def fit(cls, blocks: Iterable[bytes], *, vocab_size: int | None = None) -> Self:
        counts = Counter(chain.from_iterable(map(_words_of, blocks)))
        return cls([word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))])

    def state(self) -> dict[str, Any]:
        return {"words": list(self._words)}

    def encode(self, data: bytes) -> np.ndarray:
        unknown = self._numbers.get(UNKNOWN, -1)
        words = _words_of(data)
        ids = np.fromiter((self._numbers.get(word, unknown) for word in words), dtype=np.int64, count=len(words))
        if (ids < 0).any():
            word = words[int(np.argmax(ids < 0))]
            raise UserError(
                f"every word must be in the vocabulary of the training text, which has no {UNKNOWN!r}; got {word!r}; "
                f"fix: use tokenizer=bpe or tokenizer=bytes, or replace rare words in the training text by {UNKNOWN!r}"
            )
        return ids

    def _decode(self, ids: np.ndarray) -> str:
        words = (self._words[number] for number in ids)
        return re.sub(" ?\n ?", "\n", " ".join("\n" if word == END_OF_LINE else word for word in words))


def _words_of(data: bytes) -> list[str]:
    lines = to_text(data).split("\n")
    if not lines[-1]:
        lines.pop()
    return [word for line in lines for word in (*line.split(), END_OF_LINE)]


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4")


def _from_code_points(points: np.ndarray) -> str:
    return points.astype("<u4").tobytes().decode("utf-32-le")


_TOKENIZERS: dict[str, type[Tokenizer]] = {
    cls.name: cls for cls in (BytesTokenizer, SeenBytesTokenizer, CharsTokenizer, WordsTokenizer, BpeTokenizer)
}


def list_tokenizers() -> list[str]:
    return sorted(_TOKENIZERS)


def tokenizer_class(name: str) -> type[Tokenizer]:
    """The tokeniser of that name.

    Raises:
        UserError: there is none.
    """
    if name not in _TOKENIZERS:
        raise unknown_name("tokenizer", name, _TOKENIZERS)
    return _TOKENIZERS[name]


def tokenizer_from_json(text: str) -> Tokenizer:
    """The tokeniser that `Tokenizer.to_json` wrote.

    Raises:
        UserError: the text is something else.
    """
    try:
        state = json.loads(text)
        return tokenizer_class(state.pop("tokenizer"))(**state)
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError, RuntimeError) as error:
        raise UserError(
            f"a stored tokenizer must be what `Tokenizer.to_json` wrote; got {text[:40]!r} ({error}); "
            f"fix: delete the stored file and make the tokenizer again"
        ) from error
