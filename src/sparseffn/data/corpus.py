"""A corpus ready for training: `load_corpus("stdlib").train` is a memory-mapped array of token numbers.

`prepare_corpus` is the one function that downloads; `Corpus.origin` says how to open the same corpus again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, final

import numpy as np

from sparseffn.data.cache import TokenCache
from sparseffn.data.download import OnProgress
from sparseffn.data.published_corpus import PublishedCorpus
from sparseffn.data.registry import CorpusEntry, corpus_entry
from sparseffn.data.splits import SPLITS, Place, Source, Split, StrPath
from sparseffn.data.streamed import StreamedSource
from sparseffn.data.streams import ContiguousStreams, TrainingStreams
from sparseffn.data.tokenizer_base import Tokenizer, Unit
from sparseffn.data.tokenizing import check_size, prepared_tokens
from sparseffn.errors import UserError, unknown_name
from sparseffn.storage import default_cache_dir, digest_of

T = TypeVar("T")

METRICS: Mapping[Unit, str] = {
    "byte": "bits per byte",
    "character": "bits per character",
    "word": "perplexity",
    "sub-word": "perplexity",
}


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusOrigin:
    """How to open a corpus again, as JSON values: what a run notes of it."""

    name: str
    # Absolute path of the user's file or folder; None where the corpus was found without one.
    data_dir: str | None = None
    # Absolute path of the cache, where it was named; None for the default.
    cache_dir: str | None = None
    # Name of the tokeniser.
    tokenizer: str | None = None
    # Size of its vocabulary, where that was chosen.
    vocab_size: int | None = None

    def load(
        self, *, data_dir: StrPath | None = None, cache_dir: StrPath | None = None, tokenizer: Tokenizer | None = None
    ) -> Corpus:
        """Open the corpus as `load_corpus` does.

        Args:
            data_dir: where the text is now, if it was moved.
            cache_dir: where token files are kept; None for the noted folder while it is there, then the default.
            tokenizer: the run's own, which is used whatever the text would give now.
        """
        if cache_dir is None and self.cache_dir is not None and Path(self.cache_dir).is_dir():
            cache_dir = self.cache_dir
        return load_corpus(
            self.name,
            tokenizer=tokenizer or self.tokenizer,
            data_dir=self.data_dir if data_dir is None else data_dir,
            cache_dir=cache_dir,
            vocab_size=None if tokenizer else self.vocab_size,
        )


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """Tokens of the three splits, and what they are."""

    name: str
    # Tokeniser that made the tokens.
    tokenizer: Tokenizer
    # Training tokens, shape [n], memory-mapped; none where they are streamed.
    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray
    # 32 hexadecimal digits: bytes of the splits and tokeniser.
    digest: str
    # JSON values for results: corpus, tokenizer, unit, vocab_size, digest, counts by split, and the corpus's own.
    info: dict[str, object]
    # Text length by split, in bytes.
    split_bytes: Mapping[Split, int]
    origin: CorpusOrigin
    # Where training documents are streamed from, if they are.
    streamed: StreamedSource | None = None

    def training_streams(self, *, batch: int, context: int, seed: int = 0) -> TrainingStreams:
        """Training windows; the `seed` orders the documents of a streamed corpus, text on disk is read as it stands.

        Raises:
            UserError: there is too little text.
        """
        if self.streamed is not None:
            return self.streamed.streams(self.tokenizer, batch=batch, context=context, seed=seed)
        return ContiguousStreams(self.train, batch=batch, context=context)

    @property
    def unit(self) -> Unit:
        return self.tokenizer.unit

    def tokens(self, split: Split) -> np.ndarray:
        """Tokens of a split by name.

        Raises:
            UserError: there is no such split.
        """
        return _of_split({"train": self.train, "valid": self.valid, "test": self.test}, split)

    def n_bytes(self, split: Split) -> int:
        """Bytes of the text of a split.

        Raises:
            UserError: there is no such split.
        """
        return _of_split(self.split_bytes, split)


def _of_split(values: Mapping[Split, T], split: Split) -> T:
    if split not in values:
        raise unknown_name("split", split, values)
    return values[split]


def to_metric(nats_per_token: float, unit: Unit) -> tuple[str, float]:
    """Name and value of the customary metric of a mean loss; a perplexity too large for a float is infinite.

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
    data_dir: StrPath | None = None,
    cache_dir: StrPath | None = None,
    vocab_size: int | None = None,
) -> Corpus:
    """Open a corpus; the first time, find, read and tokenise it. Nothing is downloaded: `prepare_corpus` does that.

    Args:
        name: one of `list_corpora()`.
        tokenizer: one of `list_tokenizers()`, a tokeniser made elsewhere (of a trained model), or None for the
            corpus's own.
        data_dir: the user's file or folder, for corpora that have one; one that was prepared is found without.
        cache_dir: where token files are kept; default: `default_cache_dir()`.
        vocab_size: size of a vocabulary that is trained (`bpe`); None for its default.

    Raises:
        UserError: unknown name, missing or unusable data, too little text, damaged cache.
    """
    return open_corpus(corpus_entry(name), Place.of(data_dir, cache_dir), tokenizer=tokenizer, vocab_size=vocab_size)


