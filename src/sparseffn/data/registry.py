"""Corpora by name. A corpus is one file in `corpora/`: a function that finds its files, or what is published of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, final

from sparseffn.data.splits import Place, Source
from sparseffn.errors import unknown_name

if TYPE_CHECKING:
    from sparseffn.data.streamed import StreamedSource

# Finds the files of a corpus in the user's data folder (None: not given).
Finder = Callable[[Path | None], Source]
Entry = TypeVar("Entry", bound="CorpusEntry")


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusEntry(ABC):
    # How users name it.
    name: str
    # One line for lists.
    summary: str
    # Tokeniser where the user names none.
    tokenizer: str

    @abstractmethod
    def find(self, place: Place) -> Source | StreamedSource:
        """Where its text is; reads little or nothing of it.

        Raises:
            UserError: it is not there, or is not what is published.
        """

    @abstractmethod
    def state(self, place: Place) -> str:
        """Whether it is here: `always`, `prepared`, `no`, or `--data-dir` for the user's own text."""

    @property
    def addresses(self) -> list[str]:
        """Where it can be had."""
        return []


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class LocalCorpus(CorpusEntry):
    """A corpus that is on this machine anyway."""

    finder: Finder
    needs_data_dir: bool

    def find(self, place: Place) -> Source:
        return self.finder(place.data_dir)

    def state(self, place: Place) -> str:
        return "--data-dir" if self.needs_data_dir else "always"


_CORPORA: dict[str, CorpusEntry] = {}


def register(entry: Entry) -> Entry:
    assert entry.name not in _CORPORA, f"corpus {entry.name!r} is registered twice"
    _CORPORA[entry.name] = entry
    return entry


def register_corpus(*, name: str, summary: str, tokenizer: str, needs_data_dir: bool = False) -> Callable[[Finder], Finder]:
    """Decorate the function that finds the files of a `LocalCorpus`."""

    def add(find: Finder) -> Finder:
        register(LocalCorpus(name=name, summary=summary, tokenizer=tokenizer, finder=find, needs_data_dir=needs_data_dir))
        return find

    return add


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
