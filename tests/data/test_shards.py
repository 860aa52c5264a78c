"""Documents of shards come in the order of a seed, each once an epoch, and go on from a position."""

from __future__ import annotations

import gzip
import os
import random
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseffn.data import shards
from sparseffn.data.shards import ShuffledDocuments, read_local, read_remote
from sparseffn.data.streams import DocumentStreams
from sparseffn.errors import UserError

from .sharded import document, write_shard

SIZES = (5, 0, 7, 3)


def read(shard: int, skip: int) -> Iterator[str]:
    """Documents that name their shard."""
    return iter([f"{shard}-{i}" for i in range(skip, SIZES[shard])])


ALL = sorted(text for shard in range(len(SIZES)) for text in read(shard, 0))


def documents(seed: int = 0, buffer: int = 4, n_open: int = 1) -> ShuffledDocuments:
    """Fifteen documents an epoch."""
    return ShuffledDocuments(read, len(SIZES), seed=seed, buffer=buffer, n_open=n_open)


class TestOrder:
    @pytest.mark.parametrize("n_open", [1, 2, 4, 9])
    @pytest.mark.parametrize("buffer", [1, 4, 100])
    def test_every_document_comes_once_an_epoch(self, buffer: int, n_open: int) -> None:
        """Three epochs in three orders; unshuffled, a few shards may come in the same one twice."""
        found = documents(buffer=buffer, n_open=n_open)
        epochs = [[next(found) for _ in ALL] for _ in range(3)]
        assert [sorted(epoch) for epoch in epochs] == [ALL] * 3
        assert buffer == 1 or epochs[0] != epochs[1] != epochs[2]

    def test_the_order_follows_from_the_seed(self) -> None:
        """The same one twice, another one for another seed, and not the one on disk."""
        first, same, other = ([next(d) for _ in ALL] for d in (documents(1), documents(1), documents(2)))
        assert first == same != other
        assert first != ALL

    def test_open_shards_are_mixed(self) -> None:
        """With four of them open the first four documents are of the three that have any."""
        found = documents(buffer=1, n_open=4)
        assert {next(found)[0] for _ in range(3)} == {"0", "2", "3"}

    @given(taken=st.integers(0, 50), buffer=st.integers(1, 20), n_open=st.integers(1, 5), seed=st.integers(0, 5))
    @settings(deadline=None)
    def test_a_position_gives_the_same_documents(self, taken: int, buffer: int, n_open: int, seed: int) -> None:
        """Wherever it was taken, over the end of an epoch too."""
        found = documents(seed, buffer, n_open)
        for _ in range(taken):
            next(found)
        position = found.position()
        other = documents(seed, buffer, n_open)
        other.restore(position)
        assert other.position() == position
        assert [next(other) for _ in range(40)] == [next(found) for _ in range(40)]

    def test_a_position_of_other_shards_is_refused(self) -> None:
        """Their number, and their documents."""
        position = documents(n_open=2).position()
        with pytest.raises(UserError, match="a position must have 6 numbers for 4 shards; got 8"):
            documents().restore(position)
        found = ShuffledDocuments(lambda shard, skip: iter(["a", "b"][skip:]), 1, seed=0, buffer=9)
        with pytest.raises(UserError, match="the shards must be as they were; got fewer documents"):
            found.restore([0, 0, 0, 0, 0, 5])

    def test_shards_without_documents_are_refused(self) -> None:
        """Instead of looking for ever."""
        with pytest.raises(UserError, match="the shards must have documents; got none"):
            next(ShuffledDocuments(lambda shard, skip: iter(()), 2, seed=0))


NO_DOCUMENTS = {
    "no-text": b"{}",
    "list": b"[1]",
    "text": b"not json",
    "string": b'"text"',
    "null": b'{"text": null}',
    "list-as-text": b'{"text": ["a"]}',
    "half-a-pair": b'{"text": "\\ud800"}',
    "deep": b'{"text": "x", "more": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
}


