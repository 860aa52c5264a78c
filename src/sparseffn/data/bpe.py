"""Sub-words: byte-pair encoding by SentencePiece, as in the paper (8000 pieces, digits split).

Nothing is lost: text is encoded line by line without normalisation, characters outside the vocabulary become their
UTF-8 bytes, and a line end is the byte piece `<0x0A>`.
"""

from __future__ import annotations

import base64
import importlib
import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, Self, final

import numpy as np

from sparseffn.data.splits import Split
from sparseffn.data.tokenizer_base import Tokenizer, Unit, to_text
from sparseffn.errors import UserError

if TYPE_CHECKING:
    from types import ModuleType

# What SentencePiece writes for a space; in a text it is a character like any other and is spelled in bytes.
SPACE_MARK = "\u2581"
# A word with the space before it, or a space alone; neither tab nor line end is in a word.
WORD = re.compile(r" ?[^ \t\n]+| ")
# The same in a line, where a tab is a character as others.
WORD_OF_LINE = re.compile(r" ?[^ ]+| ")
# Different words of a training text that are held: some 350 MB, and 400 MB while SentencePiece learns from them. Where a text
# has more, the rarest go (`_thinned`).
MAX_WORDS = 1_000_000
# Bytes of a text up to which SentencePiece is given its lines, which it holds all at the same time with 6 times as much beside
# them; of a longer text it is given the words, once each.
MAX_BYTES_OF_LINES = 64 << 20
# Bytes of the longest line that SentencePiece trains on; it leaves out longer ones without a word.
_MAX_LINE = 4192


@final
class BpeTokenizer(Tokenizer):
    """One token a SentencePiece BPE piece."""

    name: ClassVar[str] = "bpe"
    unit: ClassVar[Unit] = "sub-word"
    fits_on: ClassVar[tuple[Split, ...]] = ("train",)
    # Section 4 of the paper: vocabularies of 8000 pieces.
    default_vocab_size: ClassVar[int | None] = 8000

    def __init__(self, model: str) -> None:
        """From SentencePiece's model file in Base64."""
        self._model = model
        # Any: sentencepiece ships no types.
        self._processor: Any = _sentencepiece().SentencePieceProcessor(model_proto=base64.b64decode(model))
        self.vocab_size = self._processor.get_piece_size()
        self._line_end = self._byte_ids("\n")
        self._space_mark = self._byte_ids(SPACE_MARK)

    def _byte_ids(self, character: str) -> list[int]:
        return [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in character.encode("utf-8")]

    @classmethod
    def fit(cls, blocks: Iterable[bytes], *, vocab_size: int | None = None) -> Self:
        """Train on the lines of the text, which may be of any length; the same text gives the same model.

        Memory is bounded: a text of more than `MAX_BYTES_OF_LINES` is counted as by `fit_counted`.
        """
        blocks, head, n_bytes = iter(blocks), [], 0
        for block in blocks:
            head.append(block)
            n_bytes += len(block)
            if n_bytes > MAX_BYTES_OF_LINES:
                counted = cls.fit_counted(map(to_text, chain(head, blocks)), vocab_size=vocab_size)
                return cls(_as_of_lines(counted._model))
        return cls._train((part for line in _lines(head) for part in _short(line)), vocab_size)

    @classmethod
    def fit_counted(cls, texts: Iterable[str], *, vocab_size: int | None = None) -> Self:
        """Train on the words of texts with their counts, of which at most `MAX_WORDS` are held, however long the texts are.

        Pieces do not reach over a space, so that the model is the one of the lines, but for tabs, which separate words here,
        and for the rarest words where there are more than `MAX_WORDS`.
        """
        # The most frequent last, where they are taken from.
        counted = sorted(_word_counts(texts).items(), key=lambda item: (-item[1], item[0]))[::-1]
        return cls._train(_handed_over(counted), vocab_size, input_format="tsv")

    @classmethod
    def _train(cls, sentences: Iterator[str], vocab_size: int | None, **options: str) -> Self:
        size = cls.default_vocab_size if vocab_size is None else vocab_size
        model = io.BytesIO()
        try:
            _sentencepiece().SentencePieceTrainer.train(
                sentence_iterator=sentences,
                model_writer=model,
                **options,
                model_type="bpe",
                vocab_size=size,
                split_digits=True,
                byte_fallback=True,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                bos_id=-1,
                eos_id=-1,
                # One thread and the given order: the model must not depend on the machine.
                num_threads=1,
                shuffle_input_sentence=False,
                minloglevel=2,
            )
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"`vocab_size` must suit the training text: above 256 plus its characters, at most all its pieces; "
                f"got {size} ({' '.join(str(error).split())}); fix: choose another vocab_size, or use tokenizer=bytes"
            ) from error
        return cls(base64.b64encode(model.getvalue()).decode())

    def state(self) -> dict[str, Any]:
        return {"model": self._model}

    def pieces(self) -> list[str]:
        """Every piece by its number, as SentencePiece writes it: spaces are U+2581, bytes `<0x0A>`."""
        return [self._processor.id_to_piece(number) for number in range(self.vocab_size)]

    def merged_pieces(self) -> list[int]:
        """Numbers of the pieces that are made of others, in the order in which they are merged."""
        p = self._processor
        made = [n for n in range(self.vocab_size) if not (p.is_byte(n) or p.is_unknown(n)) and len(p.id_to_piece(n)) > 1]
        return sorted(made, key=lambda number: -p.get_score(number))

    def encode(self, data: bytes) -> np.ndarray:
        lines = to_text(data).split("\n")
        encoded = self._processor.encode(lines, num_threads=1)
        parts = [self._marked(line) if SPACE_MARK in line else ids for line, ids in zip(lines, encoded, strict=True)]
        return np.array(_joined(parts, self._line_end), dtype=np.int64)

    def _marked(self, line: str) -> list[int]:
        """Tokens of a line with U+2581, which SentencePiece would take for a space."""
        return _joined(self._processor.encode(line.split(SPACE_MARK), num_threads=1), self._space_mark)

    def _decode(self, ids: np.ndarray) -> str:
        return str(self._processor.decode(ids.tolist()))


