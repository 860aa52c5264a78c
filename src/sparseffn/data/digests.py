"""Published digests: `sha256:HEX` or `md5:HEX`, and what is said of a file that has another one.

    check_file(path, "md5:a1fa5f...", what="enwik8")

A digest that nobody compared with a real copy here may itself be wrong; a user who trusts the file can accept its digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import BinaryIO

from sparseffn.errors import UserError

# Weak ones are published for old corpora, and are enough against damage; none of them guards against an attacker here.
LENGTHS = {"md5": 32, "sha1": 40, "sha256": 64}


def parse_digest(text: str) -> str:
    """A digest as `algorithm:hex` in lower case; hexadecimal digits alone are told apart by their number.

    Raises:
        UserError: it is none.
    """
    given = text.strip().lower()
    algorithm, colon, digits = given.rpartition(":")
    if not colon:
        algorithm = next((name for name, length in LENGTHS.items() if length == len(digits)), "")
    if LENGTHS.get(algorithm) != len(digits) or set(digits) - set("0123456789abcdef"):
        raise UserError(
            f"a digest must be {', '.join(f'{name}:HEX' for name in LENGTHS)}; got {text!r}; "
            f"fix: copy it from the message that told it"
        )
    return f"{algorithm}:{digits}"


def file_digest(path: Path) -> str:
    """Digest of a file as `sha256:hex`."""
    with path.open("rb") as stream:
        return f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}"


def content_digest(path: Path) -> str:
    """Digest of a file that this library wrote: 32 hexadecimal digits (BLAKE2b)."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def stream_digests(stream: BinaryIO, algorithms: Iterable[str]) -> set[str]:
    """Digests of the rest of a stream, read once."""
    found = {name: hashlib.new(name) for name in algorithms}
    while block := stream.read(1 << 20):
        for digest in found.values():
            digest.update(block)
    return {f"{name}:{digest.hexdigest()}" for name, digest in found.items()}


def mismatch(path: Path, expected: str | None, accepted: Collection[str] = ()) -> str | None:
    """The file's own digest where it is neither the expected nor an accepted one, else None.

    Args:
        path: the file.
        expected: what it should be; None where nothing is published, which any file satisfies.
        accepted: digests that the user accepts instead.
    """
    if expected is None:
        return None
    algorithms = {digest.partition(":")[0] for digest in (expected, *accepted)} | {"sha256"}
    with path.open("rb") as stream:
        found = stream_digests(stream, algorithms)
    if found & {expected, *accepted}:
        return None
    return next(digest for digest in found if digest.startswith("sha256:"))
