"""Corpora by name. A corpus is one file in `corpora/`: a function that finds its files, or what is published of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from sparseffn.data.published_corpus import PublishedCorpus
from sparseffn.data.splits import Place, Source
from sparseffn.data.streamed import StreamedCorpus, StreamedSource
from sparseffn.errors import unknown_name

# Finds the files of a corpus in the user's data folder (None: not given).
Finder = Callable[[Path | None], Source]
Others = TypeVar("Others", PublishedCorpus, StreamedCorpus)


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusEntry:
    # How users name it.
    name: str
    # One line for lists.
    summary: str
    # Tokeniser where the user names none.
    tokenizer: str
    find: Callable[[Place], Source | StreamedSource]
    # What others publish of it: files, or shards that are streamed. None for a corpus that is here anyway.
    published: PublishedCorpus | None = None
    streamed: StreamedCorpus | None = None
    # Whether it needs a file of the user's.
    needs_data_dir: bool = False

    def state(self, place: Place) -> str:
        """Whether it is here: `always`, `prepared`, `no`, or `--data-dir` for the user's own text."""
        others = self.published or self.streamed
        if others is not None:
            return "prepared" if others.is_prepared(place) else "no"
        return "--data-dir" if self.needs_data_dir else "always"


_CORPORA: dict[str, CorpusEntry] = {}


def register_corpus(*, name: str, summary: str, tokenizer: str, needs_data_dir: bool = False) -> Callable[[Finder], Finder]:
    """Decorate the function that finds a corpus's files.

    Args:
        name: how users name the corpus.
        summary: one line for lists.
        tokenizer: the default tokeniser.
        needs_data_dir: whether it needs a file of the user's.
    """

    def add(find: Finder) -> Finder:
        def find_in(place: Place) -> Source:
            return find(place.data_dir)

        _add(CorpusEntry(name=name, summary=summary, tokenizer=tokenizer, find=find_in, needs_data_dir=needs_data_dir))
        return find

    return add


def register_published(corpus: Others, *, summary: str, tokenizer: str) -> Others:
    """Register a corpus that others publish, as files or as shards that are streamed.

    Args:
        corpus: its files or shards, and their addresses.
        summary: one line for lists.
        tokenizer: the default tokeniser.
    """
    published = corpus if isinstance(corpus, PublishedCorpus) else None
    streamed = corpus if isinstance(corpus, StreamedCorpus) else None
    name, find = corpus.name, corpus.find
    _add(CorpusEntry(name=name, summary=summary, tokenizer=tokenizer, find=find, published=published, streamed=streamed))
    return corpus


def _add(entry: CorpusEntry) -> None:
    assert entry.name not in _CORPORA, f"corpus {entry.name!r} is registered twice"
    _CORPORA[entry.name] = entry


def list_corpora() -> dict[str, str]:
    """Names of all corpora with a one-line description each."""
    return {name: _CORPORA[name].summary for name in sorted(_CORPORA)}


def corpus_entry(name: str) -> CorpusEntry:
    """The corpus of that name.

    Raises:
        UserError: there is none.
    """
    if name not in _CORPORA:
        raise unknown_name("corpus", name, _CORPORA)
    return _CORPORA[name]
