"""Downloads: resumed where they broke off, checked against a published digest, there as a whole or not at all.

    path = fetch(remote, folder, on_progress=show)

pooch transfers. What has arrived is in `NAME.part` beside the place; a transfer that breaks goes on there, from any mirror.
Only a file with the right digest gets its name. The caller holds the folder's lock.
"""

from __future__ import annotations

import hashlib
import http
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, final

from sparseffn.data.splits import ANOTHER_CACHE
from sparseffn.errors import UserError
from sparseffn.storage import writing

if TYPE_CHECKING:
    import requests

# Is given a file's name, the bytes that are there, and how many there will be (None: not known).
OnProgress = Callable[[str, int, int | None], None]

# Seconds without a byte after which a mirror is given up.
TIMEOUT_S = 30.0
# A transfer that broke is taken up again as long as every try brings something, at most so often a mirror.
MAX_TRIES = 20
# A transfer that breaks loses less than this.
BLOCK_BYTES = 1 << 14
# A server may send without end: where no size is published, more than this is refused. The largest archive has 192 MB.
MAX_BYTES = 1 << 31
# Some servers refuse the user agents of programs; a file that is compressed on the way could not be resumed.
HEADERS = {"User-Agent": "Mozilla/5.0 (compatible; sparseffn)", "Accept-Encoding": "identity"}
# Hexadecimal digits of each. Weak ones are published for old corpora, and are enough against damage.
DIGEST_LENGTHS = {"md5": 32, "sha1": 40, "sha256": 64}


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedFile:
    """A file with known contents, as it lies on a disk."""

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

    file: PublishedFile
    # Addresses, tried in order.
    urls: tuple[str, ...]
    # For an archive: path inside it -> name of the plain file. Empty for a plain file.
    members: Mapping[str, str] = field(default_factory=dict)


class DownloadError(UserError):
    """No mirror gave the file."""


class _MirrorError(Exception):
    """This mirror does not give the file; another may."""

    def __init__(self, what: str, *fixes: str) -> None:
        super().__init__(what)
        self.fixes = fixes


class _WrongFile(_MirrorError):
    """A file that is not the published one."""


def parse_digest(text: str) -> str:
    """A digest as `algorithm:hex` in lower case; for hexadecimal digits alone, their number gives the algorithm.

    Raises:
        UserError: it is none.
    """
    given = text.strip().lower()
    algorithm, colon, digits = given.rpartition(":")
    if not colon:
        algorithm = next((name for name, length in DIGEST_LENGTHS.items() if length == len(digits)), "")
    if DIGEST_LENGTHS.get(algorithm) != len(digits) or set(digits) - set("0123456789abcdef"):
        raise UserError(
            f"a digest must be {', '.join(f'{name}:HEX' for name in DIGEST_LENGTHS)}; got {text!r}; "
            f"fix: copy it from the message that named it"
        )
    return f"{algorithm}:{digits}"


def hashed(path: Path, algorithm: str = "sha256") -> str:
    """Digest of a file as `algorithm:hex`."""
    with path.open("rb") as stream:
        return f"{algorithm}:{hashlib.file_digest(stream, algorithm).hexdigest()}"


def check_file(path: Path, published: PublishedFile, accepted: Collection[str] = ()) -> None:
    """Check a file against what is published of it, or the digests that the user accepts in place of an unverified one.

    Raises:
        UserError: it is another file.
    """
    try:
        _verify(path, published, accepted)
    except _WrongFile as error:
        raise UserError(
            f"{published.name} must be the published file; got {str(path)!r} with {error}; fix: {'; '.join(error.fixes)}"
        ) from None


def _verify(path: Path, published: PublishedFile, accepted: Collection[str]) -> None:
    size, wanted = path.stat().st_size, published.digest
    # An accepted digest is the stronger word: the size of such a file does not matter.
    allowed = () if wanted is None else (wanted,) if published.verified else (wanted, *accepted)
    if any(hashed(path, digest.partition(":")[0]) == digest for digest in allowed):
        return
    if wanted is None and published.size in (None, size):
        return
    found = hashed(path)
    expected = ", ".join(filter(None, (f"{published.size} bytes" if published.size else "", wanted)))
    what = f"{size} bytes, {found}, not {expected}" + (f" (as {published.source} says)" if published.source else "")
    fix = "get the file from another place"
    if wanted is not None and not published.verified:
        what += ", which nobody has verified here"
        fix += f", or, if you trust this one, prepare with --accept-digest {found}"
    raise _WrongFile(what, fix)


