"""Downloads: resumed where they broke off, checked against a published digest, there as a whole or not at all.

    path = fetch(remote, folder, on_progress=show)

The parts that have arrived are in `NAME.part` beside the place; a transfer that breaks goes on there, from any mirror. Only
a file with the right size and digest gets its name. Whoever calls this holds the folder's lock (`locked`).
"""

from __future__ import annotations

import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, final

from sparseffn.data.digests import mismatch
from sparseffn.data.remote import PublishedFile, RemoteFile
from sparseffn.data.writing import writing
from sparseffn.errors import UserError

# Told of a file's name, the bytes that are there, and how many there will be (None: not known).
OnProgress = Callable[[str, int, int | None], None]

# Seconds without a byte after which a mirror is given up.
TIMEOUT_S = 30.0
# A transfer that broke is taken up again as long as every try brings something, at most so often a mirror.
MAX_TRIES = 20
BLOCK_BYTES = 1 << 18
# A server may send without end: where no size is published, more than this is refused. The largest archive has 192 MB.
MAX_BYTES = 1 << 31
# Some servers refuse the user agent of Python's library.
USER_AGENT = "Mozilla/5.0 (compatible; sparseffn)"


class DownloadError(UserError):
    """No mirror gave the file."""


def fetch(
    remote: RemoteFile,
    folder: Path,
    *,
    accepted: Collection[str] = (),
    on_progress: OnProgress | None = None,
) -> Path:
    """The file in `folder`, downloaded unless it is there.

    Args:
        remote: what to get, and from where.
        folder: where it goes.
        accepted: digests that the user accepts in place of an unverified one.
        on_progress: told of what has arrived.

    Raises:
        DownloadError: no mirror gave the file; says of each one why.
        UserError: the disk is full or cannot be written.
    """
    place = folder / remote.file.name
    if place.exists():
        check_file(place, remote.file, accepted)
        return place
    failures: list[str] = []
    fixes = ["try again later (a broken transfer goes on where it stopped)"]
    for url in remote.urls:
        transfer = _Transfer(remote.file, url, place, accepted, on_progress)
        try:
            with writing(folder):
                transfer.run()
            return place
        except _MirrorError as error:
            failures.append(f"{url}: {error}")
            fixes += [error.fix] if error.fix else []
        except UserError:
            # Half a file on a full disk helps nobody.
            transfer.part.unlink(missing_ok=True)
            raise
    raise DownloadError(
        f"{remote.file.name} must come from one of its addresses; got {'; '.join(failures)}; "
        f"fix: {'; or '.join(fixes)}; or put the file in {str(folder)!r} yourself"
    )