class TestFiles:
    def test_a_shard_is_read_from_any_document(self, tmp_path: Path) -> None:
        """Line ends and letters of any script inside."""
        texts = ["one\ntwo", "zwölf", "三", "a line\u2028of another\x85kind"]
        write_shard(tmp_path / "a.json.gz", texts)
        for skip in range(5):
            assert list(read_local(tmp_path / "a.json.gz", skip)) == texts[skip:]

    @pytest.mark.parametrize("data", NO_DOCUMENTS.values(), ids=list(NO_DOCUMENTS))
    def test_a_line_that_is_no_document_is_reported(self, tmp_path: Path, data: bytes) -> None:
        """With its number."""
        (tmp_path / "a.json.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' + data + b"\n"))
        with pytest.raises(UserError, match=r"must be a JSON object with `text`; got .* in line 2 of .*a\.json\.gz"):
            list(read_local(tmp_path / "a.json.gz"))

    @pytest.mark.parametrize("damage", ["cut", "plain", "empty"])
    def test_a_damaged_shard_is_reported(self, tmp_path: Path, damage: str) -> None:
        """Cut short, or no gzip file."""
        write_shard(tmp_path / "a.json.gz", [document("a", i) for i in range(50)])
        data = (tmp_path / "a.json.gz").read_bytes()
        (tmp_path / "a.json.gz").write_bytes({"cut": data[:-50], "plain": b'{"text": "x"}\n', "empty": b""}[damage])
        with pytest.raises(UserError, match=r"must be a whole \.json\.gz file; got .*a\.json\.gz"):
            list(read_local(tmp_path / "a.json.gz"))

    def test_a_line_without_end_is_refused_before_it_is_held(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """An archive of a kilobyte may hold gigabytes; what is no file is not waited for."""
        monkeypatch.setattr(shards, "MAX_LINE", 1 << 16)
        (tmp_path / "a.json.gz").write_bytes(gzip.compress(b"x" * (1 << 22)))
        tracemalloc.start()
        with pytest.raises(UserError, match="a line of a shard must have at most 65536 bytes"):
            list(read_local(tmp_path / "a.json.gz"))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(UserError, match="no regular file"):
            list(read_local(tmp_path / "pipe"))

    def test_the_datasets_library_gives_the_same(self, tmp_path: Path) -> None:
        """From the beginning and from a document on."""
        pytest.importorskip("datasets")
        texts = [document("a", i) for i in range(30)]
        write_shard(tmp_path / "a.json.gz", texts)
        for skip in (0, 7):
            assert list(read_remote(str(tmp_path / "a.json.gz"), skip)) == texts[skip:]

    @pytest.mark.parametrize("at", ["opening", "reading"])
    @pytest.mark.parametrize("error", [ConnectionError("reset by peer"), LookupError("no such shard")], ids=["os", "other"])
    def test_a_network_that_fails_is_reported(self, at: str, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
        """With the address, the cause and the way out; documents that came before are given."""

        def rows() -> Iterator[dict[str, str]]:
            yield {"text": '{"text": "a"}'}
            raise error

        def load_dataset(*args: object, **kwargs: object) -> Iterator[dict[str, str]]:
            if at == "opening":
                raise error
            return rows()

        monkeypatch.setattr(shards, "_datasets", lambda: SimpleNamespace(load_dataset=load_dataset))
        texts = read_remote("https://host/a")
        if at == "reading":
            assert next(texts) == "a"
        with pytest.raises(UserError, match=rf"got {type(error).__name__} \(.*\) from https://host/a; fix: .*--data-dir"):
            next(texts)


def streams(seed: int = 0, batch: int = 3, context: int = 5) -> DocumentStreams:
    """Characters of the documents as tokens, each document ended by 0."""
    return DocumentStreams(
        documents(seed), lambda text: np.array([*map(ord, text), 0], dtype=np.int64), batch=batch, context=context
    )


class TestWindows:
    def test_windows_of_a_stream_join_without_gap(self) -> None:
        """And every stream is whole documents, one after the other."""
        windows = streams()
        inputs, targets = zip(*(windows.window(i) for i in range(20)), strict=True)
        rows = torch.cat(inputs, dim=1)
        assert torch.equal(torch.cat(targets, dim=1)[:, :-1], rows[:, 1:])
        for row in rows.tolist():
            parts = "".join(map(chr, row)).split("\0")
            assert set(parts[:-1]) <= set(ALL) and len(parts) > 5

    @pytest.mark.parametrize("taken", [0, 1, 7, 30])
    def test_a_state_gives_the_same_windows(self, taken: int) -> None:
        """Bit by bit; a copy, not a view of what goes on."""
        windows = streams(seed=3)
        for i in range(taken):
            windows.window(i)
        state = windows.state()
        other = streams(seed=3)
        expected = [windows.window(taken + i) for i in range(10)]
        other.restore(state)
        found = [other.window(taken + i) for i in range(10)]
        assert all(torch.equal(a, b) for pair in zip(expected, found, strict=True) for a, b in zip(*pair, strict=True))

    def test_windows_come_in_order(self) -> None:
        """A step that is skipped or repeated would train on other text than it says."""
        windows = streams()
        windows.window(0)
        for i in (0, 2):
            with pytest.raises(IndexError, match=f"window must be 1, the next one of a stream; got {i}"):
                windows.window(i)

    def test_a_state_of_another_batch_is_refused(self) -> None:
        """Or of a corpus on disk, which has none."""
        with pytest.raises(UserError, match="must hold 2 streams; got 3"):
            streams(batch=2).restore(streams(batch=3).state())
        with pytest.raises(UserError, match="must hold 3 streams; got 0"):
            streams().restore({})


def test_memory_does_not_grow_with_the_corpus() -> None:
    """Ten times the text, the same peak: a block of documents and what is left of each stream."""

    def synthetic(shard: int, skip: int) -> Iterator[str]:
        noise = random.Random(shard).randbytes(1000).hex()
        return (f"{shard} {i} {noise}" for i in range(skip, 500))

    def peak(n_windows: int) -> int:
        found = ShuffledDocuments(synthetic, 40, seed=0, buffer=50, n_open=4)
        windows = DocumentStreams(found, lambda text: np.frombuffer(text.encode(), np.uint8), batch=8, context=128)
        tracemalloc.start()
        for i in range(n_windows):
            windows.window(i)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    small, large = peak(200), peak(2000)
    assert large < 1.2 * small < 2_000_000
