"""The corpus of each column: the published one at scale `paper`, one of the user's choice for all columns elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

from sparseffn.data import Corpus, load_corpus
from sparseffn.errors import UserError
from sparseffn.paper.published import vocabulary
from sparseffn.paper.scales import Column, CorpusKey, Scale

# What the small scales run on where the user names nothing; each with the tokeniser that it is meant with here.
DEFAULT_CORPUS = "ptb"
_TOKENIZERS = {"ptb": "chars"}

# Types of the default corpus under that tokeniser, where a dry run plans without it.
DEFAULT_VOCABULARY = 50

CLOSED = "a dry run opens no published corpus, as they are large: the sizes are those of the published vocabularies"
"""Why a column of a dry run at scale paper has no corpus."""


@dataclass(frozen=True, kw_only=True)
class CorpusChoice:
    """What a user says of the corpus; None: the default."""

    name: str | None = None
    tokenizer: str | None = None
    vocab_size: int | None = None
    data_dir: str | None = None
    cache_dir: str | None = None


@final
@dataclass(frozen=True, kw_only=True)
class Corpora:
    """Opens each corpus once."""

    scale: Scale
    choice: CorpusChoice = CorpusChoice()
    closed: bool = False
    """Open no published corpus: they are large, and a dry run knows their vocabularies."""
    _opened: dict[CorpusKey, Corpus | UserError] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given = {"corpus": self.choice.name, "tokenizer": self.choice.tokenizer, "vocab-size": self.choice.vocab_size}
        for option, value in given.items():
            if self.scale.is_published and value is not None:
                raise UserError(
                    f"`--{option}` must be left out at scale paper, where each column has its own; got {value!r}; "
                    "fix: leave it out, or --scale cpu"
                )

    def wanted(self, column: Column) -> CorpusKey:
        if self.scale.is_published or column.has_its_corpus:
            return column.corpus
        name = self.choice.name or DEFAULT_CORPUS
        return name, self.choice.tokenizer or _TOKENIZERS.get(name), self.choice.vocab_size

    def expected_vocabulary(self, column: Column) -> int:
        """Types of the column's corpus, as far as they are known without it: else those of the published model."""
        name, tokenizer, vocab_size = self.wanted(column)
        small = not self.scale.is_published and not column.has_its_corpus
        if small and (name, tokenizer) == (DEFAULT_CORPUS, _TOKENIZERS[DEFAULT_CORPUS]):
            return DEFAULT_VOCABULARY
        return vocab_size or (256 if small and tokenizer == "bytes" else vocabulary(column.name))

    def of(self, column: Column) -> Corpus:
        """The column's corpus.

        Raises:
            UserError: it is not there; the message says how to get it, or which corpus always is.
        """
        key = self.wanted(column)
        if self.closed and self.scale.is_published and not column.has_its_corpus:
            raise UserError(CLOSED)
        if key not in self._opened:
            self._opened[key] = self._open(*key)
        found = self._opened[key]
        if isinstance(found, UserError):
            raise found
        return found

    def _open(self, name: str, tokenizer: str | None, vocab_size: int | None) -> Corpus | UserError:
        try:
            folders = {"data_dir": self.choice.data_dir, "cache_dir": self.choice.cache_dir}
            return load_corpus(name, tokenizer=tokenizer, vocab_size=vocab_size, **folders)
        except UserError as error:
            instead = "" if self.scale.is_published or name == "stdlib" else "; or --corpus stdlib, which is always there"
            return UserError(f"{error}{instead}")
