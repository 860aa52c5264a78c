"""Published corpora from a server on this machine, from the user's folder, and from the cache."""

from __future__ import annotations

import dataclasses
import multiprocessing
import resource
import shutil
import threading
from contextlib import AbstractContextManager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from sparseffn.data import load_corpus, prepare_corpus, registry
from sparseffn.data.corpora.enwik8 import ENWIK8
from sparseffn.data.corpora.ptb import PTB
from sparseffn.data.corpora.wikitext import WIKITEXT2, WIKITEXT103, WIKITEXT103_RAW
from sparseffn.data.published_corpus import PublishedCorpus
from sparseffn.data.splits import SPLITS, Place, Source
from sparseffn.errors import UserError
from sparseffn.storage import lock

from .loopback import Loopback
from .packed import lines, sha256, small, tarred, zipped

TEXT = bytes(range(32, 127)) * 400
WIKI = {f"wiki.{split}.tokens": lines(300, split) for split in SPLITS}
TREEBANK = {f"ptb.{split}.txt": lines(300, split) for split in SPLITS}
ZIP = zipped({"enwik8": TEXT})


@pytest.fixture
def place(cache_dir: Path) -> Place:
    """The cache alone."""
    return Place(cache_dir=cache_dir)


def enwik8(*urls: str, archive: bytes = ZIP, text: bytes = TEXT) -> PublishedCorpus:
    """`enwik8` with a small text."""
    return small(ENWIK8, {"enwik8": text}, {"enwik8.zip": archive}, {"enwik8.zip": urls})


def texts(source: Source) -> dict[str, bytes]:
    """The text of every split."""
    return {split: b"".join(block.data for block in source.blocks(split)) for split in SPLITS}


def cached(place: Place, name: str = "enwik8") -> list[str]:
    """What the cache has of a corpus, locks aside."""
    folder = place.corpus_dir(name)
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path.name != ".lock")


class TestRegistered:
    def test_enwik8_is_what_the_benchmark_says(self) -> None:
        """First 100,000,000 bytes; 90/5/5 million."""
        (file,) = ENWIK8.files
        assert (file.size, file.digest) == (100_000_000, "md5:a1fa5ffddb56f4953e226637dabbb36a")

    def test_only_what_was_seen_here_is_verified(self) -> None:
        """Penn Treebank alone."""
        assert PTB.verified
        assert not any(corpus.verified for corpus in (ENWIK8, WIKITEXT2, WIKITEXT103, WIKITEXT103_RAW))

    @pytest.mark.parametrize("corpus", [ENWIK8, PTB, WIKITEXT2, WIKITEXT103, WIKITEXT103_RAW], ids=lambda corpus: corpus.name)
    def test_every_digest_has_a_source_and_every_corpus_two_addresses(self, corpus: PublishedCorpus) -> None:
        """One mirror is none."""
        remotes = [remote for route in corpus.routes for remote in route]
        assert all(file.digest and file.source for file in (*corpus.files, *(remote.file for remote in remotes)))
        # A route is whole only where each of its files comes.
        assert sum(min(len(remote.urls) for remote in route) for route in corpus.routes) >= 2
        assert len({urlsplit(url).hostname for remote in remotes for url in remote.urls}) >= 2


