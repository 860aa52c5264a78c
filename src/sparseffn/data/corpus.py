"""A corpus ready for training: `load_corpus("stdlib").train` is a memory-mapped array of token numbers."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np

from sparseffn.data.cache import Prepared, TokenCache, TokenWriter
from sparseffn.data.place import Place
from sparseffn.data.registry import corpus_entry
from sparseffn.data.splits import SPLITS, Block, ContentDigest, Source, Split, digest_of
from sparseffn.data.tokenizer_base import Tokenizer, Unit, to_text
from sparseffn.data.tokenizers import tokenizer_class
from sparseffn.errors import UserError, unknown_name

# Below this nothing can be learned or measured: one window of a tiny model, one prediction.
MIN_TOKENS: Mapping[Split, int] = {"train": 1000, "valid": 2, "test": 2}

METRICS: Mapping[Unit, str] = {
    "byte": "bits per byte",
    "character": "bits per character",
    "word": "perplexity",
    "sub-word": "perplexity",
}


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """Tokens of the three splits, and what they are."""

    # Name of the corpus.
    name: str
    # Tokeniser that made the tokens.
    tokenizer: Tokenizer
    # Training tokens, shape [n], memory-mapped.
    train: np.ndarray
    # Validation tokens.
    valid: np.ndarray
    # Test tokens.
    test: np.ndarray
    # 32 hexadecimal digits: bytes of the splits and tokeniser.
    digest: str
    # JSON values for results: corpus, tokenizer, unit, vocab_size, digest, counts by split, and the corpus's own.
    info: dict[str, object]
    # Text length by split, in bytes.
    split_bytes: Mapping[Split, int]

    @property
    def unit(self) -> Unit:
        """What one token is."""
        return self.tokenizer.unit

    def tokens(self, split: Split) -> np.ndarray:
        """Tokens of a split by name.

        Raises:
            UserError: there is no such split.
        """
        if split not in SPLITS:
            raise unknown_name("split", split, SPLITS)
        return {"train": self.train, "valid": self.valid, "test": self.test}[split]

    def n_bytes(self, split: Split) -> int:
        """Bytes of the text of a split.

        Raises:
            UserError: there is no such split.
        """
        if split not in SPLITS:
            raise unknown_name("split", split, SPLITS)
        return self.split_bytes[split]


def to_metric(nats_per_token: float, unit: Unit) -> tuple[str, float]:
    """The customary metric of a mean loss: bits per byte or character, perplexity per word or sub-word.

    Args:
        nats_per_token: mean cross-entropy.
        unit: what one token is.

    Returns:
        Name and value; a perplexity too large for a float is infinite.

    Raises:
        UserError: there is no such unit.
    """
    if unit not in METRICS:
        raise unknown_name("unit", unit, METRICS)
    if METRICS[unit] != "perplexity":
        return METRICS[unit], nats_per_token / math.log(2)
    try:
        return METRICS[unit], math.exp(nats_per_token)
    except OverflowError:
        return METRICS[unit], math.inf


def load_corpus(
    name: str = "stdlib",
    *,
    tokenizer: str | Tokenizer | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    vocab_size: int | None = None,
) -> Corpus:
    """Open a corpus; the first time, find, read and tokenise it. Nothing is downloaded: `prepare_corpus` does that.

    Args:
        name: one of `list_corpora()`.
        tokenizer: one of `list_tokenizers()`, a tokeniser made elsewhere (of a trained model), or None for the
            corpus's own.
        data_dir: the user's file or folder, for corpora that have one.
        cache_dir: where token files are kept; default: `default_cache_dir()`.
        vocab_size: size of a vocabulary that is trained (`bpe`); None for its default.

    Raises:
        UserError: unknown name, missing or unusable data, too little text, damaged cache.
    """
    entry = corpus_entry(name)
    choice = entry.tokenizer if tokenizer is None else tokenizer
    settings = _settings(choice, vocab_size)
    cache = TokenCache(cache_dir)
    place = Place(data_dir=None if data_dir is None else Path(data_dir).expanduser(), cache_dir=cache.folder)
    source = entry.find(place)
    for split in SPLITS:
        # No tokeniser makes more tokens than bytes, but for the end of a last line.
        _check_size(source.corpus, split, source.n_bytes(split) + 1)
    prepared = _prepare(source, choice, settings, cache)
    return _as_corpus(source, prepared)


def _settings(choice: str | Tokenizer, vocab_size: int | None) -> dict[str, object]:
    """What, beside the text, the tokens depend on."""
    default = None if isinstance(choice, Tokenizer) else tokenizer_class(choice).default_vocab_size
    if vocab_size is not None and default is None:
        named = choice if isinstance(choice, str) else choice.name
        raise UserError(
            f"`vocab_size` must be left out for tokenizer {named!r}, whose vocabulary follows from the text; "
            f"got {vocab_size}; fix: leave it out, or use tokenizer=bpe"
        )
    if isinstance(choice, Tokenizer):
        return {"digest": choice.digest}
    return {"tokenizer": choice, "vocab_size": default if vocab_size is None else vocab_size}


def _prepare(source: Source, choice: str | Tokenizer, settings: Mapping[str, object], cache: TokenCache) -> Prepared:
    fingerprint = source.fingerprint()
    known = cache.known_content(fingerprint)
    content = known or source.content_digest()
    key = cache.key(content, settings)
    prepared = cache.open(key)
    if prepared is None:
        tokenizer = choice if isinstance(choice, Tokenizer) else _fit(source, choice, settings)
        prepared = cache.store(key, tokenizer, _Filler(source, tokenizer, content), content)
    if known is None:
        # The note only saves time; a cache that may be read but not written still serves.
        with contextlib.suppress(UserError):
            cache.remember(fingerprint, content)
    return prepared


def _fit(source: Source, name: str, settings: Mapping[str, object]) -> Tokenizer:
    cls = tokenizer_class(name)
    texts = (_checked(block, cls.needs_text) for split in cls.fits_on for block in source.blocks(split))
    vocab_size = settings["vocab_size"]
    return cls.fit(texts, vocab_size=vocab_size if isinstance(vocab_size, int) else None)


@final
class _Filler:
    """Encodes the splits into a cache folder, checking that the text is what the folder is named after."""

    def __init__(self, source: Source, tokenizer: Tokenizer, content: str) -> None:
        self._source, self._tokenizer, self._content = source, tokenizer, content
        self._digest = ContentDigest()

    def __call__(self, split: Split, writer: TokenWriter) -> None:
        for block in self._source.blocks(split):
            self._digest.update(split, block.data)
            writer.append(self._tokenizer.encode(_checked(block, self._tokenizer.needs_text)), len(block.data))
        _check_size(self._source.corpus, split, writer.n_tokens)
        if split == SPLITS[-1] and self._digest.hexdigest() != self._content:
            raise UserError(
                f"corpus files must not change while they are read; got other text for {self._source.corpus!r} than a "
                f"moment before; fix: run again"
            )


def _checked(block: Block, needs_text: bool) -> bytes:
    """The block's bytes; text that is not UTF-8 is reported with its file."""
    if needs_text:
        to_text(block.data, where=str(block.path), offset=block.offset)
    return block.data


def _check_size(corpus: str, split: Split, n_tokens: int) -> None:
    if n_tokens < MIN_TOKENS[split]:
        raise UserError(
            f"the {split} split of corpus {corpus!r} must have at least {MIN_TOKENS[split]} tokens; got {n_tokens}; "
            f"fix: use more text"
        )


def _as_corpus(source: Source, prepared: Prepared) -> Corpus:
    tokenizer, tokens = prepared.tokenizer, prepared.tokens
    digest = digest_of(prepared.content, tokenizer.digest)
    splits = {
        split: {
            "files": source.n_files(split),
            "bytes": prepared.n_bytes[split],
            "tokens": len(tokens[split]),
        }
        for split in SPLITS
    }
    info: dict[str, object] = {
        "corpus": source.corpus,
        "tokenizer": tokenizer.name,
        "unit": tokenizer.unit,
        "vocab_size": tokenizer.vocab_size,
        "digest": digest,
        "splits": splits,
        **source.info,
    }
    return Corpus(
        name=source.corpus,
        tokenizer=tokenizer,
        train=tokens["train"],
        valid=tokens["valid"],
        test=tokens["test"],
        digest=digest,
        info=info,
        split_bytes=prepared.n_bytes,
    )
