"""The cache is whole or absent, verified when opened, and used instead of the source."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sparseffn.data import SPLITS, Corpus, Tokenizer, load_corpus, tokenizing
from sparseffn.data.cache import Encoded, TokenCache, token_dtype
from sparseffn.data.splits import Source, Split
from sparseffn.data.tokenizers import BytesTokenizer
from sparseffn.errors import UserError
from sparseffn.storage import default_cache_dir


def token_folder(cache: Path) -> Path:
    """The only folder of tokens."""
    (folder,) = (cache / "tokens").iterdir()
    return folder


def zeros(split: Split) -> Iterator[tuple[np.ndarray, int]]:
    """Ten zeros a split."""
    yield np.zeros(10, np.uint8), 10


def prepare_together(book: Path, cache: Path, together: threading.Barrier, found: multiprocessing.SimpleQueue[str]) -> None:
    """For another process: all tokens are written before anybody's folder gets its name."""
    encode = tokenizing._encoded

    def encoded(source: Source, tokenizer: Tokenizer, content: str) -> Encoded:
        tokens = encode(source, tokenizer, content)

        def waited(split: Split) -> Iterator[tuple[np.ndarray, int]]:
            yield from tokens(split)
            if split == SPLITS[-1]:
                together.wait(timeout=60)

        return waited

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizing, "_encoded", encoded)
        found.put(load_corpus("text", data_dir=book, cache_dir=cache).digest)


