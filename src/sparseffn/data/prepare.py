"""Making a corpus ready: the one function here that uses the network.

prepare_corpus("enwik8", on_progress=show)
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from sparseffn.data.corpus import Corpus, open_corpus
from sparseffn.data.download import OnProgress
from sparseffn.data.place import Place
from sparseffn.data.registry import corpus_entry
from sparseffn.errors import UserError
from sparseffn.storage import default_cache_dir


def prepare_corpus(
    name: str,
    *,
    tokenizer: str | None = None,
    vocab_size: int | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    offline: bool = False,
    accept_digests: Iterable[str] = (),
    on_progress: OnProgress | None = None,
) -> Corpus:
    """Download a corpus where it is not here yet, unpack it and make its tokens.

    Args:
        name: one of `list_corpora()`.
        tokenizer: one of `list_tokenizers()`; None for the corpus's own.
        vocab_size: size of a vocabulary that is trained (`bpe`).
        data_dir: the user's copy: the published archive, or plain files; the cache keeps the text of it.
        cache_dir: where everything is kept; default: `default_cache_dir()`.
        offline: download nothing.
        accept_digests: digests that are accepted in place of unverified ones, and remembered.
        on_progress: told of what has arrived.

    Raises:
        UserError: as `load_corpus`; or no mirror gives the file that is published.
    """
    entry, accept = corpus_entry(name), tuple(accept_digests)
    place = Place(
        data_dir=None if data_dir is None else Path(data_dir).expanduser(),
        cache_dir=default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser(),
    )
    if entry.published is not None:
        entry.published.prepare(place, offline=offline, accept=accept, on_progress=on_progress)
        # Now in the cache, whose copy later commands use.
        place = Place(cache_dir=place.cache_dir)
    elif accept:
        raise UserError(
            f"`accept_digests` must be left out for corpus {name!r}, of which no digest is published; got {accept[0]!r}; "
            "fix: leave it out"
        )
    return open_corpus(entry, place, tokenizer=tokenizer, vocab_size=vocab_size, network=not offline, on_progress=on_progress)