def prepare_corpus(
    name: str,
    *,
    tokenizer: str | None = None,
    vocab_size: int | None = None,
    data_dir: StrPath | None = None,
    cache_dir: StrPath | None = None,
    offline: bool = False,
    accept_digests: Iterable[str] = (),
    on_progress: OnProgress | None = None,
) -> Corpus:
    """Download a corpus where it is not here yet, unpack it and make its tokens.

    Args:
        name, tokenizer, vocab_size, cache_dir: as for `load_corpus`.
        data_dir: the user's copy: the published archive, or plain files; the cache keeps the text of it.
        offline: download nothing.
        accept_digests: digests that are accepted in place of unverified ones, and remembered.
        on_progress: called as bytes arrive.

    Raises:
        UserError: as `load_corpus`; or no mirror gives the file that is published.
    """
    entry, accept, place = corpus_entry(name), tuple(accept_digests), Place.of(data_dir, cache_dir)
    if isinstance(entry, PublishedCorpus):
        entry.prepare(place, offline=offline, accept=accept, on_progress=on_progress)
        # Now in the cache, whose copy later commands use.
        place = Place(cache_dir=place.cache_dir)
    elif accept:
        raise UserError(
            f"`accept_digests` must be left out for corpus {name!r}, of which no digest is published; got {accept[0]!r}; "
            "fix: leave it out"
        )
    return open_corpus(entry, place, tokenizer=tokenizer, vocab_size=vocab_size, network=not offline, on_progress=on_progress)


def open_corpus(
    entry: CorpusEntry,
    place: Place,
    *,
    tokenizer: str | Tokenizer | None = None,
    vocab_size: int | None = None,
    network: bool = False,
    on_progress: OnProgress | None = None,
) -> Corpus:
    """What `load_corpus` does, for a corpus that need not be registered.

    With `network`, the tokeniser and the stored splits of a streamed corpus may be made from the network now.
    """
    source = entry.find(place)
    if isinstance(source, Source):
        for split in SPLITS:
            # No tokeniser makes more tokens than bytes, but for the end of a last line.
            check_size(source.corpus, split, source.n_bytes(split) + 1)
    choice = entry.tokenizer if tokenizer is None else tokenizer
    cache = TokenCache(place.cache_dir)
    prepared = prepared_tokens(source, choice, vocab_size, cache, network=network, on_progress=on_progress)
    made_by = prepared.tokenizer
    digest = digest_of(prepared.content, made_by.digest)
    splits = {
        split: {"files": source.n_files(split), "bytes": prepared.n_bytes[split], "tokens": len(prepared.tokens[split])}
        for split in SPLITS
    }
    return Corpus(
        name=source.corpus,
        tokenizer=made_by,
        **prepared.tokens,
        digest=digest,
        info={
            "corpus": source.corpus,
            "tokenizer": made_by.name,
            "unit": made_by.unit,
            "vocab_size": made_by.vocab_size,
            "digest": digest,
            "splits": splits,
            **source.info,
        },
        split_bytes=prepared.n_bytes,
        origin=CorpusOrigin(
            name=entry.name,
            data_dir=None if place.data_dir is None else str(place.data_dir.absolute()),
            cache_dir=None if place.cache_dir == default_cache_dir() else str(place.cache_dir.absolute()),
            tokenizer=made_by.name,
            vocab_size=vocab_size,
        ),
        streamed=source if isinstance(source, StreamedSource) else None,
    )
