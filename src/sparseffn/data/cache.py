"""Token files on disk: made once, whole or not at all, verified whenever they are opened.

    CACHE/tokens/KEY/{train,valid,test}.bin, tokenizer.json, meta.json    KEY: content, tokenizer settings, format
    CACHE/sources/FINGERPRINT.json                                         names, sizes, times of the files -> content

The second level spares reading the corpus again. A folder is written under a hidden name beside its place and renamed
when it is complete; who comes second uses the first one's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast, final

import numpy as np

from sparseffn.data.splits import SPLITS, Split, digest_of
from sparseffn.data.tokenizer_base import Tokenizer
from sparseffn.data.tokenizers import tokenizer_from_json
from sparseffn.data.writing import temporary, writing
from sparseffn.errors import UserError
from sparseffn.storage import default_cache_dir, write_text

# Raised whenever the files or what they mean change; old folders are then not found any more.
FORMAT = 1


def content_digest(path: Path) -> str:
    """Digest of a file that this library wrote: 32 hexadecimal digits (BLAKE2b)."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest little-endian unsigned type for the vocabulary: 1, 2 or 4 bytes."""
    return np.dtype("u1" if vocab_size <= 1 << 8 else "<u2" if vocab_size <= 1 << 16 else "<u4")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A corpus as stored: tokeniser, memory-mapped tokens and bytes of text by split, digest of the text."""

    tokenizer: Tokenizer
    tokens: Mapping[Split, np.ndarray]
    n_bytes: Mapping[Split, int]
    content: str


@final
class TokenWriter:
    """Appends the tokens of one split to its file."""

    def __init__(self, stream: BinaryIO, dtype: np.dtype) -> None:
        self._stream = stream
        self._dtype = dtype
        self._digest = hashlib.blake2b(digest_size=16)
        self.n_tokens = 0
        self.n_bytes = 0

    def append(self, ids: np.ndarray, n_bytes: int) -> None:
        """Write token numbers that stand for `n_bytes` of text."""
        data = ids.astype(self._dtype).tobytes()
        self._digest.update(data)
        self._stream.write(data)
        self.n_tokens += len(ids)
        self.n_bytes += n_bytes

    def summary(self) -> dict[str, int | str]:
        """What is written about the split in the meta file."""
        return {"bytes": self.n_bytes, "tokens": self.n_tokens, "digest": self._digest.hexdigest()}


@final
class TokenCache:
    """The cache in `folder` (default: `default_cache_dir()`), which is made when something is stored."""

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.folder = default_cache_dir() if folder is None else Path(folder).expanduser()

    @staticmethod
    def key(content: str, settings: Mapping[str, object]) -> str:
        """Folder name for a content digest and JSON-able tokeniser settings."""
        return digest_of(str(FORMAT), content, json.dumps(settings, sort_keys=True))

    def path(self, key: str) -> Path:
        """Where the tokens of that key are."""
        return self.folder / "tokens" / key

    def _note(self, fingerprint: str) -> Path:
        return self.folder / "sources" / f"{digest_of(str(FORMAT), fingerprint)}.json"

    def known_content(self, fingerprint: str) -> str | None:
        """Content digest of the source with this fingerprint, if it was prepared before.

        Raises:
            UserError: the entry is damaged.
        """
        path = self._note(fingerprint)
        try:
            entry = json.loads(path.read_bytes())
            _expect(path, "digest", entry["digest"], digest_of(fingerprint, entry["content"]))
            return str(entry["content"])
        except (FileNotFoundError, NotADirectoryError):
            return None
        except UserError:
            raise
        except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise _damaged(path, "a readable entry", repr(error)) from error

    def remember(self, fingerprint: str, content: str) -> None:
        """Note the content digest of a source.

        Raises:
            UserError: the note cannot be written.
        """
        write_text(self._note(fingerprint), json.dumps({"content": content, "digest": digest_of(fingerprint, content)}))

    def open(self, key: str) -> Prepared | None:
        """The stored corpus, verified, or None if there is none.

        Raises:
            UserError: a file is missing, truncated or changed.
        """
        folder = self.path(key)
        if not folder.is_dir():
            return None
        try:
            meta = _read_meta(folder / "meta.json")
            text = (folder / "tokenizer.json").read_text(encoding="utf-8")
            _expect(folder, "tokenizer digest", meta["tokenizer"], digest_of(text))
            tokenizer = tokenizer_from_json(text)
            dtype = token_dtype(tokenizer.vocab_size)
            tokens: dict[Split, np.ndarray] = {
                split: _open_tokens(folder, split, dtype, meta["splits"][split]) for split in SPLITS
            }
        except UserError:
            raise
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise _damaged(folder, "all of its files, whole,", repr(error)) from error
        return Prepared(tokenizer, tokens, {split: meta["splits"][split]["bytes"] for split in SPLITS}, meta["content"])

    def store(self, key: str, tokenizer: Tokenizer, fill: Callable[[Split, TokenWriter], None], content: str) -> Prepared:
        """Store a corpus under a key, unless somebody else has by then.

        Args:
            key: the folder's name.
            tokenizer: the tokeniser of the tokens.
            fill: writes all tokens of a split; whatever it raises leaves nothing behind.
            content: digest of the corpus.
        """
        place = self.path(key)
        with writing(self.folder), temporary(place.parent) as folder:
            folder.mkdir()
            _write(folder / "tokenizer.json", tokenizer.to_json().encode())
            splits: dict[Split, Mapping[str, int | str]] = {}
            for split in SPLITS:
                with _synced(folder / f"{split}.bin") as stream:
                    writer = TokenWriter(stream, token_dtype(tokenizer.vocab_size))
                    fill(split, writer)
                    splits[split] = writer.summary()
            meta = {"format": FORMAT, "content": content, "tokenizer": tokenizer.digest, "splits": splits}
            _write(folder / "meta.json", json.dumps({**meta, "digest": _meta_digest(meta)}, indent=1).encode())
            _sync_folder(folder)
            try:
                folder.rename(place)
            except OSError:
                # A folder with files in it cannot be replaced: somebody else was first.
                if not place.is_dir():
                    raise
            _sync_folder(place.parent)
        prepared = self.open(key)
        assert prepared is not None, f"{place} was stored just now"
        return prepared


@contextlib.contextmanager
def _synced(path: Path) -> Iterator[BinaryIO]:
    """A new file that is on the disk when it is closed."""
    with path.open("xb") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())


def _write(path: Path, data: bytes) -> None:
    with _synced(path) as stream:
        stream.write(data)


def _sync_folder(path: Path) -> None:
    # Windows cannot open folders; there a rename is all that can be done.
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _meta_digest(meta: Mapping[str, object]) -> str:
    return digest_of(json.dumps(meta, sort_keys=True))


def _read_meta(path: Path) -> dict:
    meta = cast("dict", json.loads(path.read_bytes()))
    digest = meta.pop("digest")
    _expect(path.parent, "meta digest", digest, _meta_digest(meta))
    _expect(path.parent, "format", FORMAT, meta["format"])
    return meta


def _open_tokens(folder: Path, split: Split, dtype: np.dtype, meta: Mapping[str, int | str]) -> np.ndarray:
    path = folder / f"{split}.bin"
    _expect(folder, f"size of {path.name}", int(meta["tokens"]) * dtype.itemsize, path.stat().st_size)
    _expect(folder, f"digest of {path.name}", meta["digest"], content_digest(path))
    # A split that is not stored has no tokens, and nothing can be mapped.
    return np.memmap(path, dtype=dtype, mode="r") if meta["tokens"] else np.zeros(0, dtype)


def _expect(folder: Path, what: str, expected: object, found: object) -> None:
    if expected != found:
        raise _damaged(folder, f"{what} {expected}", str(found))


def _damaged(path: Path, expected: str, found: str) -> UserError:
    return UserError(f"the cache must hold {expected} in {str(path)!r}; got {found}; fix: delete {path} and run again")
