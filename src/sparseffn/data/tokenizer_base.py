"""What every tokeniser offers: bytes to token numbers and back, as a value that can be stored and compared."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal, Self

import numpy as np

from sparseffn.data.splits import Split
from sparseffn.errors import UserError
from sparseffn.storage import digest_of

# What one token is, and so what a model's loss is reported per.
Unit = Literal["byte", "character", "word", "sub-word"]


class Tokenizer(ABC):
    """Maps bytes to token numbers `0 .. vocab_size - 1`. Immutable; two with the same digest are the same."""

    name: ClassVar[str]
    unit: ClassVar[Unit]
    # Number of different tokens.
    vocab_size: int
    # The splits whose text `fit` is given.
    fits_on: ClassVar[tuple[Split, ...]] = ()
    # Whether the data must be UTF-8.
    needs_text: ClassVar[bool] = True
    # Vocabulary size where the user may choose one, else None.
    default_vocab_size: ClassVar[int | None] = None

    @classmethod
    @abstractmethod
    def fit(cls, blocks: Iterable[bytes], *, vocab_size: int | None = None) -> Self:
        """Make the tokeniser for a text, given in blocks that end at line ends."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """The arguments of the constructor, which are all that makes this tokeniser, as JSON values."""

    @abstractmethod
    def encode(self, data: bytes) -> np.ndarray:
        """Token numbers of the data, shape `[n]`. Blocks that end at line ends can be encoded one by one.

        Raises:
            UserError: the data holds something without a token.
        """

    @abstractmethod
    def _decode(self, ids: np.ndarray) -> str:
        """Text of valid int64 token numbers."""

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of the tokens; bytes that are not UTF-8 become U+FFFD.

        Raises:
            UserError: a number is outside the vocabulary.
        """
        numbers = np.asarray(ids, dtype=np.int64).reshape(-1)
        outside = numbers[(numbers < 0) | (numbers >= self.vocab_size)]
        if outside.size:
            raise UserError(
                f"`ids` must be between 0 and {self.vocab_size - 1}; got {outside[0]}; "
                f"fix: decode with the tokenizer that the tokens were made with"
            )
        return self._decode(numbers)

    def to_json(self) -> str:
        """The tokeniser as JSON text; the inverse of `tokenizer_from_json`."""
        return json.dumps({"tokenizer": self.name, **self.state()}, sort_keys=True)

    @property
    def digest(self) -> str:
        """32 hexadecimal digits that identify the tokeniser."""
        return digest_of(self.to_json())


def to_text(data: bytes, *, where: str = "the data", offset: int = 0) -> str:
    """Decode UTF-8; `where` the bytes are from and the `offset` of the first one there are for the error.

    Raises:
        UserError: the bytes are not UTF-8.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"text must be UTF-8 for this tokenizer; got byte 0x{data[error.start]:02x} "
            f"at offset {offset + error.start} of {where}; fix: use tokenizer=bytes, or convert the text to UTF-8"
        ) from error
