"""Where text is found, and which bytes of it are training, validation and test text: 90% / 5% / 5%.

A `Source` lists the pieces of files of each split. Building one reads no file contents (but for a few bytes where a
file is cut), so that a corpus that was prepared before is found again by its fingerprint in milliseconds.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple, Self, get_args

from sparseffn.errors import UserError
from sparseffn.storage import default_cache_dir, digest_of, expanded

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

StrPath = str | os.PathLike[str]

# What to do where the cache cannot be written.
ANOTHER_CACHE = "pass --cache-dir PATH or set SPARSEFFN_CACHE"
HELD_OUT: tuple[Split, ...] = ("valid", "test")
# Share of all bytes that each of them receives; training gets the rest.
HELD_OUT_SHARE = 0.05
# How far a split's share may be from its aim.
SHARE_TOLERANCE = 0.01
# Bytes read at a time: bounds the memory of preparing a corpus of one large file.
BLOCK_BYTES = 1 << 24
# A cut moves back to a line end at most this far, and never more than 1% of the file.
MAX_CUT_SHIFT = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a corpus may be found on this machine."""

    # The user's file or folder, if one is given.
    data_dir: Path | None = None
    # Where downloads, unpacked text and tokens are kept.
    cache_dir: Path = field(default_factory=default_cache_dir)

    @classmethod
    def of(cls, data_dir: StrPath | None, cache_dir: StrPath | None) -> Self:
        """From what a user gives; None: no folder, the default cache."""
        return cls(
            data_dir=None if data_dir is None else expanded(data_dir),
            cache_dir=default_cache_dir() if cache_dir is None else expanded(cache_dir),
        )

    def corpus_dir(self, name: str) -> Path:
        return self.cache_dir / "corpora" / name


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file as found on disk; `label` is its path relative to the corpus, with forward slashes."""

    path: Path
    label: str
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def at(cls, path: Path, label: str) -> Self:
        """Look the file up.

        Raises:
            UserError: it does not exist, its metadata cannot be read, or it is a pipe or a device, which may never end.
        """
        try:
            found = path.stat()
        except OSError as error:
            raise UserError(_unreadable(path, error)) from error
        if not stat.S_ISREG(found.st_mode):
            raise UserError(
                f"a corpus file must be a regular file; got {str(path)!r}, a folder, pipe or device; "
                "fix: save the text in a file"
            )
        return cls(path, label, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def files_under(root: Path, *, enters: Callable[[str], bool], takes: Callable[[Path], bool]) -> list[SourceFile]:
    """Files of a folder and of those folders in it whose names are entered, sorted by label."""
    found: list[SourceFile] = []
    for folder, folders, names in os.walk(root):
        folders[:] = filter(enters, folders)
        paths = (Path(folder, name) for name in names)
        found += [SourceFile.at(path, path.relative_to(root).as_posix()) for path in paths if path.is_file() and takes(path)]
    return sorted(found, key=lambda file: file.label)


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes `start` to `stop` of a file, preceded by `header`, which `n_bytes` counts too."""

    file: SourceFile
    start: int
    stop: int
    header: bytes = b""

    @classmethod
    def whole(cls, file: SourceFile, header: bytes = b"") -> Piece:
        return cls(file, 0, file.size, header)

    @property
    def n_bytes(self) -> int:
        return len(self.header) + self.stop - self.start


class Block(NamedTuple):
    """Bytes of one piece; `data` ends at a line end, or where the piece ends. `offset`: where in the file it begins."""

    data: bytes
    path: Path
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """The pieces of every split of a corpus, in reading order.

    Where a piece does not end in a line end and another follows, a line end is put between them.
    """

    corpus: str
    pieces: Mapping[Split, Sequence[Piece]]
    # What belongs into every result besides counts, such as the Python version.
    info: Mapping[str, str] = field(default_factory=dict)
    # Splits whose tokens are stored, and what the content digest depends on beside their text.
    stored: ClassVar[tuple[Split, ...]] = SPLITS
    digested: ClassVar[tuple[str, ...]] = ()

    def fingerprint(self) -> str:
        """Digest of names, sizes and times of the files and of the cuts: cheap, changes when a file is written."""
        pieces = [(split, piece, piece.file) for split in SPLITS for piece in self.pieces[split]]
        rows = [
            (split, os.fspath(file.path), file.size, file.mtime_ns, file.ctime_ns, piece.start, piece.stop, piece.header.hex())
            for split, piece, file in pieces
        ]
        return digest_of(self.corpus, json.dumps([sorted(self.info.items()), rows]))

    def n_files(self, split: Split) -> int:
        return len({piece.file.path for piece in self.pieces[split]})

    def n_bytes(self, split: Split) -> int:
        """Bytes of the split's pieces, without line ends put between them."""
        return sum(piece.n_bytes for piece in self.pieces[split])

    def blocks(self, split: Split) -> Iterator[Block]:
        """Read the split.

        Raises:
            UserError: a file cannot be read, or is not as long as when it was found.
        """
        pieces = self.pieces[split]
        for index, piece in enumerate(pieces):
            yield from _read_piece(piece, end_line=index + 1 < len(pieces))


