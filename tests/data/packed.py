"""Small archives in the layouts of the published ones, and corpora whose digests are theirs."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import tarfile
import zipfile
from collections.abc import Mapping

from sparseffn.data.download import PublishedFile, RemoteFile
from sparseffn.data.published_corpus import PublishedCorpus


def lines(n: int, word: str = "word") -> bytes:
    """A text of n lines."""
    return "".join(f"{word} {i * 7919 % 1000} of line {i}\n" for i in range(n)).encode()


def zipped(members: Mapping[str, bytes]) -> bytes:
    """A zip archive."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            # A fixed date: the same members give the same bytes.
            file.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    return stream.getvalue()


def tarred(members: Mapping[str, bytes | tarfile.TarInfo]) -> bytes:
    """A tar.gz archive; a `TarInfo` stands for a member without contents."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name) if isinstance(data, bytes) else data
            info.size = len(data) if isinstance(data, bytes) else 0
            file.addfile(info, io.BytesIO(data) if isinstance(data, bytes) else None)
    return stream.getvalue()


def sha256(data: bytes) -> str:
    """Digest as the project writes it."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def small(
    corpus: PublishedCorpus,
    texts: Mapping[str, bytes],
    downloads: Mapping[str, bytes],
    urls: Mapping[str, tuple[str, ...]],
) -> PublishedCorpus:
    """A registered corpus with small files in place of the published ones: other digests, sizes and addresses.

    Args:
        corpus: the registered one.
        texts: plain files by name.
        downloads: what is downloaded, by name.
        urls: addresses by name; a route without is left out.
    """

    def published(file: PublishedFile, data: bytes) -> PublishedFile:
        return dataclasses.replace(file, digest=sha256(data), size=len(data))

    def remote(old: RemoteFile) -> RemoteFile:
        name = old.file.name
        return dataclasses.replace(old, file=published(old.file, downloads[name]), urls=urls[name])

    routes = [route for route in corpus.routes if all(old.file.name in urls for old in route)]
    return dataclasses.replace(
        corpus,
        files=tuple(published(file, texts[file.name]) for file in corpus.files),
        routes=tuple(tuple(remote(old) for old in route) for route in routes),
    )