def _joined(parts: Iterable[list[int]], between: list[int]) -> list[int]:
    first, *others = parts
    return [*first, *(number for part in others for number in (*between, *part))]


def _lines(blocks: Iterable[bytes]) -> Iterator[str]:
    for block in blocks:
        yield from filter(None, to_text(block).split("\n"))


def _as_of_lines(model: str) -> str:
    """A model of counted words without the note that it is one: of the same pieces as that of the lines, it is the same bytes.

    Of the fields of `ModelProto` in `sentencepiece_model.proto`, 2 is the trainer's settings, of which 7 is the input's format.
    """
    data, note = base64.b64decode(model), b"\x3a\x03tsv"
    parts, at = [], 0
    while at < len(data):
        tag, (size, begin) = data[at], _varint(data, at + 1)
        field, at = data[begin : begin + size], begin + size
        field = field.replace(note, b"", 1) if tag == 2 << 3 | 2 else field
        parts.append(bytes([tag, *_as_varint(len(field))]) + field)
    return base64.b64encode(b"".join(parts)).decode()


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of protocol buffers, seven bits a byte, the lowest first; and where it ends."""
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        if data[at] < 128:
            return value, at + 1
        at, shift = at + 1, shift + 7


def _as_varint(value: int) -> list[int]:
    return [value] if value < 128 else [value & 127 | 128, *_as_varint(value >> 7)]


def _short(line: str) -> Iterator[str]:
    """A line that SentencePiece would leave out in parts that it takes: whole words, but for words that are too long."""
    if len(line.encode()) <= _MAX_LINE:
        yield line
        return
    part, n_bytes = [], 0
    for word in WORD_OF_LINE.findall(line):
        # The longest character has four bytes.
        step = len(word) if len(word.encode()) <= _MAX_LINE else _MAX_LINE // 4
        for cut in (word[i : i + step] for i in range(0, len(word), step)):
            size = len(cut.encode())
            if n_bytes + size > _MAX_LINE:
                yield "".join(part)
                part, n_bytes = [], 0
            part.append(cut)
            n_bytes += size
    yield "".join(part)


def _handed_over(counted: list[tuple[str, int]]) -> Iterator[str]:
    """Words with their counts, from the last on, each let go as it is handed over: SentencePiece has all of them then."""
    while counted:
        word, count = counted.pop()
        yield from (f"{part}\t{count}" for part in _short(word))


def _word_counts(texts: Iterable[str]) -> Counter[str]:
    """Words with the space before them, as often as they occur; exact for up to `MAX_WORDS` different ones."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(WORD.findall(text))
        if len(counts) > MAX_WORDS:
            counts = _thinned(counts)
    return counts


def _thinned(counts: Counter[str]) -> Counter[str]:
    """The words above the lowest floor that at most half of `MAX_WORDS` reach over: the next thinning is far off then.

    Lossy, in favour of what is frequent: pieces come from words that are seen again and again.
    """
    n_left = len(counts)
    for floor, n_words in sorted(Counter(counts.values()).items()):
        n_left -= n_words
        if n_left <= MAX_WORDS // 2:
            return Counter({word: count for word, count in counts.items() if count > floor})
    return counts


def _sentencepiece() -> ModuleType:
    try:
        return importlib.import_module("sentencepiece")
    except ImportError as error:
        raise UserError(
            "tokenizer 'bpe' must have the package sentencepiece; got none; fix: pip install 'sparseffn[data]'"
        ) from error
