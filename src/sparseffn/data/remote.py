"""What is known of a published file: addresses, digest, size, and who says so. Plain values; tests make small ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedFile:
    """A file with known contents, as it lies on a disk."""

    # Its name.
    name: str
    # `algorithm:hex`, or None where none is published.
    digest: str | None = None
    # Bytes, or None where it is not published.
    size: int | None = None
    # Who publishes digest and size.
    source: str = ""
    # Whether a copy was seen here whose digest is this one. An unverified digest may be wrong.
    verified: bool = False


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteFile:
    """A file to download, and what is in it."""

    # The file as downloaded.
    file: PublishedFile
    # Addresses, tried in order.
    urls: tuple[str, ...]
    # For an archive: path inside it -> name of the plain file. Empty for a plain file.
    members: Mapping[str, str] = field(default_factory=dict)
