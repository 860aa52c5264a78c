"""What comes out of an archive is what was asked for, in the folder that was named, and bounded."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest

from sparseffn.data.archives import unpack
from sparseffn.errors import UserError

from .packed import tarred, zipped


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where the members go."""
    folder = tmp_path / "outer" / "out"
    folder.mkdir(parents=True)
    return folder


def put(tmp_path: Path, data: bytes, name: str = "archive") -> Path:
    """A file with these bytes."""
    (tmp_path / name).write_bytes(data)
    return tmp_path / name


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    """A tar member that points elsewhere."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def all_files(folder: Path) -> list[str]:
    """Every file under a folder."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


@pytest.mark.parametrize("pack", [zipped, tarred])
def test_only_named_members_come_out(tmp_path: Path, out: Path, pack) -> None:
    """Under the names that were chosen; members that point outside are not written anywhere."""
    data = {"../evil": b"x", "/tmp/sparseffn-evil": b"x", "a/b/text.txt": b"text", "a/other": b"x", "../../e": b"x"}
    unpack(put(tmp_path, pack(data)), {"a/b/text.txt": "t"}, out)
    assert all_files(tmp_path) == ["archive", "outer/out/t"]
    assert (out / "t").read_bytes() == b"text"
    assert not Path("/tmp/sparseffn-evil").exists()


@pytest.mark.parametrize("pack", [zipped, tarred])
def test_a_member_with_a_path_outside_stays_inside(tmp_path: Path, out: Path, pack) -> None:
    """Its path in the archive is of no matter, even where it is asked for."""
    unpack(put(tmp_path, pack({"../../evil": b"x"})), {"../../evil": "t"}, out)
    assert all_files(tmp_path) == ["archive", "outer/out/t"]


def test_a_leading_dot_does_not_matter(tmp_path: Path, out: Path) -> None:
    """The archive of Penn Treebank has one."""
    unpack(put(tmp_path, tarred({"./simple/a": b"x"})), {"simple/a": "a"}, out)
    assert (out / "a").read_bytes() == b"x"


def test_gzip_gives_its_one_file(tmp_path: Path, out: Path) -> None:
    """Whatever it is called inside."""
    unpack(put(tmp_path, gzip.compress(b"text")), {"anything": "t"}, out)
    assert (out / "t").read_bytes() == b"text"


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
def test_tar_members_that_are_no_plain_files_are_refused(tmp_path: Path, out: Path, kind: bytes) -> None:
    """A link could show any file of the user's."""
    archive = put(tmp_path, tarred({"a": link("a", "/etc/passwd", kind)}))
    with pytest.raises(UserError, match="must be a plain file; got a in"):
        unpack(archive, {"a": "a"}, out)
    assert not all_files(out)


def test_zip_links_are_refused(tmp_path: Path, out: Path) -> None:
    """A zip archive marks them in its file modes."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        info = zipfile.ZipInfo("a")
        info.external_attr = 0o120777 << 16
        file.writestr(info, "/etc/passwd")
    with pytest.raises(UserError, match="must be a plain file; got a in"):
        unpack(put(tmp_path, stream.getvalue()), {"a": "a"}, out)


@pytest.mark.parametrize("pack", [zipped, tarred, lambda members: gzip.compress(members["a"])], ids=["zip", "tar", "gzip"])
def test_no_member_gives_more_than_the_bound(tmp_path: Path, out: Path, pack) -> None:
    """A thousand times smaller when packed; what is written by then is bounded too."""
    archive = put(tmp_path, pack({"a": b"a" * 30_000_000}))
    assert archive.stat().st_size < 100_000
    with pytest.raises(UserError, match="must not unpack to more than 1000000 bytes a member; got more from a in archive"):
        unpack(archive, {"a": "a"}, out, max_bytes=1_000_000)
    assert (out / "a").stat().st_size <= 1_000_000


def test_a_zip_that_lies_about_a_size_gives_no_more(tmp_path: Path, out: Path) -> None:
    """Both of its notes say 10 bytes; it is found damaged."""
    data = bytearray(zipped({"a": bytes(1_000_000)}))
    for at in (data.index(b"PK\x03\x04") + 22, data.index(b"PK\x01\x02") + 24):
        data[at : at + 4] = struct.pack("<I", 10)
    with pytest.raises(UserError, match="an archive must be whole"):
        unpack(put(tmp_path, bytes(data)), {"a": "a"}, out)
    assert (out / "a").stat().st_size <= 10


@pytest.mark.parametrize("pack", [zipped, tarred])
@pytest.mark.parametrize("cut", [0.5, 0.95])
def test_a_truncated_archive_is_reported(tmp_path: Path, out: Path, pack, cut: float) -> None:
    """And so is one with a changed byte."""
    data = pack({"a": bytes(range(256)) * 400, "b": bytes(range(256)) * 400})
    with pytest.raises(UserError, match="an archive must be"):
        unpack(put(tmp_path, data[: int(len(data) * cut)]), {"a": "a", "b": "b"}, out)


def test_a_changed_byte_is_reported(tmp_path: Path, out: Path) -> None:
    """By the archive's own checksum."""
    data = bytearray(zipped({"a": bytes(range(256)) * 400}))
    data[60] ^= 1
    with pytest.raises(UserError, match="an archive must be whole"):
        unpack(put(tmp_path, bytes(data)), {"a": "a"}, out)


def test_what_is_no_archive_is_reported(tmp_path: Path, out: Path) -> None:
    """A page that asks for a log-in, mostly."""
    with pytest.raises(UserError, match=r"must be a zip, tar or gzip file; got .*enwik8\.zip', which begins with b'<!DOCTY"):
        unpack(put(tmp_path, b"<!DOCTYPE html>", "enwik8.zip"), {"enwik8": "enwik8"}, out)


def test_a_zip_inside_a_tar_is_a_member(tmp_path: Path, out: Path) -> None:
    """The last one, so that its end is near the archive's: the archive is what it begins with."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as file:
        for name, data in (("a", b"text"), ("b.zip", zipped({"a": b"other"}))):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    unpack(put(tmp_path, stream.getvalue()), {"a": "a"}, out)
    assert (out / "a").read_bytes() == b"text"


@pytest.mark.parametrize("pack", [zipped, tarred])
def test_missing_members_are_named(tmp_path: Path, out: Path, pack) -> None:
    """The archive is another one than its name says."""
    with pytest.raises(UserError, match=r"must hold a, b; got .* without b; fix: it is another archive than its name says"):
        unpack(put(tmp_path, pack({"a": b"x", "c": b"x"})), {"a": "a", "b": "b"}, out)
