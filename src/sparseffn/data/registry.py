"""Corpora by name. A corpus is one file in `corpora/` with a function that finds its files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sparseffn.data.splits import Source
from sparseffn.errors import UserError, unknown_name

# Finds the files of a corpus in the user's data folder (None: not given); reads no contents.
Finder = Callable[[Path | None], Source]


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
    find: Finder


_CORPORA: dict[str, CorpusEntry] = {}


def register_corpus(*, name: str, summary: str, tokenizer: str) -> Callable[[Finder], Finder]:
    """Decorate the function that finds a corpus's files.

    Args:
        name: how users name the corpus.
        summary: one line for lists.
        tokenizer: the default tokeniser.
    """

    def add(find: Finder) -> Finder:
        assert name not in _CORPORA, f"corpus {name!r} is registered twice"
        _CORPORA[name] = CorpusEntry(name=name, summary=summary, tokenizer=tokenizer, find=find)
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