def split_by_hash(pieces: Sequence[Piece]) -> dict[Split, list[Piece]]:
    """Give whole pieces to the splits, in an order that only their labels decide.

    Walking in the order of the labels' hashes, validation is filled up to 5% of all bytes, skipping pieces that would
    overshoot, then test likewise; the rest is training. Within a split, pieces are sorted by label.
    """
    room = HELD_OUT_SHARE * sum(piece.n_bytes for piece in pieces)
    split: dict[Split, list[Piece]] = {name: [] for name in SPLITS}
    used = dict.fromkeys(SPLITS, 0)
    for piece in sorted(pieces, key=lambda piece: (digest_of(piece.file.label), piece.file.label)):
        fitting: list[Split] = [name for name in HELD_OUT if used[name] + piece.n_bytes <= room]
        name = fitting[0] if fitting else "train"
        split[name].append(piece)
        used[name] += piece.n_bytes
    return {name: sorted(chosen, key=lambda piece: piece.file.label) for name, chosen in split.items()}


def is_within_tolerance(split: Mapping[Split, Sequence[Piece]]) -> bool:
    """Whether every split's share of the bytes is within 1% of all bytes of its aim."""
    sizes = {name: sum(piece.n_bytes for piece in pieces) for name, pieces in split.items()}
    total = sum(sizes.values())
    return all(abs(sizes[name] - HELD_OUT_SHARE * total) <= SHARE_TOLERANCE * total for name in HELD_OUT)


def split_by_cutting(files: Sequence[SourceFile]) -> dict[Split, list[Piece]]:
    """Cut every file at 90% and 95%: at a line end where one is near, else between two UTF-8 characters."""
    split: dict[Split, list[Piece]] = {name: [] for name in SPLITS}
    for file in files:
        cuts = [0, _cut_near(file, 1 - 2 * HELD_OUT_SHARE), _cut_near(file, 1 - HELD_OUT_SHARE), file.size]
        for name, start, stop in zip(SPLITS, cuts, cuts[1:], strict=False):
            if start < stop:
                split[name].append(Piece(file, start, stop))
    return split


def _cut_near(file: SourceFile, share: float) -> int:
    """The position at or a little before `share` of the file where it may be cut."""
    aim = round(file.size * share)
    reach = min(file.size // 100, MAX_CUT_SHIFT)
    # At least three bytes back: a UTF-8 character has at most four.
    start = max(0, aim - max(reach, 3))
    try:
        with file.path.open("rb") as stream:
            stream.seek(start)
            window = stream.read(aim + 1 - start)
    except OSError as error:
        raise UserError(_unreadable(file.path, error)) from error
    line_end = window.rfind(b"\n", max(0, aim - reach - start), aim - start)
    if line_end >= 0:
        return start + line_end + 1
    # Bytes 0x80 to 0xBF continue a character; in text that is not UTF-8 any place is as good.
    for back in range(min(4, len(window))):
        at = aim - start - back
        if at < len(window) and not 0x80 <= window[at] <= 0xBF:
            return start + at
    return aim


def _read_piece(piece: Piece, *, end_line: bool) -> Iterator[Block]:
    """Blocks of one piece; `end_line` adds the line end that the piece lacks."""
    path = piece.file.path
    left, header = piece.stop - piece.start, piece.header
    try:
        with path.open("rb") as stream:
            if os.fstat(stream.fileno()).st_size != piece.file.size:
                raise UserError(_changed(path))
            stream.seek(piece.start)
            while left or header:
                data = stream.read(min(left, BLOCK_BYTES))
                left -= len(data)
                if left and not data.endswith(b"\n"):
                    line = stream.readline(left)
                    left -= len(line)
                    if not line:
                        raise UserError(_changed(path))
                    data += line
                offset = stream.tell() - len(data) - len(header)
                data, header = header + data, b""
                if end_line and not left and not data.endswith(b"\n"):
                    data += b"\n"
                yield Block(data, path, offset)
    except OSError as error:
        raise UserError(_unreadable(path, error)) from error


def _unreadable(path: Path, error: OSError) -> str:
    return f"a corpus file must be readable; got {str(path)!r} ({error.strerror}); fix: make it readable or take it out"


def _changed(path: Path) -> str:
    return f"corpus files must not change while they are read; got a new size for {str(path)!r}; fix: run again"
