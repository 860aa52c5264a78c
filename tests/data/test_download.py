"""Whatever servers do, what has a file's name in the end is the file."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

import pytest

from sparseffn.data.download import BLOCK_BYTES, DownloadError, PublishedFile, RemoteFile, fetch, parse_digest
from sparseffn.errors import UserError

from .loopback import Loopback

DATA = bytes(range(256)) * 4000
DIGEST = f"sha256:{hashlib.sha256(DATA).hexdigest()}"


def remote(*urls: str, digest: str | None = DIGEST, size: int | None = len(DATA), verified: bool = False) -> RemoteFile:
    """The file at some addresses."""
    return RemoteFile(file=PublishedFile(name="a.bin", digest=digest, size=size, source="a card", verified=verified), urls=urls)


def names(folder: Path) -> list[str]:
    """What is in a folder."""
    return sorted(path.name for path in folder.iterdir())


class TestTransfers:
    def test_a_file_arrives_whole(self, server: Loopback, tmp_path: Path) -> None:
        """With progress up to its end, and nothing beside it."""
        reports: list[tuple[str, int, int | None]] = []
        path = fetch(remote(server.add("a", DATA)), tmp_path, on_progress=lambda *report: reports.append(report))
        assert path.read_bytes() == DATA
        assert reports[-1] == ("a.bin", len(DATA), len(DATA))
        assert names(tmp_path) == ["a.bin"]

    def test_a_file_that_is_there_is_not_asked_for(self, server: Loopback, tmp_path: Path) -> None:
        """A second call makes no request."""
        file = remote(server.add("a", DATA))
        fetch(file, tmp_path)
        server.log.clear()
        fetch(file, tmp_path)
        assert not server.log

    def test_a_transfer_that_breaks_goes_on_where_it_stopped(self, server: Loopback, tmp_path: Path) -> None:
        """Twice; no more than a block is sent again."""
        path = fetch(remote(server.add("a", DATA, breaks=[BLOCK_BYTES + 1000, 3 * BLOCK_BYTES])), tmp_path)
        assert path.read_bytes() == DATA
        assert [asked for _, asked in server.log] == [None, f"bytes={BLOCK_BYTES}-", f"bytes={4 * BLOCK_BYTES}-"]

    def test_another_call_goes_on_where_the_last_one_stopped(self, server: Loopback, tmp_path: Path) -> None:
        """The mirror fails for good after a block; later it works."""
        url = server.add("a", DATA, breaks=[BLOCK_BYTES, 0])
        with pytest.raises(DownloadError, match=f"broke off after {BLOCK_BYTES} bytes"):
            fetch(remote(url), tmp_path)
        assert names(tmp_path) == ["a.bin.part"]
        assert fetch(remote(url), tmp_path).read_bytes() == DATA
        assert server.log[-1] == ("a", f"bytes={BLOCK_BYTES}-")

    def test_a_server_without_ranges_starts_anew(self, server: Loopback, tmp_path: Path) -> None:
        """The first bytes are not kept twice."""
        path = fetch(remote(server.add("a", DATA, breaks=[BLOCK_BYTES], ranges=False)), tmp_path)
        assert path.read_bytes() == DATA

    def test_what_was_begun_wrongly_is_begun_again(self, server: Loopback, tmp_path: Path) -> None:
        """The part left behind is of another file, or longer than this one."""
        for left in (b"something else", DATA + b"more"):
            (tmp_path / "a.bin.part").write_bytes(left)
            path = fetch(remote(server.add("a", DATA)), tmp_path)
            assert path.read_bytes() == DATA
            path.unlink()

    def test_a_finished_part_needs_no_request(self, server: Loopback, tmp_path: Path) -> None:
        """A kill came between the last byte and the name."""
        (tmp_path / "a.bin.part").write_bytes(DATA)
        fetch(remote(server.add("a", DATA)), tmp_path)
        assert not server.log and names(tmp_path) == ["a.bin"]

    def test_a_silent_server_is_given_up(self, server: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """After the timeout, not never."""
        monkeypatch.setattr("sparseffn.data.download.TIMEOUT_S", 0.1)
        held = threading.Event()
        with pytest.raises(DownloadError, match="timed out"):
            fetch(remote(server.add("a", DATA, held=held)), tmp_path)
        held.set()


class TestMirrors:
    @pytest.mark.parametrize("status", [403, 404, 500])
    def test_a_dead_mirror_falls_over_to_the_next(self, server: Loopback, tmp_path: Path, status: int) -> None:
        """And so does an address without a server."""
        urls = ("http://127.0.0.1:9/a", server.add("dead", b"", status=status), server.add("a", DATA))
        assert fetch(remote(*urls), tmp_path).read_bytes() == DATA

    def test_the_next_mirror_goes_on_where_the_last_one_broke(self, server: Loopback, tmp_path: Path) -> None:
        """Mirrors have the same bytes."""
        fetch(remote(server.add("a", DATA, breaks=[BLOCK_BYTES, 0]), server.add("b", DATA)), tmp_path)
        assert server.log[-1] == ("b", f"bytes={BLOCK_BYTES}-")

    def test_a_wrong_file_is_removed_and_the_next_mirror_asked(self, server: Loopback, tmp_path: Path) -> None:
        """Same length, other bytes."""
        urls = (server.add("wrong", DATA[::-1]), server.add("a", DATA))
        assert fetch(remote(*urls), tmp_path).read_bytes() == DATA
        assert names(tmp_path) == ["a.bin"]

    def test_every_mirror_is_named_with_its_reason(self, server: Loopback, tmp_path: Path) -> None:
        """Expected and got, whose digest it is, what to do; nothing is left behind."""
        wrong = DATA[::-1]
        urls = (server.add("dead", b"", status=404), server.add("wrong", wrong))
        with pytest.raises(DownloadError) as caught:
            fetch(remote(*urls), tmp_path)
        message, got = str(caught.value), f"sha256:{hashlib.sha256(wrong).hexdigest()}"
        assert "dead: HTTP 404" in message and DIGEST in message and "as a card says" in message
        assert f"--accept-digest {got}" in message
        assert not names(tmp_path)

    def test_an_endless_answer_is_cut(self, server: Loopback, tmp_path: Path) -> None:
        """At the published size."""
        with pytest.raises(DownloadError, match="more than the 1000 bytes"):
            fetch(remote(server.add("a", DATA, sends_length=False), size=1000), tmp_path)


class TestDigests:
    def test_an_accepted_digest_stands_for_an_unverified_one(self, server: Loopback, tmp_path: Path) -> None:
        """Not for a verified one, and not for a third file."""
        other, third = DATA[::-1], DATA[1:] + DATA[:1]
        accepted = {f"sha256:{hashlib.sha256(other).hexdigest()}"}
        url = server.add("other", other)
        assert fetch(remote(url), tmp_path, accepted=accepted).read_bytes() == other
        (tmp_path / "a.bin").unlink()
        with pytest.raises(DownloadError, match="; or get the file from another place; or put"):
            fetch(remote(url, verified=True), tmp_path, accepted=accepted)
        with pytest.raises(DownloadError, match="which nobody has verified here"):
            fetch(remote(server.add("third", third)), tmp_path, accepted=accepted)

    def test_md5_and_sha1_are_known_too(self, server: Loopback, tmp_path: Path) -> None:
        """Old corpora publish nothing else."""
        for algorithm in ("md5", "sha1"):
            digest = f"{algorithm}:{hashlib.new(algorithm, DATA).hexdigest()}"
            fetch(remote(server.add("a", DATA), digest=digest), tmp_path).unlink()
            with pytest.raises(DownloadError, match=digest):
                fetch(remote(server.add("b", DATA[1:]), digest=digest), tmp_path)

    def test_digests_are_read_as_they_are_printed(self) -> None:
        """With or without the algorithm; anything else is refused."""
        assert parse_digest(DIGEST.upper()) == parse_digest(DIGEST.partition(":")[2]) == DIGEST
        for text in ("", "abc", "md5:" + "0" * 64, "z" * 64):
            with pytest.raises(UserError, match="a digest must be md5:HEX"):
                parse_digest(text)


class TestDisk:
    def test_a_full_disk_leaves_nothing(self, server: Loopback, tmp_path: Path) -> None:
        """Not even what had arrived before."""
        (tmp_path / "a.bin.part").write_bytes(DATA[:1000])

        def refuse(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match=r"No space left on device; fix: make room"):
            patch.setattr("os.fsync", refuse)
            fetch(remote(server.add("a", DATA)), tmp_path)
        assert not names(tmp_path)

    def test_a_link_in_place_of_a_file_is_replaced(self, server: Loopback, tmp_path: Path) -> None:
        """What it points to stays as it was; a pipe in the file's place is not waited for."""
        (tmp_path / "other").write_bytes(b"mine")
        (tmp_path / "a.bin.part").symlink_to(tmp_path / "other")
        os.mkfifo(tmp_path / "a.bin")
        path = fetch(remote(server.add("a", DATA)), tmp_path)
        assert path.read_bytes() == DATA and not path.is_symlink()
        assert (tmp_path / "other").read_bytes() == b"mine"
