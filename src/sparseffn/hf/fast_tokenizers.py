"""Our tokenisers as tokenisers of transformers: the same tokens for the same text, in a `tokenizer.json` that needs no package
of ours.

    bytes, seen-bytes    the bytes' printable stand-ins, one token each, no merges
    chars, words         a table of characters or words
    bpe                  SentencePiece's pieces and the merges that lead to them, other characters as their bytes

A vocabulary with the character NUL, as those of `bytes` and `bpe` are, has it for the end of a text and for padding: hardly any
text holds it, and its token stays what it was. Of other vocabularies every token is one of the training text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from sparseffn.data import Tokenizer
from sparseffn.data.bpe import SPACE_MARK, BpeTokenizer
from sparseffn.data.tokenizers import END_OF_LINE, UNKNOWN, BytesTokenizer, CharsTokenizer, SeenBytesTokenizer, WordsTokenizer
from sparseffn.errors import UserError

# What `str.split` takes for white space; `\s` lacks the separators of ASCII.
_WHITE_SPACE = Regex(r"[\s\x1c-\x1f\x85]+")
# By its own name in every vocabulary that has it, so that a text's NUL is this token and nothing else is.
_END_OF_TEXT = "\x00"
# No word has a line end in it, so that every word but the first gets its space.
_NO_PREFIX = "\n"


def fast_tokenizer(tokenizer: Tokenizer, *, model_max_length: int | None = None) -> PreTrainedTokenizerFast:
    """A tokeniser of ours for transformers.

    Args:
        tokenizer: one of `data.list_tokenizers()`.
        model_max_length: longest text, in tokens, that is not warned of; None: any.

    Raises:
        UserError: the tokeniser is of another kind.
    """
    make = _MAKERS.get(type(tokenizer))
    if make is None:
        known = ", ".join(kind.name for kind in _MAKERS)
        raise UserError(
            f"`tokenizer` must be one that transformers can have, {known}; got {tokenizer.name!r}; "
            "fix: export without a tokenizer (--without-tokenizer)"
        )
    made = make(tokenizer)
    end = AddedToken(_END_OF_TEXT, special=True, normalized=False)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made,
        clean_up_tokenization_spaces=False,
        **({} if made.token_to_id(_END_OF_TEXT) is None else {"eos_token": end, "pad_token": end}),
        **({} if model_max_length is None else {"model_max_length": model_max_length}),
    )
    assert len(fast) == tokenizer.vocab_size, "nothing is added to the vocabulary"
    return fast


def _of_bytes(values: Sequence[int]) -> FastTokenizer:
    """Byte `values[i]` is token i; a byte that is missing is an error, as a table has no token for what is unknown."""
    letters = {**bytes_to_unicode(), 0: _END_OF_TEXT}
    fast = FastTokenizer(models.WordLevel({letters[value]: number for number, value in enumerate(values)}, unk_token=UNKNOWN))
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), _single_characters()]
    )
    fast.decoder = decoders.ByteLevel()
    return fast


def _single_characters() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(r"(?m:.)"), behavior="isolated")


def _bytes(tokenizer: Tokenizer) -> FastTokenizer:
    return _of_bytes(range(tokenizer.vocab_size))


def _seen_bytes(tokenizer: Tokenizer) -> FastTokenizer:
    return _of_bytes(bytes.fromhex(tokenizer.state()["values"]))


def _chars(tokenizer: Tokenizer) -> FastTokenizer:
    characters = tokenizer.state()["characters"]
    fast = FastTokenizer(models.WordLevel({c: number for number, c in enumerate(characters)}, unk_token=_absent(characters)))
    fast.pre_tokenizer = _single_characters()
    fast.decoder = decoders.Fuse()
    return fast


def _absent(vocabulary: Sequence[str]) -> str:
    """A name for what is unknown that is not in the vocabulary, so that meeting it is an error."""
    name = UNKNOWN
    while name in vocabulary:
        name += "?"
    return name


def _words(tokenizer: Tokenizer) -> FastTokenizer:
    """`<unk>` for a word that is not there, where the text had that word itself."""
    words = tokenizer.state()["words"]
    fast = FastTokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=UNKNOWN))
    # A last line without an end is a line too.
    fast.normalizer = normalizers.Replace(Regex(r"\n|(?<=[^\n])\z"), f" {END_OF_LINE} ")
    fast.pre_tokenizer = pre_tokenizers.Split(_WHITE_SPACE, behavior="removed")
    fast.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix=_NO_PREFIX, cleanup=False),
            decoders.Fuse(),
            decoders.Replace(Regex(f" ?{END_OF_LINE} ?"), "\n"),
        ]
    )
    return fast


def _bpe(tokenizer: Tokenizer) -> FastTokenizer:
    """SentencePiece merges the pair whose piece has the best score, and that is the earliest piece.

    Spaces stay spaces here, where SentencePiece has U+2581: that character of a text is then spelled in bytes, as ours is.
    """
    assert isinstance(tokenizer, BpeTokenizer), "chosen by its class"
    pieces = [piece.replace(SPACE_MARK, " ") for piece in tokenizer.pieces()]
    # The piece for what is unknown, which no text has, as the others are spelled in bytes.
    pieces[0] = tokenizer.decode([0])
    if _END_OF_TEXT not in pieces:
        pieces[pieces.index("<0x00>")] = _END_OF_TEXT
    numbers = {piece: number for number, piece in enumerate(pieces)}
    merges: list[tuple[str, str]] = []
    for number in tokenizer.merged_pieces():
        text = pieces[number]
        splits = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
        merges += [pair for pair in splits if pair[0] in numbers and pair[1] in numbers]
    fast = FastTokenizer(models.BPE(numbers, merges, byte_fallback=True))
    fast.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return fast


_MAKERS: dict[type[Any], Callable[[Any], FastTokenizer]] = {
    BytesTokenizer: _bytes,
    SeenBytesTokenizer: _seen_bytes,
    CharsTokenizer: _chars,
    WordsTokenizer: _words,
    BpeTokenizer: _bpe,
}
