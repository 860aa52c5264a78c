"""Documents of many shards, one JSON object a line with its text under `text`, in an order that follows from a seed.

    documents = ShuffledDocuments(read, n_shards=1024, seed=0)
    text = next(documents)
    documents.position()     # a few integers, from which another one goes on with the same documents

An epoch takes the shards in a shuffled order. `n_open` of them are read in turn, and every `buffer` documents are shuffled
among themselves, so that no more than these are held, and a position needs no text.
"""

from __future__ import annotations

import gzip
import importlib
import json
import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, final

from sparseffn.errors import UserError
from sparseffn.storage import file_digest

# Bytes of the longest line of a shard, far above the longest document of the published ones.
MAX_LINE = 64 << 20

# Reads the texts of a shard by number, from a document on.
ReadShard = Callable[[int, int], Iterator[str]]


def read_local(path: Path, skip: int = 0) -> Iterator[str]:
    """Texts of a `.json.gz` shard on the disk, from document `skip` on.

    Raises:
        UserError: it cannot be read, is damaged, or a line is no document.
    """
    try:
        if not path.is_file():
            raise FileNotFoundError("no regular file")
        # Which gzip takes for the end of a whole one.
        if path.stat().st_size == 0:
            raise EOFError("an empty file")
        with gzip.open(path, "rb") as stream:
            yield from _texts(_lines(stream, str(path)), skip, str(path))
    except (EOFError, zlib.error, OSError) as error:
        raise _no_shard(path, error) from error


def shard_digest(path: Path) -> str:
    """Digest of a shard's bytes, about a second a gigabyte: the checksum that ends a gzip file is of its last member alone."""
    try:
        return file_digest(path)
    except OSError as error:
        raise _no_shard(path, error) from error


def _no_shard(path: Path, error: Exception) -> UserError:
    return UserError(f"a shard must be a whole .json.gz file; got {str(path)!r} ({error}); fix: get it again")


def read_remote(url: str, skip: int = 0) -> Iterator[str]:
    """Texts of a `.json.gz` shard elsewhere, streamed by the `datasets` library.

    Raises:
        UserError: the library is not installed, the shard cannot be had, or a line is no document.
    """
    datasets = _datasets()
    try:
        # Lines instead of its JSON reader: fields whose type differs between shards are of no matter then.
        lines = datasets.load_dataset("text", data_files={"train": [url]}, split="train", streaming=True)
        rows = lines.skip(skip) if skip else lines
        yield from _texts((row["text"] for row in rows), 0, url)
    except UserError:
        raise
    except Exception as error:
        # The library's own, those of three libraries for the network, those of gzip: they have no common base.
        raise UserError(
            f"a shard must come whole over the network; got {type(error).__name__} ({error}) from {url}; "
            "fix: run the same command again once it can be reached, or pass --data-dir with the .json.gz shards"
        ) from error


def _lines(stream: gzip.GzipFile, where: str) -> Iterator[bytes]:
    """Lines of a bounded length: a few kilobytes of an archive may stand for gigabytes."""
    while line := stream.readline(MAX_LINE + 1):
        if len(line) > MAX_LINE:
            raise UserError(
                f"a line of a shard must have at most {MAX_LINE} bytes; got more in {where}; fix: get the shard again"
            )
        yield line


def _texts(lines: Iterable[str | bytes], skip: int, where: str) -> Iterator[str]:
    for number, line in enumerate(lines):
        if number < skip:
            continue
        try:
            text = json.loads(line)["text"]
            if not isinstance(text, str):
                raise TypeError(f"{type(text).__name__} as text")
            # Half of a pair of UTF-16, which JSON can spell, is no text.
            text.encode()
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f"a line of a shard must be a JSON object with `text`; got {line[:40]!r} in line {number + 1} of {where}; "
                f"fix: get the shard again"
            ) from error
        yield text


def _datasets() -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise UserError(
            "streaming from the network needs the package datasets; got none; fix: pip install 'sparseffn[stream]', "
            "or pass --data-dir with the .json.gz shards"
        ) from error


