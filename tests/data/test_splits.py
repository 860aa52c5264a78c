"""Splits are disjoint, complete, 90/5/5, and decided by names and sizes alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseffn.data import splits
from sparseffn.data.splits import SPLITS, Piece, Source, SourceFile, split_by_cutting, split_by_hash
from sparseffn.data.tokenizing import content_digest
from sparseffn.errors import UserError


def pieces_of(sizes: list[int]) -> list[Piece]:
    """Pieces of files that need not exist."""
    files = [SourceFile(Path(f"/none/{i}"), f"{i}", size, 0, 0) for i, size in enumerate(sizes)]
    return [Piece.whole(file) for file in files]


def cut(path: Path) -> dict[str, bytes]:
    """Bytes of every split of a file that is cut."""
    source = Source(corpus="text", pieces=split_by_cutting([SourceFile.at(path, path.name)]))
    return {split: b"".join(block.data for block in source.blocks(split)) for split in SPLITS}


class TestByHash:
    @given(st.lists(st.integers(0, 1000), max_size=60))
    def test_every_piece_is_in_one_split(self, sizes: list[int]) -> None:
        """Nothing is lost or doubled, and the held-out splits stay under 5%."""
        pieces = pieces_of(sizes)
        split = split_by_hash(pieces)
        assert sorted(p.file.label for s in SPLITS for p in split[s]) == sorted(p.file.label for p in pieces)
        for name in ("valid", "test"):
            assert sum(p.n_bytes for p in split[name]) <= 0.05 * sum(sizes)

    @given(st.permutations(list(range(40))))
    def test_the_order_of_discovery_does_not_matter(self, order: list[int]) -> None:
        """File systems list folders in any order."""
        pieces = pieces_of([10 + i for i in range(40)])
        assert split_by_hash([pieces[i] for i in order]) == split_by_hash(pieces)

    def test_splits_are_sorted_by_path(self) -> None:
        """So that neighbours in a folder stay neighbours."""
        split = split_by_hash(pieces_of([10] * 100))
        assert [len(split[s]) for s in SPLITS] == [90, 5, 5]
        assert all([p.file.label for p in split[s]] == sorted(p.file.label for p in split[s]) for s in SPLITS)


class TestByCutting:
    def test_cuts_are_at_line_ends_where_one_is_near(self, book: Path) -> None:
        """The three parts are the file, each ends a line."""
        parts = cut(book)
        assert b"".join(parts[s] for s in SPLITS) == book.read_bytes()
        assert all(part.endswith(b"\n") for part in parts.values())
        assert len(parts["valid"]) / book.stat().st_size == pytest.approx(0.05, abs=0.01)
        assert len(parts["test"]) / book.stat().st_size == pytest.approx(0.05, abs=0.01)

    @pytest.mark.parametrize("character", ["a", "é", "日", "\U0001f600"], ids=["1-byte", "2-byte", "3-byte", "4-byte"])
    @pytest.mark.parametrize("n", [101, 1003, 20_001])
    def test_cuts_in_one_line_are_between_characters(self, tmp_path: Path, character: str, n: int) -> None:
        """No character is torn apart."""
        path = tmp_path / "line"
        path.write_text("x" + character * n)
        parts = cut(path)
        assert "".join(parts[s].decode() for s in SPLITS) == path.read_text()

    @pytest.mark.parametrize("size", [0, 1, 2, 7, 19, 20, 21])
    def test_tiny_files_are_complete(self, tmp_path: Path, size: int) -> None:
        """Also where a split stays empty."""
        path = tmp_path / "tiny"
        path.write_bytes(bytes(range(0x80, 0x80 + size)))
        assert b"".join(cut(path)[s] for s in SPLITS) == path.read_bytes()


class TestReading:
    @given(block=st.integers(1, 40))
    def test_blocks_end_at_line_ends_and_join_to_the_text(self, tmp_path_factory: pytest.TempPathFactory, block: int):
        """Whatever the block size; offsets say where a block is from."""
        path = tmp_path_factory.mktemp("blocks") / "file"
        path.write_bytes(text := b"a\nbcd\n\n" * 9 + b"end")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(splits, "BLOCK_BYTES", block)
            pieces = {"train": [Piece.whole(SourceFile.at(path, "file"))], "valid": [], "test": []}
            blocks = list(Source(corpus="text", pieces=pieces).blocks("train"))
        assert b"".join(b.data for b in blocks) == text
        assert all(b.data.endswith(b"\n") for b in blocks[:-1])
        assert all(text[b.offset :].startswith(b.data) for b in blocks)

    def test_a_file_that_lacks_its_last_line_end_gets_one_before_the_next(self, tmp_path: Path) -> None:
        """Words of two files never run together; the last file stays as it is."""
        for name in "ab":
            (tmp_path / name).write_text(name)
        pieces = [Piece.whole(SourceFile.at(tmp_path / name, name), b"# " + name.encode() + b"\n") for name in "ab"]
        source = Source(corpus="text", pieces={"train": pieces, "valid": [], "test": []})
        assert b"".join(b.data for b in source.blocks("train")) == b"# a\na\n# b\nb"

    def test_a_file_that_grew_is_reported(self, book: Path) -> None:
        """Between finding and reading."""
        source = Source(corpus="text", pieces=split_by_cutting([SourceFile.at(book, "book")]))
        book.write_text("short")
        with pytest.raises(UserError, match=r"must not change while they are read; .*book\.txt.*; fix: run again"):
            content_digest(source)

    def test_a_file_that_vanished_is_reported(self, book: Path) -> None:
        """With its path."""
        source = Source(corpus="text", pieces=split_by_cutting([SourceFile.at(book, "book")]))
        book.unlink()
        with pytest.raises(UserError, match=r"must be readable; got '.*book\.txt'"):
            list(source.blocks("train"))
