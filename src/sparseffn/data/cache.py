"""Token files on disk: made once, whole or not at all, verified whenever they are opened.

    CACHE/tokens/KEY/{train,valid,test}.bin, tokenizer.json, meta.json    KEY: content, tokenizer settings, format
    CACHE/sources/FINGERPRINT.json                                         names, sizes, times of the files -> content

The second level spares reading the corpus again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

import msgspec
import numpy as np

from sparseffn.data.splits import ANOTHER_CACHE, SPLITS, Split
from sparseffn.data.tokenizer_base import Tokenizer
from sparseffn.data.tokenizers import tokenizer_from_json
from sparseffn.errors import UserError
from sparseffn.storage import Count, digest_of, file_digest, read, write_folder, write_json

# Token numbers of a split, block by block, and the bytes of text that each block stands for.
Encoded = Callable[[Split], Iterable[tuple[np.ndarray, int]]]

# Raised whenever the files or what they mean change; old folders are then not found any more.
FORMAT = 1


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest little-endian unsigned type for the vocabulary: 1, 2 or 4 bytes."""
    return np.dtype("u1" if vocab_size <= 1 << 8 else "<u2" if vocab_size <= 1 << 16 else "<u4")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A corpus as stored: memory-mapped tokens, bytes of text by split, and the digest `content` of the text."""

    tokenizer: Tokenizer
    tokens: Mapping[Split, np.ndarray]
    n_bytes: Mapping[Split, int]
    content: str


@final
class _StoredSplit(msgspec.Struct, frozen=True, kw_only=True):
    bytes: Count
    tokens: Count
    digest: str


@final
class _Meta(msgspec.Struct, frozen=True, kw_only=True):
    """`meta.json`. `digest` is that of the other fields."""

    format: int
    content: str
    tokenizer: str
    splits: dict[Split, _StoredSplit]
    digest: str = ""

    def own_digest(self) -> str:
        fields = msgspec.to_builtins(self)
        del fields["digest"]
        return digest_of(json.dumps(fields, sort_keys=True))


@final
class _Note(msgspec.Struct, frozen=True, kw_only=True):
    """What a source's files hold: `digest` is of fingerprint and content."""

    content: str
    digest: str


@final
class TokenCache:
    """The token files in a cache folder, which is made when something is stored."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @staticmethod
    def key(content: str, settings: Mapping[str, object]) -> str:
        """Folder name for a content digest and JSON-able tokeniser settings."""
        return digest_of(str(FORMAT), content, json.dumps(settings, sort_keys=True))

    def _note(self, fingerprint: str) -> Path:
        return self.folder / "sources" / f"{digest_of(str(FORMAT), fingerprint)}.json"

    def known_content(self, fingerprint: str) -> str | None:
        """Content digest of the source with this fingerprint, if it was prepared before.

        Raises:
            UserError: its note is damaged.
        """
        path = self._note(fingerprint)
        if not path.exists():
            return None
        note = read(path, _Note, fix=f"delete {path} and run again")
        _expect(path, "digest", note.digest, digest_of(fingerprint, note.content))
        return note.content

    def remember(self, fingerprint: str, content: str) -> None:
        write_json(self._note(fingerprint), _Note(content=content, digest=digest_of(fingerprint, content)))

    def open(self, key: str) -> Prepared | None:
        """The stored corpus, verified, or None if there is none.

        Raises:
            UserError: a file is missing, truncated or changed.
        """
        folder = self.folder / "tokens" / key
        if not folder.is_dir():
            return None
        files = ("meta.json", "tokenizer.json", *(f"{split}.bin" for split in SPLITS))
        if missing := [name for name in files if not (folder / name).is_file()]:
            raise _damaged(folder, "all of its files", f"no {', '.join(missing)}")
        meta = read(folder / "meta.json", _Meta, fix=f"delete {folder} and run again")
        _expect(folder, "meta digest", meta.digest, meta.own_digest())
        _expect(folder, "format", FORMAT, meta.format)
        stored = (folder / "tokenizer.json").read_bytes()
        _expect(folder, "tokenizer digest", meta.tokenizer, digest_of(stored))
        tokenizer = tokenizer_from_json(stored.decode())
        dtype = token_dtype(tokenizer.vocab_size)
        tokens: dict[Split, np.ndarray] = {split: _open_tokens(folder, split, dtype, meta.splits[split]) for split in SPLITS}
        return Prepared(tokenizer, tokens, {split: meta.splits[split].bytes for split in SPLITS}, meta.content)

    def store(self, key: str, tokenizer: Tokenizer, encoded: Encoded, content: str) -> Prepared:
        """Store a corpus under a key, unless another process has by then; whatever `encoded` raises leaves nothing behind."""
        dtype = token_dtype(tokenizer.vocab_size)
        with write_folder(self.folder / "tokens" / key, fix=ANOTHER_CACHE) as folder:
            (folder / "tokenizer.json").write_bytes(tokenizer.to_json().encode())
            splits: dict[Split, _StoredSplit] = {}
            for split in SPLITS:
                path, n_tokens, n_bytes = folder / f"{split}.bin", 0, 0
                with path.open("xb") as stream:
                    for ids, length in encoded(split):
                        stream.write(ids.astype(dtype).tobytes())
                        n_tokens += len(ids)
                        n_bytes += length
                splits[split] = _StoredSplit(bytes=n_bytes, tokens=n_tokens, digest=file_digest(path))
            meta = _Meta(format=FORMAT, content=content, tokenizer=tokenizer.digest, splits=splits)
            write_json(folder / "meta.json", msgspec.structs.replace(meta, digest=meta.own_digest()))
        prepared = self.open(key)
        assert prepared is not None, f"{key} was stored just now"
        return prepared


def _open_tokens(folder: Path, split: Split, dtype: np.dtype, stored: _StoredSplit) -> np.ndarray:
    path = folder / f"{split}.bin"
    _expect(folder, f"size of {path.name}", stored.tokens * dtype.itemsize, path.stat().st_size)
    _expect(folder, f"digest of {path.name}", stored.digest, file_digest(path))
    # A split that is not stored has no tokens, and nothing can be mapped.
    return np.memmap(path, dtype=dtype, mode="r") if stored.tokens else np.zeros(0, dtype)


def _expect(path: Path, what: str, expected: object, found: object) -> None:
    if expected != found:
        raise _damaged(path, f"{what} {expected}", str(found))


def _damaged(path: Path, expected: str, found: str) -> UserError:
    return UserError(f"the cache must hold {expected} in {str(path)!r}; got {found}; fix: delete {path} and run again")