def check_positive(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise UserError(f"`{name}` must be at least 1; got {value}; fix: pass a positive number")


@final
class _Lane:
    """A shuffled sequence of shards, read one after the other."""

    def __init__(self, read: ReadShard, shards: Sequence[int]) -> None:
        self._read, self._shards = read, shards
        self.move(0, 0)

    def move(self, shard: int, line: int) -> None:
        self.shard, self.line = shard, line
        self._stream: Iterator[str] | None = None

    def take(self) -> str | None:
        """The next document, None after the last."""
        while self.shard < len(self._shards):
            if self._stream is None:
                self._stream = self._read(self._shards[self.shard], self.line)
            text = next(self._stream, None)
            if text is not None:
                self.line += 1
                return text
            self.move(self.shard + 1, 0)
        return None


@final
class ShuffledDocuments:
    """Documents without end, one epoch after the other.

    Args:
        read: reads a shard.
        n_shards: how many there are.
        seed: of the order.
        buffer: documents that are shuffled among themselves.
        n_open: shards that are read in turn.
    """

    def __init__(self, read: ReadShard, n_shards: int, *, seed: int, buffer: int = 1000, n_open: int = 1) -> None:
        check_positive(n_shards=n_shards, buffer=buffer, n_open=n_open)
        self._read, self._n_shards, self._seed, self._buffer = read, n_shards, seed, buffer
        self._n_open = min(n_open, n_shards)
        self._begin(0)
        self._mark = self._state()

    def __next__(self) -> str:
        if self._index == len(self._texts):
            self._fill()
        self._index += 1
        return self._texts[self._index - 1]

    def position(self) -> list[int]:
        """Where the next document is: epoch, block, next lane and place of each open shard as the block begins, index in it."""
        return [*self._mark, self._index]

    def restore(self, position: Sequence[int]) -> None:
        """Go to a position that `position` gave.

        Raises:
            UserError: it is of another number of shards, or the shards have fewer documents now.
        """
        expected = 4 + 2 * self._n_open
        if len(position) != expected:
            raise UserError(
                f"a position must have {expected} numbers for {self._n_shards} shards; got {len(position)}; "
                "fix: go on with the shards that the run began with"
            )
        *mark, index = position
        epoch, block, next_lane, *places = mark
        self._begin(epoch)
        self._block, self._next_lane = block, next_lane
        for lane, shard, line in zip(self._lanes, places[::2], places[1::2], strict=True):
            lane.move(shard, line)
        self._mark = self._state()
        if index:
            self._fill()
        if index > len(self._texts) or self._mark != mark:
            raise UserError("the shards must be as they were; got fewer documents; fix: restore them, or begin a new run")
        self._index = index

    def _begin(self, epoch: int) -> None:
        """Shuffle the shards and deal them out; no document is read yet."""
        order = list(range(self._n_shards))
        random.Random(f"{self._seed} {epoch}").shuffle(order)
        self._epoch, self._block, self._next_lane = epoch, 0, 0
        self._texts, self._index = [], 0
        self._lanes = [_Lane(self._read, order[lane :: self._n_open]) for lane in range(self._n_open)]

    def _state(self) -> list[int]:
        places = (number for lane in self._lanes for number in (lane.shard, lane.line))
        return [self._epoch, self._block, self._next_lane, *places]

    def _fill(self) -> None:
        """Read the next block and shuffle it; after the last one, the first of the next epoch."""
        self._mark = self._state()
        texts = self._read_block()
        if not texts:
            if self._block == 0:
                raise UserError("the shards must have documents; got none; fix: get them again")
            self._begin(self._epoch + 1)
            self._mark = self._state()
            texts = self._read_block()
        random.Random(f"{self._seed} {self._epoch} {self._block}").shuffle(texts)
        self._block += 1
        self._texts, self._index = texts, 0

    def _read_block(self) -> list[str]:
        texts: list[str] = []
        n_missed = 0
        while len(texts) < self._buffer and n_missed < self._n_open:
            text = self._lanes[self._next_lane].take()
            self._next_lane = (self._next_lane + 1) % self._n_open
            if text is None:
                n_missed += 1
            else:
                n_missed = 0
                texts.append(text)
        return texts
