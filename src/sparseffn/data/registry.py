"""Corpora by name. A corpus is one file in `corpora/`: a function that finds its files, or what is published of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from sparseffn.data.place import Place
from sparseffn.data.published_corpus import PublishedCorpus
from sparseffn.data.splits import Source
from sparseffn.data.streamed import StreamedCorpus, StreamedSource
from sparseffn.errors import UserError, unknown_name

# Finds the files of a corpus in the user's data folder (None: not given).
Finder = Callable[[Path | None], Source]
# What is published of a corpus.
Others = TypeVar("Others", PublishedCorpus, StreamedCorpus)


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusEntry:
    """A registered corpus."""

    # How users name it.
    name: str
    # One line for lists.
    summary: str
    # Tokeniser where the user names none.
    tokenizer: str
    # Finds the files.
    find: Callable[[Place], Source | StreamedSource]
    # What is published of it; None for a corpus that is here anyway.
    published: PublishedCorpus | None = None
    # What is published of it, where it is streamed.
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
        _add(
            CorpusEntry(
                name=name,
                summary=summary,
                tokenizer=tokenizer,
                find=lambda place: find(place.data_dir),
                needs_data_dir=needs_data_dir,
            )
        )
        return find

    return add


def register_published(corpus: Others, *, summary: str, tokenizer: str) -> Others:
    """Register a corpus that others publish, as files or as shards that are streamed.

    Args:
        corpus: its files or shards, and their addresses.
        summary: one line for lists.
        tokenizer: the default tokeniser.
    """
    _add(
        CorpusEntry(
            name=corpus.name,
            summary=summary,
            tokenizer=tokenizer,
            find=corpus.find,
            published=corpus if isinstance(corpus, PublishedCorpus) else None,
            streamed=corpus if isinstance(corpus, StreamedCorpus) else None,
        )
    )
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


def required_data_dir(data_dir: Path | None, *, corpus: str, contents: str) -> Path:
    """The user's data folder or file, for a corpus that must have one.

    Args:
        data_dir: what the user gave.
        corpus: name of the corpus.
        contents: what has to be there, for the error.

    Raises:
        UserError: it is not given or does not exist.
    """
    if data_dir is None or not data_dir.exists():
        got = "nothing" if data_dir is None else repr(str(data_dir))
        raise UserError(f"corpus {corpus!r} must have a `data_dir` with {contents}; got {got}; fix: pass --data-dir PATH")
    return data_dir
