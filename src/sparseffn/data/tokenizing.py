"""From text to stored tokens: found in the cache without reading the text, or made once."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from typing import final

import numpy as np

from sparseffn.data.cache import Encoded, Prepared, TokenCache
from sparseffn.data.download import OnProgress
from sparseffn.data.splits import SPLITS, Block, Source, Split
from sparseffn.data.streamed import StreamedSource
from sparseffn.data.tokenizer_base import Tokenizer, to_text
from sparseffn.data.tokenizers import tokenizer_class
from sparseffn.errors import UserError
from sparseffn.storage import digest_of

# What a corpus is made from: text whose tokens are all stored, or shards of which only a part is.
AnySource = Source | StreamedSource

# Below this nothing can be learned or measured: one window of a tiny model, one prediction.
MIN_TOKENS: Mapping[Split, int] = {"train": 1000, "valid": 2, "test": 2}


def prepared_tokens(
    source: AnySource,
    choice: str | Tokenizer,
    vocab_size: int | None,
    cache: TokenCache,
    *,
    network: bool = False,
    on_progress: OnProgress | None = None,
) -> Prepared:
    """The stored tokens of a source; `network`: whether gigabytes may be read from the network to make them.

    Raises:
        UserError: the text cannot be used, the cache cannot be written, or the network is needed.
    """
    settings = _settings(choice, vocab_size)
    fingerprint = source.fingerprint()
    known = cache.known_content(fingerprint)
    if known is not None and (found := cache.open(cache.key(known, settings))) is not None:
        return found
    # With a tokeniser at hand only the stored splits are read, a few megabytes; training one takes gigabytes.
    allowed = network or (known is not None and isinstance(choice, Tokenizer))
    if isinstance(source, StreamedSource) and source.is_remote and not allowed:
        raise UserError(
            f"corpus {source.corpus!r} must have a `data_dir` with {source.spec.contents}, or be prepared once with this "
            f"tokenizer; got nothing; fix: `sparseffn data prepare --corpus {source.corpus}`, or pass --data-dir PATH"
        )
    content = known or content_digest(source)
    key = cache.key(content, settings)
    prepared = cache.open(key)
    if prepared is None:
        tokenizer = choice if isinstance(choice, Tokenizer) else _fit(source, tokenizer_class(choice), vocab_size, on_progress)
        prepared = cache.store(key, tokenizer, _encoded(source, tokenizer, content), content)
    if known is None:
        # The note only saves time; a cache that may be read but not written still serves.
        with contextlib.suppress(UserError):
            cache.remember(fingerprint, content)
    return prepared


def _settings(choice: str | Tokenizer, vocab_size: int | None) -> dict[str, object]:
    """What, beside the text, the tokens depend on."""
    name, default = (
        (choice.name, None) if isinstance(choice, Tokenizer) else (choice, tokenizer_class(choice).default_vocab_size)
    )
    if vocab_size is not None and default is None:
        raise UserError(
            f"`vocab_size` must be left out for tokenizer {name!r}, whose vocabulary follows from the text; "
            f"got {vocab_size}; fix: leave it out, or use tokenizer=bpe"
        )
    if isinstance(choice, Tokenizer):
        return {"digest": choice.digest}
    return {"tokenizer": choice, "vocab_size": default if vocab_size is None else vocab_size}


@final
class _ContentDigest:
    """Running digest of the text that is stored, the same however it is cut in blocks, and of `source.digested`."""

    def __init__(self, source: AnySource) -> None:
        self._more = source.digested
        self._digests = {split: hashlib.blake2b(digest_size=16) for split in SPLITS}

    def update(self, split: Split, data: bytes) -> None:
        self._digests[split].update(data)

    def hexdigest(self) -> str:
        return digest_of(*(digest.digest() for digest in self._digests.values()), *self._more)


def content_digest(source: AnySource) -> str:
    digest = _ContentDigest(source)
    for split in source.stored:
        for block in source.blocks(split):
            digest.update(split, block.data)
    return digest.hexdigest()


def _fit(source: AnySource, cls: type[Tokenizer], vocab_size: int | None, on_progress: OnProgress | None) -> Tokenizer:
    if isinstance(source, StreamedSource):
        return source.fit(cls.name, vocab_size, on_progress)
    texts = (_checked(block, cls.needs_text) for split in cls.fits_on for block in source.blocks(split))
    return cls.fit(texts, vocab_size=vocab_size)


def _encoded(source: AnySource, tokenizer: Tokenizer, content: str) -> Encoded:
    """The tokens of every split, checking that the text is what the folder is named after."""
    digest = _ContentDigest(source)

    def encoded(split: Split) -> Iterator[tuple[np.ndarray, int]]:
        n_tokens = 0
        for block in source.blocks(split):
            digest.update(split, block.data)
            ids = tokenizer.encode(_checked(block, tokenizer.needs_text))
            n_tokens += len(ids)
            yield ids, len(block.data)
        if split in source.stored:
            check_size(source.corpus, split, n_tokens)
        if split == SPLITS[-1] and digest.hexdigest() != content:
            raise UserError(
                f"corpus files must not change while they are read; got other text for {source.corpus!r} than a moment "
                f"before; fix: run again"
            )

    return encoded


def _checked(block: Block, needs_text: bool) -> bytes:
    """The block's bytes; text that is not UTF-8 is reported with its file."""
    if needs_text:
        to_text(block.data, where=str(block.path), offset=block.offset)
    return block.data


def check_size(corpus: str, split: Split, n_tokens: int) -> None:
    if n_tokens < MIN_TOKENS[split]:
        raise UserError(
            f"the {split} split of corpus {corpus!r} must have at least {MIN_TOKENS[split]} tokens; got {n_tokens}; "
            f"fix: use more text"
        )