def fetch(
    remote: RemoteFile,
    folder: Path,
    *,
    accepted: Collection[str] = (),
    on_progress: OnProgress | None = None,
) -> Path:
    """The file in `folder`, downloaded unless it is there; `accepted` as for `check_file`.

    Raises:
        DownloadError: no mirror gave the file; the reason of each is in the message.
        UserError: the disk is full or cannot be written.
    """
    place, file = folder / remote.file.name, remote.file
    if place.is_file():
        check_file(place, file, accepted)
        return place
    part = _part_of(place)
    failures: list[str] = []
    fixes = ["try again later (a broken transfer goes on where it stopped)"]
    for url in remote.urls:
        try:
            with writing(place, fix=ANOTHER_CACHE):
                if part.is_symlink() or not part.is_file():
                    part.unlink(missing_ok=True)
                _fetch_from(url, file, part, accepted, on_progress)
                part.replace(place)
            return place
        except _MirrorError as error:
            failures.append(f"{url}: {error}")
            fixes += error.fixes
        except UserError:
            # Half a file on a full disk is of no use.
            part.unlink(missing_ok=True)
            raise
    raise DownloadError(
        f"{file.name} must come from one of its addresses; got {'; '.join(failures)}; "
        f"fix: {'; or '.join(fixes)}; or put the file in {str(folder)!r} yourself"
    )


def remove_downloads(remote: RemoteFile, folder: Path) -> None:
    """Remove a downloaded file and what has arrived of it."""
    place = folder / remote.file.name
    place.unlink(missing_ok=True)
    _part_of(place).unlink(missing_ok=True)


def _part_of(place: Path) -> Path:
    return place.with_name(f"{place.name}.part")


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _fetch_from(url: str, file: PublishedFile, part: Path, accepted: Collection[str], on_progress: OnProgress | None) -> None:
    """Make `part` the whole published file, or raise `_MirrorError`."""
    resumed = _size(part) > 0
    try:
        _transfer(url, file, part, on_progress)
        _verify(part, file, accepted)
    except _WrongFile as error:
        part.unlink(missing_ok=True)
        if not resumed:
            raise _MirrorError(f"a wrong file, which was removed: {error}", *error.fixes) from error
        # What lay there may have been the beginning of another file.
        _fetch_from(url, file, part, accepted, on_progress)


def _transfer(url: str, file: PublishedFile, part: Path, on_progress: OnProgress | None) -> None:
    """Take the transfer up again until it is complete."""
    # What pooch transfers with. Imported here, as corpora are opened far more often than downloaded.
    import requests

    for _ in range(MAX_TRIES):
        before = _size(part)
        if before and before == file.size:
            return
        try:
            _receive(url, file, part, on_progress)
            return
        except requests.RequestException as error:
            answer = error.response
            if before and answer is not None and answer.status_code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                part.unlink()
            elif _size(part) <= before:
                raise _MirrorError(_reason(error, _size(part))) from error
    raise _MirrorError(f"broke off {MAX_TRIES} times")


def _reason(error: requests.RequestException, have: int) -> str:
    if error.response is not None:
        return f"HTTP {error.response.status_code} {error.response.reason}"
    cause = error.args[0] if error.args else error
    what = str(getattr(cause, "reason", cause))
    return f"broke off after {have} bytes ({what})" if have else what


def _receive(url: str, file: PublishedFile, part: Path, on_progress: OnProgress | None) -> None:
    """One request: the rest of the file, or all of it from a server that cannot give a rest."""
    import pooch
    import requests

    with part.open("ab") as stream:
        arriving = _Arriving(stream, file, on_progress)
        headers = HEADERS | ({"Range": f"bytes={arriving.have}-"} if arriving.have else {})
        hooks = {"response": arriving.answered}
        download = pooch.HTTPDownloader(chunk_size=BLOCK_BYTES, timeout=TIMEOUT_S, headers=headers, hooks=hooks)
        try:
            download(url, arriving, None)
        finally:
            if arriving.answer is not None:
                arriving.answer.close()
        stream.flush()
        os.fsync(stream.fileno())
    if arriving.total is not None and arriving.have < arriving.total:
        raise requests.ConnectionError(f"the connection ended before {arriving.total} bytes")


@final
class _Arriving:
    """The part of a file that is there: pooch's downloader writes to it."""

    def __init__(self, stream: BinaryIO, file: PublishedFile, on_progress: OnProgress | None) -> None:
        self._stream, self._file, self._on_progress = stream, file, on_progress
        self.have, self.total = stream.tell(), file.size
        self.answer: requests.Response | None = None

    def answered(self, answer: requests.Response, *_: object, **__: object) -> None:
        """See where in the file the answer begins: a server that ignores the range sends all of it."""
        import requests

        self.answer = answer
        if answer.status_code == http.HTTPStatus.OK and self.have:
            self._stream.truncate(0)
            self.have = 0
        given = answer.headers.get("Content-Range", "")
        if answer.status_code == http.HTTPStatus.PARTIAL_CONTENT and not given.startswith(f"bytes {self.have}-"):
            raise requests.RequestException(f"another range than asked for ({given!r})")
        length = answer.headers.get("Content-Length", "")
        if answer.ok and length.isdigit():
            self.total = self.have + int(length)

    def write(self, block: bytes) -> None:
        """Append what came, within the bound."""
        bound = self._file.size or MAX_BYTES
        self.have += len(block)
        if self.have > bound:
            raise _WrongFile(f"more than the {bound} bytes of the file", "get the file from another place")
        self._stream.write(block)
        if self._on_progress is not None:
            self._on_progress(self._file.name, self.have, self.total)

    def flush(self) -> None:
        """Nothing after every block: `_receive` does it at the end."""