class TestDownloads:
    def test_enwik8_is_cut_at_90_and_95_percent(self, server: Loopback, place: Place) -> None:
        """Unpacked, the archive is not kept; afterwards nothing is asked for."""
        source = enwik8(server.add("enwik8.zip", ZIP)).prepare(place)
        n = len(TEXT)
        assert texts(source) == {
            "train": TEXT[: n * 18 // 20],
            "valid": TEXT[n * 18 // 20 : n * 19 // 20],
            "test": TEXT[n * 19 // 20 :],
        }
        assert cached(place) == ["text/enwik8", "text/origin.json"]
        server.files.clear()
        assert texts(enwik8(f"{server.address}/enwik8.zip").prepare(place)) == texts(source)

    def test_wikitext_has_its_own_splits(self, server: Loopback, place: Place) -> None:
        """Three files in a folder of the archive."""
        archive = zipped({f"wikitext-103/{name}": data for name, data in WIKI.items()})
        urls = {"wikitext-103-v1.zip": (server.add("w", archive),)}
        source = small(WIKITEXT103, WIKI, {"wikitext-103-v1.zip": archive}, urls).prepare(place)
        assert texts(source) == {split: WIKI[f"wiki.{split}.tokens"] for split in SPLITS}

    def test_ptb_falls_over_to_the_archive(self, server: Loopback, place: Place) -> None:
        """One of the plain files is gone from its server."""
        archive = tarred({f"./simple-examples/data/{name}": data for name, data in TREEBANK.items()})
        urls = {name: (server.add(name, data),) for name, data in TREEBANK.items() if "test" not in name}
        urls |= {"ptb.test.txt": (f"{server.address}/gone",), "simple-examples.tgz": (server.add("tgz", archive),)}
        source = small(PTB, TREEBANK, {**TREEBANK, "simple-examples.tgz": archive}, urls).prepare(place)
        assert texts(source) == {split: TREEBANK[f"ptb.{split}.txt"] for split in SPLITS}
        assert [path for path in cached(place, "ptb") if path.startswith("text/")] == cached(place, "ptb")

    def test_offline_says_what_to_put_where(self, server: Loopback, place: Place) -> None:
        """And asks nobody."""
        corpus = enwik8(server.add("enwik8.zip", ZIP))
        with pytest.raises(
            UserError, match=r"pass a folder with enwik8\.zip, or the plain file enwik8 as --data-dir, or leave"
        ):
            corpus.prepare(place, offline=True)
        assert not server.log

    def test_loading_alone_downloads_nothing(self, server: Loopback, place: Place) -> None:
        """Only `prepare` does."""
        with pytest.raises(UserError, match="fix: `sparseffn data prepare --corpus enwik8`, or pass --data-dir"):
            enwik8(server.add("enwik8.zip", ZIP)).find(place)
        assert not server.log

    def test_an_accepted_digest_is_remembered(self, server: Loopback, place: Place) -> None:
        """The archive was packed anew and holds another text; after accepting it, it is the corpus."""
        other = zipped({"enwik8": TEXT[::-1]})
        corpus = enwik8(server.add("enwik8.zip", other), archive=ZIP)
        corpus = small(
            corpus,
            {"enwik8": TEXT},
            {"enwik8.zip": ZIP + bytes(len(other) - len(ZIP))},
            {"enwik8.zip": corpus.routes[0][0].urls},
        )
        with pytest.raises(UserError, match=f"--accept-digest {sha256(other)}"):
            corpus.prepare(place)
        assert b"".join(texts(corpus.prepare(place, accept=[sha256(other)])).values()) == TEXT[::-1]
        assert b"".join(texts(corpus.find(place)).values()) == TEXT[::-1]

    def test_a_right_archive_with_a_wrong_text_is_refused(self, server: Loopback, place: Place) -> None:
        """Its name promises another file; nothing half-made stays."""
        archive = zipped({"enwik8": b"short"})
        with pytest.raises(UserError, match=r"enwik8 must be the published file; got .* with 5 bytes"):
            enwik8(server.add("enwik8.zip", archive), archive=archive).prepare(place)
        assert cached(place) == ["enwik8.zip"]

    def test_an_archive_that_unpacks_without_bound_is_refused(self, server: Loopback, place: Place) -> None:
        """Nothing of it stays but the archive, nor of a process that was killed while it unpacked."""
        corpus = dataclasses.replace(enwik8(server.add("enwik8.zip", ZIP)), max_bytes=1000)
        (place.corpus_dir("enwik8") / ".writing-0123").mkdir(parents=True)
        with pytest.raises(UserError, match="must not unpack to more than 1000 bytes a member"):
            corpus.prepare(place)
        assert cached(place) == ["enwik8.zip"]
        assert not [path for path in place.corpus_dir("enwik8").iterdir() if path.is_dir()]

    def test_text_that_changed_in_the_cache_is_noticed(self, server: Loopback, place: Place) -> None:
        """With the folder to delete."""
        corpus = enwik8(server.add("enwik8.zip", ZIP))
        corpus.prepare(place)
        (place.corpus_dir("enwik8") / "text" / "enwik8").write_bytes(TEXT[::-1])
        with pytest.raises(UserError, match=r"got another enwik8; fix: delete .*text and prepare it again"):
            corpus.find(place)


class TestUsersCopy:
    @pytest.mark.parametrize("where", ["folder", "file"])
    @pytest.mark.parametrize("kind", ["plain", "archive"])
    def test_plain_files_and_archives_are_taken(self, tmp_path: Path, cache_dir: Path, where: str, kind: str) -> None:
        """From a folder that has them, or named themselves."""
        path = tmp_path / "mine" / ("enwik8" if kind == "plain" else "enwik8.zip")
        path.parent.mkdir()
        path.write_bytes(TEXT if kind == "plain" else ZIP)
        mine = Place(data_dir=path if where == "file" else path.parent, cache_dir=cache_dir)
        for _ in range(2):
            assert b"".join(texts(enwik8().find(mine)).values()) == TEXT

    @pytest.mark.parametrize("name", ["enwik8", "enwik8.zip"])
    def test_what_is_prepared_needs_no_folder_any_more(self, tmp_path: Path, cache_dir: Path, name: str) -> None:
        """The text is kept once; another text under the same name is refused."""
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / name).write_bytes(ZIP if name.endswith("zip") else TEXT)
        mine, kept = Place(data_dir=tmp_path / "mine", cache_dir=cache_dir), Place(cache_dir=cache_dir)
        for _ in range(2):
            assert b"".join(texts(enwik8().prepare(mine)).values()) == TEXT
        assert b"".join(texts(enwik8().find(kept)).values()) == TEXT
        (tmp_path / "mine" / name).unlink()
        (tmp_path / "mine" / "enwik8").write_bytes(TEXT[::-1])
        with pytest.raises(UserError, match=r"must be prepared from one text; got another one in .*; fix: delete .*text to"):
            enwik8().prepare(mine, accept=[sha256(TEXT[::-1])])

    def test_an_unpacked_folder_is_taken(self, tmp_path: Path, cache_dir: Path) -> None:
        """As the archive lays it out."""
        for name, data in WIKI.items():
            (tmp_path / "mine" / "wikitext-103").mkdir(parents=True, exist_ok=True)
            (tmp_path / "mine" / "wikitext-103" / name).write_bytes(data)
        corpus = small(WIKITEXT103, WIKI, {"wikitext-103-v1.zip": b""}, {"wikitext-103-v1.zip": ()})
        source = corpus.find(Place(data_dir=tmp_path / "mine", cache_dir=cache_dir))
        assert texts(source)["valid"] == WIKI["wiki.valid.tokens"]

    def test_another_file_is_refused_until_it_is_accepted(self, tmp_path: Path, cache_dir: Path) -> None:
        """It is the user's: it stays where it is."""
        (tmp_path / "enwik8").write_bytes(TEXT[::-1])
        mine = Place(data_dir=tmp_path, cache_dir=cache_dir)
        with pytest.raises(UserError, match=r"which nobody has verified here; fix: .*--accept-digest sha256:"):
            enwik8().find(mine)
        enwik8().prepare(mine, accept=[sha256(TEXT[::-1])])
        assert b"".join(texts(enwik8().find(mine)).values()) == TEXT[::-1]
        assert (tmp_path / "enwik8").read_bytes() == TEXT[::-1]

    def test_what_is_missing_is_named(self, tmp_path: Path, cache_dir: Path) -> None:
        """In a folder, and where there is no folder."""
        with pytest.raises(
            UserError, match=r"must have enwik8\.zip, or the plain file enwik8 in `data_dir`; got .*without enwik8"
        ):
            enwik8().find(Place(data_dir=tmp_path, cache_dir=cache_dir))
        with pytest.raises(UserError, match="which does not exist; fix: pass the --data-dir that has it"):
            enwik8().find(Place(data_dir=tmp_path / "none", cache_dir=cache_dir))

    @pytest.mark.parametrize(
        ("corpus", "files"),
        [
            (enwik8(), {"enwik8": TEXT}),
            (small(PTB, TREEBANK, {}, {}), TREEBANK),
            (small(WIKITEXT103, WIKI, {}, {}), WIKI),
        ],
        ids=["enwik8", "ptb", "wikitext103"],
    )
    def test_a_prepared_corpus_is_loaded_without_its_folder(
        self, corpus: PublishedCorpus, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """By name alone, as every command does, and from what a run notes of it."""
        monkeypatch.setitem(registry._CORPORA, corpus.name, corpus)
        mine = tmp_path / "mine"
        mine.mkdir()
        for name, data in files.items():
            (mine / name).write_bytes(data)
        prepared = prepare_corpus(corpus.name, data_dir=mine, tokenizer="bytes")
        shutil.rmtree(mine)
        assert load_corpus(corpus.name, tokenizer="bytes").digest == prepared.origin.load().digest == prepared.digest


def _prepare(
    corpus_urls: tuple[str, ...], place: Place, together: threading.Barrier, found: multiprocessing.SimpleQueue[bool]
) -> None:
    """What each of two processes does: both are at the lock before either holds it."""

    def reached(folder: Path) -> AbstractContextManager[bool]:
        together.wait(timeout=60)
        return lock(folder / ".lock")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparseffn.data.published_corpus._locked", reached)
        found.put(b"".join(texts(enwik8(*corpus_urls).prepare(place)).values()) == TEXT)


class TestTogether:
    def test_two_processes_at_once_get_one_whole_text(self, server: Loopback, place: Place) -> None:
        """The file is asked for once; the second process waits for the first one's."""
        url = server.add("enwik8.zip", ZIP)
        spawn = multiprocessing.get_context("spawn")
        together, found = spawn.Barrier(2), spawn.SimpleQueue()
        processes = [spawn.Process(target=_prepare, args=((url,), place, together, found)) for _ in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0, 0]
        assert found.get() and found.get()
        assert len(server.log) == 1
        assert cached(place) == ["text/enwik8", "text/origin.json"]

    def test_a_full_disk_leaves_no_half_unpacked_text(self, server: Loopback, place: Place) -> None:
        """No file may grow over 20 kB: the archive fits, the text does not."""
        assert len(ZIP) < 20_000 < len(TEXT)
        corpus, before = enwik8(server.add("enwik8.zip", ZIP)), resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        try:
            with pytest.raises(UserError, match=r"cannot write .*; fix: make room on the disk, or pass --cache-dir PATH"):
                corpus.prepare(place)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert cached(place) == ["enwik8.zip"]
        assert b"".join(texts(corpus.prepare(place)).values()) == TEXT
