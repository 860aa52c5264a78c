"""Writing into the cache: one process at a time, whole or not at all, and with a remedy where it cannot be done.

with locked(folder), writing(folder), temporary(folder) as path:
    path.mkdir()
    path.rename(folder / "text")
"""

from __future__ import annotations

import contextlib
import errno
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from sparseffn.errors import UserError


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder against other processes; who comes second waits."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn a failure of the file system into an error with a remedy."""
    try:
        yield
    except OSError as error:
        room = "make room there" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "make it writable"
        raise UserError(
            f"`cache_dir` must be a folder that can be written and has room; got {str(folder)!r} "
            f"({error.strerror or error}); fix: {room}, or pass --cache-dir PATH or set SPARSEFFN_CACHE"
        ) from error


@contextlib.contextmanager
def temporary(parent: Path) -> Iterator[Path]:
    """A hidden name in `parent` that nobody else uses; what is there at the end is removed."""
    parent.mkdir(parents=True, exist_ok=True)
    path = parent / f".{secrets.token_hex(8)}"
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