@final
@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with a file, and what can be done."""

    what: str
    fix: str


def check_file(path: Path, published: PublishedFile, accepted: Collection[str] = ()) -> None:
    """Check a file that is there against what is published of it.

    Raises:
        UserError: it is another file.
    """
    if problem := problem_with(path, published, accepted):
        raise UserError(
            f"{published.name} must be the published file; got {str(path)!r} with {problem.what}; fix: {problem.fix}"
        )


def problem_with(path: Path, published: PublishedFile, accepted: Collection[str] = ()) -> Problem | None:
    """What is wrong with a file; None where nothing is."""
    size = path.stat().st_size
    digest = mismatch(path, published.digest, () if published.verified else accepted)
    # An accepted digest is the stronger word; a size alone tells where no digest is published.
    if digest is None and (published.digest or published.size in (None, size)):
        return None
    got = ", ".join(filter(None, (f"{size} bytes", digest)))
    wanted = ", ".join(filter(None, (f"{published.size} bytes" if published.size else "", published.digest)))
    what = f"{got}, not {wanted}" + (f" (as {published.source} says)" if published.source else "")
    if published.verified or digest is None:
        return Problem(what, "get the file from another place")
    return Problem(
        f"{what}, which nobody has verified here",
        f"get the file from another place, or, if you trust this one, prepare with --accept-digest {digest}",
    )


class _MirrorError(Exception):
    """This mirror does not give the file; another may."""

    def __init__(self, what: str, fix: str | None = None) -> None:
        super().__init__(what)
        self.fix = fix


class _Transfer:
    """One file from one mirror."""

    def __init__(
        self,
        file: PublishedFile,
        url: str,
        place: Path,
        accepted: Collection[str],
        on_progress: OnProgress | None,
    ) -> None:
        self.file, self.url, self.place, self.accepted = file, url, place, accepted
        self.on_progress = on_progress
        self.part = place.with_name(f"{place.name}.part")

    def run(self) -> None:
        """Transfer, check, and give the file its name."""
        resumed = self._have() > 0
        self._transfer()
        problem = problem_with(self.part, self.file, self.accepted)
        if problem and resumed:
            # What lay there may have been the beginning of another file.
            self.part.unlink()
            self._transfer()
            problem = problem_with(self.part, self.file, self.accepted)
        if problem:
            self.part.unlink()
            raise _MirrorError(f"a wrong file, which was removed: {problem.what}", problem.fix)
        self.part.replace(self.place)

    def _have(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _transfer(self) -> None:
        """Take the transfer up again until it is complete."""
        for _ in range(MAX_TRIES):
            before = self._have()
            if before and before == self.file.size:
                return
            try:
                self._try(before)
                return
            except _Broken as error:
                if self._have() <= before:
                    raise _MirrorError(str(error)) from error
        raise _MirrorError(f"broke off {MAX_TRIES} times")

    def _try(self, have: int) -> None:
        """One request: the rest of the file, or all of it from a server that cannot give a rest."""
        answer = self._open(have)
        if answer is None:
            answer = self._open(0)
        assert answer is not None, "only a range is refused as one"
        with answer:
            start = _start(answer, have)
            length = answer.headers.get("Content-Length")
            total = start + int(length) if length and length.isdigit() else self.file.size
            with self.part.open("ab" if start else "wb") as stream:
                self._copy(answer, stream, start, total)

    def _open(self, have: int) -> http.client.HTTPResponse | None:
        """The server's answer; None where it has no such range."""
        headers = {"User-Agent": USER_AGENT, "Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        try:
            return urllib.request.urlopen(urllib.request.Request(self.url, headers=headers), timeout=TIMEOUT_S)
        except urllib.error.HTTPError as error:
            if have and error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                return None
            raise _Broken(f"HTTP {error.code} {error.reason}") from error
        except urllib.error.URLError as error:
            raise _Broken(str(error.reason)) from error
        except (OSError, http.client.HTTPException) as error:
            raise _Broken(str(error) or type(error).__name__) from error

    def _copy(self, answer: http.client.HTTPResponse, stream: BinaryIO, start: int, total: int | None) -> None:
        """Append what comes, within the bound, and see that all of it came."""
        bound, have = self.file.size or MAX_BYTES, start
        while block := _received(answer):
            have += len(block)
            if have > bound:
                raise _MirrorError(f"more than the {bound} bytes of the file")
            stream.write(block)
            if self.on_progress is not None:
                self.on_progress(self.file.name, have, total)
        stream.flush()
        os.fsync(stream.fileno())
        if total is not None and have < total:
            raise _Broken(f"broke off after {have} of {total} bytes")


class _Broken(Exception):
    """The transfer broke; it may be taken up again."""


def _received(answer: http.client.HTTPResponse) -> bytes:
    """The next bytes; a failure of the network is told apart from one of the disk."""
    try:
        return answer.read1(BLOCK_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise _Broken(str(error) or type(error).__name__) from error


def _start(answer: http.client.HTTPResponse, have: int) -> int:
    """Where in the file the answer begins: a server that ignores the range sends all of it."""
    if answer.status != http.HTTPStatus.PARTIAL_CONTENT:
        return 0
    given = answer.headers.get("Content-Range", "")
    if not given.startswith(f"bytes {have}-"):
        raise _MirrorError(f"another range than asked for ({given!r})")
    return have
