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
from functools import partial
from pathlib import Path
from typing import IO

from sparseffn.errors import UserError

# The largest member of any known archive, the training text of WikiText-103, has 541 MB.
MAX_MEMBER_BYTES = 1 << 30
# Bytes of a tar file that are read while its members are looked for: a compressed one may hold any number of zeros.
MAX_TAR_BYTES = 1 << 32
BLOCK_BYTES = 1 << 20
_ANOTHER = "it is another archive than its name says; get the published one"
# None: no plain file.
_Opened = IO[bytes] | gzip.GzipFile | None
# Path of a member and what opens it, before the next one comes.
_Members = Generator[tuple[str, Callable[[], _Opened]], None, None]
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
    wanted = {path.removeprefix("./"): name for path, name in members.items()}
    try:
        with contextlib.closing(_members(archive, list(wanted))) as found:
            for path, opened in found:
                if name := wanted.pop(path.removeprefix("./"), None):
                    assert Path(name).name == name, f"{name!r} must be a file's name alone"
                    _copy(opened(), folder / name, max_bytes, path, archive)
                if not wanted:
                    return
    except _DAMAGE as error:
        raise UserError(f"an archive must be whole; got {str(archive)!r} ({error}); fix: remove it and get it again") from error
    raise UserError(
        f"an archive must hold {', '.join(members)}; got {str(archive)!r} without {', '.join(wanted)}; fix: {_ANOTHER}"
    )


def _members(archive: Path, wanted: list[str]) -> _Members:
    with archive.open("rb") as stream:
        head = stream.read(8)
    if head.startswith(b"PK"):
        with zipfile.ZipFile(archive) as file:
            for info in file.infolist():
                yield info.filename, partial(_open_zipped, file, info)
    elif _is_tar(archive):
        with tarfile.open(archive, "r:*") as file:
            for info in file:
                if info.offset_data + info.size > MAX_TAR_BYTES:
                    raise _too_large(archive.name, MAX_TAR_BYTES)
                yield info.name, partial(file.extractfile, info) if info.isreg() else lambda: None
    elif head.startswith(b"\x1f\x8b") and len(wanted) == 1:
        yield wanted[0], partial(gzip.open, archive, "rb")
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


def _open_zipped(file: zipfile.ZipFile, info: zipfile.ZipInfo) -> _Opened:
    plain = not (info.is_dir() or stat.S_ISLNK(info.external_attr >> 16) or info.flag_bits & 1)
    return file.open(info) if plain else None


def _copy(opened: _Opened, place: Path, max_bytes: int, path: str, archive: Path) -> None:
    if opened is None:
        raise UserError(
            f"a member of an archive must be a plain file; got {path} in {str(archive)!r}, a link, folder or encrypted; "
            f"fix: {_ANOTHER}"
        )
    written = 0
    with opened, place.open("xb") as file:
        while block := opened.read(BLOCK_BYTES):
            written += len(block)
            if written > max_bytes:
                raise _too_large(f"{path} in {archive.name}", max_bytes)
            file.write(block)


def _too_large(what: str, max_bytes: int) -> UserError:
    return UserError(
        f"an archive must not unpack to more than {max_bytes} bytes a member; got more from {what}; fix: {_ANOTHER}"
    )
