"""From text to stored tokens: found in the cache without reading the text, or made once."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import final

from sparseffn.data.cache import Prepared, TokenCache, TokenWriter
from sparseffn.data.download import OnProgress
from sparseffn.data.splits import SPLITS, Block, Source, Split
from sparseffn.data.streamed import StreamedSource
from sparseffn.data.tokenizer_base import Tokenizer, to_text
from sparseffn.data.tokenizers import tokenizer_class
from sparseffn.errors import UserError

# What a corpus is made from: text whose tokens are all stored, or shards of which only a part is.
AnySource = Source | StreamedSource

# Below this nothing can be learned or measured: one window of a tiny model, one prediction.
MIN_TOKENS: Mapping[Split, int] = {"train": 1000, "valid": 2, "test": 2}


def find_prepared(
    source: AnySource, choice: str | Tokenizer, settings: Mapping[str, object], cache: TokenCache, network: bool
) -> Prepared | None:
    """What was prepared before, found without reading the text.

    Raises:
        UserError: it was not, and making it would read gigabytes from the network unasked.
    """
    known = cache.known_content(source.fingerprint())
    prepared = None if known is None else cache.open(cache.key(known, settings))
    # With a tokeniser at hand only the stored splits are read, a few megabytes; training one takes gigabytes.
    ready = network or (known is not None and isinstance(choice, Tokenizer))
    if prepared is None and isinstance(source, StreamedSource) and source.is_remote and not ready:
        raise UserError(
            f"corpus {source.corpus!r} must have a `data_dir` with {source.spec.contents}, or be prepared once with this "
            f"tokenizer; got nothing; fix: `sparseffn data prepare --corpus {source.corpus}`, or pass --data-dir PATH"
        )
    return prepared


def make_prepared(
    source: AnySource,
    choice: str | Tokenizer,
    settings: Mapping[str, object],
    cache: TokenCache,
    on_progress: OnProgress | None,
) -> Prepared:
    """Read the text, fit the tokeniser where it is not given, and store the tokens.

    Raises:
        UserError: the text cannot be used, or the cache cannot be written.
    """
    fingerprint = source.fingerprint()
    known = cache.known_content(fingerprint)
    content = known or content_digest(source)
    key = cache.key(content, settings)
    prepared = cache.open(key)
    if prepared is None:
        tokenizer = choice if isinstance(choice, Tokenizer) else _fit(source, choice, settings, on_progress)
        prepared = cache.store(key, tokenizer, _Filler(source, tokenizer, content), content)
    if known is None:
        # The note only saves time; a cache that may be read but not written still serves.
        with contextlib.suppress(UserError):
            cache.remember(fingerprint, content)
    return prepared


def content_digest(source: AnySource) -> str:
    """Digest of the text that is stored; of a streamed corpus also of which shards are streamed, whose text is not read."""
    digests = source.running_digest()
    for split in source.stored:
        for block in source.blocks(split):
            digests.update(split, block.data)
    return digests.hexdigest()


def _fit(source: AnySource, name: str, settings: Mapping[str, object], on_progress: OnProgress | None) -> Tokenizer:
    cls, vocab_size = tokenizer_class(name), settings["vocab_size"]
    size = vocab_size if isinstance(vocab_size, int) else None
    if isinstance(source, StreamedSource):
        return source.fit(name, size, on_progress)
    texts = (_checked(block, cls.needs_text) for split in cls.fits_on for block in source.blocks(split))
    return cls.fit(texts, vocab_size=size)


@final
class _Filler:
    """Encodes the splits into a cache folder, checking that the text is what the folder is named after."""

    def __init__(self, source: AnySource, tokenizer: Tokenizer, content: str) -> None:
        self._source, self._tokenizer, self._content = source, tokenizer, content
        self._digest = source.running_digest()

    def __call__(self, split: Split, writer: TokenWriter) -> None:
        for block in self._source.blocks(split):
            self._digest.update(split, block.data)
            writer.append(self._tokenizer.encode(_checked(block, self._tokenizer.needs_text)), len(block.data))
        if split in self._source.stored:
            check_size(self._source.corpus, split, writer.n_tokens)
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


def check_size(corpus: str, split: Split, n_tokens: int) -> None:
    """Refuse a split that is too short.

    Raises:
        UserError: it is.
    """
    if n_tokens < MIN_TOKENS[split]:
        raise UserError(
            f"the {split} split of corpus {corpus!r} must have at least {MIN_TOKENS[split]} tokens; got {n_tokens}; "
            f"fix: use more text"
        )