class TestReopening:
    def test_a_prepared_corpus_is_opened_without_reading_it(self, book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Names, sizes and times show that the text is the same."""
        first = load_corpus("text", data_dir=book)

        def refuse(self: Source, split: Split) -> None:
            raise AssertionError("the corpus was read again")

        monkeypatch.setattr(Source, "blocks", refuse)
        again = load_corpus("text", data_dir=book)
        assert again.info == first.info
        assert np.array_equal(again.train, first.train)

    def test_tokens_are_memory_mapped_and_read_only(self, book: Path) -> None:
        """A corpus larger than memory can be used, and not be spoiled."""
        train = load_corpus("text", data_dir=book).train
        assert isinstance(train, np.memmap)
        assert not train.flags.writeable

    def test_the_same_text_elsewhere_shares_the_tokens(self, book: Path, tmp_path: Path, cache_dir: Path) -> None:
        """The key is the content."""
        (tmp_path / "copy").write_bytes(book.read_bytes())
        load_corpus("text", data_dir=book)
        load_corpus("text", data_dir=tmp_path / "copy")
        assert token_folder(cache_dir)

    def test_a_cache_that_cannot_be_written_still_serves(
        self, book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Tokens that are there are used, though the note cannot be made."""
        first = load_corpus("text", data_dir=book)
        (tmp_path / "copy").write_bytes(book.read_bytes())

        def refuse(self: Path, *args: object, **kwargs: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "mkdir", refuse)
        assert load_corpus("text", data_dir=tmp_path / "copy").digest == first.digest

    @pytest.mark.parametrize(
        ("size", "name"), [(256, "uint8"), (257, "uint16"), (65_536, "uint16"), (65_537, "uint32")], ids=str
    )
    def test_tokens_take_the_narrowest_type(self, size: int, name: str) -> None:
        """Little-endian, so that a cache can be copied."""
        assert token_dtype(size) == np.dtype(name).newbyteorder("<")


class TestAtomicity:
    @pytest.mark.parametrize("failing", ["train", "valid", "test"])
    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt], ids=["error", "interrupt"])
    def test_a_failure_midway_leaves_nothing(self, tmp_path: Path, failing: str, error: type[BaseException]) -> None:
        """Neither a folder under the key nor a temporary one."""
        cache = TokenCache(tmp_path)

        def encoded(split: Split) -> Iterator[tuple[np.ndarray, int]]:
            yield from zeros(split)
            if split == failing:
                raise error("midway")

        with pytest.raises(error, match="midway"):
            cache.store("key", BytesTokenizer(), encoded, "content")
        assert not list((tmp_path / "tokens").iterdir())
        assert cache.open("key") is None

    def test_nothing_is_visible_before_it_is_whole(self, tmp_path: Path) -> None:
        """While tokens are written, the key does not exist."""
        cache = TokenCache(tmp_path)

        def encoded(split: Split) -> Iterator[tuple[np.ndarray, int]]:
            yield from zeros(split)
            assert cache.open("key") is None
            assert all(path.name.startswith(".") for path in (tmp_path / "tokens").iterdir())

        assert len(cache.store("key", BytesTokenizer(), encoded, "content").tokens["train"]) == 10

    def test_who_comes_second_uses_the_first_ones(self, tmp_path: Path) -> None:
        """The folder that was there stays as it was."""
        cache = TokenCache(tmp_path)

        def encoded(split: Split) -> Iterator[tuple[np.ndarray, int]]:
            if split == "test":
                cache.store("key", BytesTokenizer(), zeros, "content")
            yield np.ones(10, np.uint8), 10

        assert cache.store("key", BytesTokenizer(), encoded, "content").tokens["train"].max() == 0
        assert [path.name for path in (tmp_path / "tokens").iterdir()] == ["key"]

    def test_two_processes_at_once_agree(self, book: Path, tmp_path: Path) -> None:
        """Neither finds the other's tokens before it has made its own; both get the corpus, one folder is left."""
        cache, spawn = tmp_path / "shared", multiprocessing.get_context("spawn")
        together, found = spawn.Barrier(2), spawn.SimpleQueue()
        workers = [spawn.Process(target=prepare_together, args=(book, cache, together, found)) for _ in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert [worker.exitcode for worker in workers] == [0, 0]
        assert found.get() == found.get() == load_corpus("text", data_dir=book).digest
        assert token_folder(cache)

    def test_many_threads_at_once_agree(self, book: Path, cache_dir: Path) -> None:
        """They start together, so that several do prepare."""
        barrier, found = threading.Barrier(8), list[Corpus]()

        def work() -> None:
            barrier.wait()
            found.append(load_corpus("text", data_dir=book))

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 8
        assert len({corpus.digest for corpus in found}) == 1
        assert token_folder(cache_dir)

    def test_text_that_changes_meanwhile_is_not_stored(
        self, book: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The tokens must be those of the digest."""
        monkeypatch.setattr(tokenizing, "content_digest", lambda source: "of other text")
        with pytest.raises(UserError, match="must not change while they are read"):
            load_corpus("text", data_dir=book)
        assert not list((cache_dir / "tokens").iterdir())


class TestDamage:
    @pytest.mark.parametrize("name", ["train.bin", "valid.bin", "test.bin", "tokenizer.json", "meta.json"])
    @pytest.mark.parametrize("how", ["truncated", "flipped", "missing", "empty"])
    def test_every_damage_is_noticed(self, book: Path, cache_dir: Path, name: str, how: str) -> None:
        """The error names the folder to delete; nothing is overwritten. (JSON ends in a line end, which may be missing.)"""
        load_corpus("text", data_dir=book, tokenizer="chars")
        path = token_folder(cache_dir) / name
        data = path.read_bytes()
        at = len(data) // 2
        damaged = {"truncated": data[:-2], "flipped": data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :], "empty": b""}
        path.unlink() if how == "missing" else path.write_bytes(damaged[how])
        with pytest.raises(UserError, match=f"fix: delete {path.parent} and run again"):
            load_corpus("text", data_dir=book, tokenizer="chars")
        assert path.exists() == (how != "missing")
        assert how == "missing" or path.read_bytes() == damaged[how]

    def test_the_remedy_works(self, book: Path, cache_dir: Path) -> None:
        """Deleting the folder has it made again."""
        first = load_corpus("text", data_dir=book).digest
        folder = token_folder(cache_dir)
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
        assert load_corpus("text", data_dir=book).digest == first

    @pytest.mark.parametrize("text", ["", "{}", "[]", "1", '{"content": "ab", "digest": "cd"}', "\udcff"])
    def test_a_damaged_note_is_noticed(self, book: Path, cache_dir: Path, text: str) -> None:
        """The note that leads from the files to the tokens."""
        load_corpus("text", data_dir=book)
        (note,) = (cache_dir / "sources").iterdir()
        note.write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(UserError, match=f"fix: delete {note} and run again"):
            load_corpus("text", data_dir=book)


class TestPlace:
    def test_the_default_follows_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """SPARSEFFN_CACHE, then XDG_CACHE_HOME, then the home folder."""
        monkeypatch.setenv("SPARSEFFN_CACHE", "/a")
        monkeypatch.setenv("XDG_CACHE_HOME", "/b")
        monkeypatch.setenv("HOME", "/c")
        assert default_cache_dir() == Path("/a")
        monkeypatch.delenv("SPARSEFFN_CACHE")
        assert default_cache_dir() == Path("/b/sparseffn")
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert default_cache_dir() == Path("/c/.cache/sparseffn")

    def test_a_place_that_cannot_be_written_is_explained(self, book: Path) -> None:
        """Here a file where the folder should be."""
        with pytest.raises(
            UserError, match=r"cannot write .*Not a directory; fix: check its rights and the disk, or pass --cache-dir PATH"
        ):
            load_corpus("text", data_dir=book, cache_dir=book)

    def test_a_full_disk_is_explained(self, book: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """And leaves nothing behind."""

        def refuse(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", refuse)
        with pytest.raises(UserError, match="No space left on device"):
            load_corpus("text", data_dir=book)
        assert not list((cache_dir / "tokens").iterdir())
