"""Archives: named members come out as plain files of given names, and nothing else does.

    unpack(Path("enwik8.zip"), {"enwik8": "enwik8"}, folder)

Destinations are chosen by the caller, so that no path in an archive matters: nothing is written outside the folder. Links,
devices and encrypted members are refused, and no member gives more than `max_bytes`. What an archive is follows from its
first bytes, not from its name.
"""

from __future__ import annotations

import contextlib
import gzip
import lzma
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Generator, Mapping
from pathlib import Path

from sparseffn.errors import UserError

# The largest member of any known archive, the training text of WikiText-103, has 541 MB.
MAX_MEMBER_BYTES = 1 << 30
# Bytes of a tar file that are read while its members are looked for: a compressed one may hold any number of zeros.
MAX_TAR_BYTES = 1 << 32
BLOCK_BYTES = 1 << 20
_ANOTHER = "it is another archive than its name says; get the published one"
# Path and contents of a member; the contents are read before the next one comes.
_Members = Generator[tuple[str, Callable[[int], bytes]], None, None]
_DAMAGE = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, EOFError, RuntimeError)


def unpack(archive: Path, members: Mapping[str, str], folder: Path, *, max_bytes: int = MAX_MEMBER_BYTES) -> None:
    """Write members of a zip or tar archive, or the contents of a gzip file, into a folder.

    Args:
        archive: the archive.
        members: path inside it -> name of the file in `folder`; for a gzip file one entry, whose path is of no matter.
        folder: where the files go; they must not be there yet.
        max_bytes: the most that one member may give.

    Raises:
        UserError: the archive is something else, is damaged, lacks a member, or a member is no plain file or too large.
    """
    wanted = {_normal(path): name for path, name in members.items()}
    try:
        with contextlib.closing(_members(archive, set(wanted))) as found:
            for path, read in found:
                name = wanted.pop(path)
                assert Path(name).name == name, f"{name!r} must be a file's name alone"
                _copy(read, folder / name, max_bytes, f"{path} in {archive.name}")
    except _DAMAGE as error:
        raise UserError(f"an archive must be whole; got {str(archive)!r} ({error}); fix: remove it and get it again") from error
    if wanted:
        raise UserError(
            f"an archive must hold {', '.join(members)}; got {str(archive)!r} without {', '.join(wanted)}; fix: {_ANOTHER}"
        )


def _normal(path: str) -> str:
    return path.removeprefix("./")


def _members(archive: Path, wanted: set[str]) -> _Members:
    """The wanted members with their contents, as they come."""
    with archive.open("rb") as stream:
        head = stream.read(8)
    if head.startswith(b"PK"):
        yield from _zip_members(archive, wanted)
    elif _is_tar(archive):
        yield from _tar_members(archive, wanted)
    elif head.startswith(b"\x1f\x8b") and len(wanted) == 1:
        with gzip.open(archive, "rb") as stream:
            yield next(iter(wanted)), stream.read
    else:
        raise UserError(
            f"an archive must be a zip, tar or gzip file; got {str(archive)!r}, which begins with {head!r}; "
            f"fix: it is not what its name says (a web page, perhaps); get the published one"
        )


def _is_tar(archive: Path) -> bool:
    try:
        return tarfile.is_tarfile(archive)
    except _DAMAGE:
        return False


def _zip_members(archive: Path, wanted: set[str]) -> _Members:
    with zipfile.ZipFile(archive) as file:
        for info in file.infolist():
            path = _normal(info.filename)
            if path not in wanted:
                continue
            if info.is_dir() or stat.S_ISLNK(info.external_attr >> 16) or info.flag_bits & 1:
                raise _not_plain(path, archive)
            wanted = wanted - {path}
            with file.open(info) as stream:
                yield path, stream.read


def _tar_members(archive: Path, wanted: set[str]) -> _Members:
    with tarfile.open(archive, "r:*") as file:
        for info in file:
            if info.offset_data + info.size > MAX_TAR_BYTES:
                raise _too_large(archive.name, MAX_TAR_BYTES)
            path = _normal(info.name)
            if path not in wanted:
                continue
            stream = file.extractfile(info) if info.isreg() else None
            if stream is None:
                raise _not_plain(path, archive)
            wanted = wanted - {path}
            yield path, stream.read
            if not wanted:
                return


def _copy(read: Callable[[int], bytes], place: Path, max_bytes: int, what: str) -> None:
    written = 0
    with place.open("xb") as file:
        while block := read(BLOCK_BYTES):
            written += len(block)
            if written > max_bytes:
                raise _too_large(what, max_bytes)
            file.write(block)


def _not_plain(path: str, archive: Path) -> UserError:
    return UserError(
        f"a member of an archive must be a plain file; got {path} in {str(archive)!r}, a link, folder or encrypted; "
        f"fix: {_ANOTHER}"
    )


def _too_large(what: str, max_bytes: int) -> UserError:
    return UserError(
        f"an archive must not unpack to more than {max_bytes} bytes a member; got more from {what}; fix: {_ANOTHER}"
    )
