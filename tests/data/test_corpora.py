"""Each corpus holds what it says, splits as it says, and explains what it lacks."""

from __future__ import annotations

import json
import math
import os
import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sparseffn.data import SPLITS, CorpusOrigin, list_corpora, load_corpus, prepare_corpus, to_metric, tokenizer_class
from sparseffn.data.corpora.stdlib import EXCLUDED_FOLDERS, find_stdlib
from sparseffn.data.corpora.text import find_text
from sparseffn.errors import UserError

PTB = Path(__file__).parents[2].parent / "shared" / "data" / "ptb"


def make_files(root: Path, names: list[str], text: str = "some words\n" * 50) -> Path:
    """Files of the same text, each beginning with its name."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{name}\n{text}")
    return root


class TestStdlib:
    def test_splits_are_disjoint_and_within_one_percent(self) -> None:
        """Whole files; 90/5/5 by bytes."""
        source = find_stdlib(None)
        labels = [piece.file.label for split in SPLITS for piece in source.pieces[split]]
        assert len(labels) == len(set(labels)) > 100
        total = sum(source.n_bytes(split) for split in SPLITS)
        for split, share in zip(SPLITS, (0.9, 0.05, 0.05), strict=True):
            assert source.n_bytes(split) / total == pytest.approx(share, abs=0.01)

    def test_excluded_folders_are_absent(self) -> None:
        """Installed packages and tests are not the standard library."""
        source = find_stdlib(None)
        parts = {part for split in SPLITS for piece in source.pieces[split] for part in Path(piece.file.label).parts[:-1]}
        assert parts
        assert not parts & EXCLUDED_FOLDERS

    def test_info_names_version_digest_and_counts(self) -> None:
        """What is printed with every result, as JSON."""
        corpus = load_corpus()
        info = json.loads(json.dumps(corpus.info))
        assert info["corpus"] == "stdlib"
        assert info["digest"] == corpus.digest
        assert info["python_version"].count(".") >= 2
        for split in SPLITS:
            counts = info["splits"][split]
            assert counts["tokens"] == counts["bytes"] == corpus.n_bytes(split) == len(corpus.tokens(split))
            assert counts["files"] > 10

    def test_files_follow_their_path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Sorted, each after a comment line; whatever is no .py file is left out."""
        make_files(tmp_path / "lib", [f"{i:02}.py" for i in range(40)] + ["x.txt", "tests/t.py", "pkg/test/t.py"])
        monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "lib"))
        corpus = load_corpus("stdlib")
        texts = [corpus.tokenizer.decode(corpus.tokens(split)) for split in SPLITS]
        heads = [[line for line in text.splitlines() if line.startswith("# ")] for text in texts]
        assert all(found == sorted(found) and text.startswith("# ") for found, text in zip(heads, texts, strict=True))
        assert sorted(line for found in heads for line in found) == [f"# {i:02}.py" for i in range(40)]

    def test_a_data_folder_is_refused(self, tmp_path: Path) -> None:
        """It would have no effect."""
        with pytest.raises(UserError, match="`data_dir` must be left out for corpus 'stdlib'"):
            load_corpus("stdlib", data_dir=tmp_path)

    def test_a_python_without_source_is_explained(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Such as one in a zip file."""
        monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "none"))
        with pytest.raises(UserError, match=r"must have the standard library's \.py files; got none in"):
            load_corpus("stdlib")


class TestText:
    def test_one_file_is_cut(self, book: Path) -> None:
        """The three splits are the file."""
        corpus = load_corpus("text", data_dir=book)
        assert b"".join(corpus.tokens(split).tobytes() for split in SPLITS) == book.read_bytes()

    def test_many_files_are_split_whole(self, tmp_path: Path) -> None:
        """Each file is in one split."""
        source = find_text(make_files(tmp_path / "many", [f"{i % 3}/{i:02}.txt" for i in range(40)]))
        assert source.info["split_rule"] == "whole files by hash of path"
        assert [source.n_files(split) for split in SPLITS] == [36, 2, 2]

    @pytest.mark.parametrize("n", [3, 19, 30], ids=["few", "just-few", "not-in-5-percent"])
    def test_files_are_cut_where_whole_ones_do_not_fit(self, tmp_path: Path, n: int) -> None:
        """Fewer than 20, or 30 of which one is 3.3% and two are 6.7%."""
        source = find_text(make_files(tmp_path / "few", [f"{i}.txt" for i in range(n)]))
        assert source.info["split_rule"] == "every file cut at 90% and 95%"
        total = sum(source.n_bytes(split) for split in SPLITS)
        assert source.n_bytes("valid") / total == pytest.approx(0.05, abs=0.01)
        assert source.n_bytes("test") / total == pytest.approx(0.05, abs=0.01)

    @pytest.mark.parametrize("valid", ["valid.txt", "validation.txt"])
    def test_named_splits_are_used(self, tmp_path: Path, valid: str) -> None:
        """And other files beside them are not."""
        root = make_files(tmp_path / "named", ["train.txt", valid, "test.md", "readme.txt"], "words\n" * 300)
        corpus = load_corpus("text", data_dir=root)
        texts = [corpus.tokenizer.decode(corpus.tokens(split)[:20]) for split in SPLITS]
        assert [text.split()[0] for text in texts] == ["train.txt", valid, "test.md"]
        assert corpus.info["split_rule"] == "files named train, valid, test"

    def test_hidden_files_and_links_are_skipped(self, tmp_path: Path) -> None:
        """They are seldom meant to be text."""
        root = make_files(tmp_path / "some", ["a.txt", ".hidden", ".git/config", "sub/b.txt"])
        (root / "link").symlink_to(root / "a.txt")
        (root / "loop").symlink_to(root)
        source = find_text(root)
        assert [piece.file.label for piece in source.pieces["train"]] == ["a.txt", "sub/b.txt"]

    def test_a_missing_named_split_is_reported(self, tmp_path: Path) -> None:
        """Test text must not end up in training unnoticed."""
        root = make_files(tmp_path / "two", ["train.txt", "test.txt"])
        with pytest.raises(UserError, match=r"got no valid\.\* in '.*two'; fix: add it, or rename"):
            load_corpus("text", data_dir=root)

    @pytest.mark.parametrize("given", [None, "/no/such/place"], ids=["nothing", "nowhere"])
    def test_the_data_is_asked_for(self, given: str | None) -> None:
        """What to give, and what was given."""
        with pytest.raises(UserError, match=r"corpus 'text' must have a `data_dir` with your text.*fix: pass --data-dir"):
            load_corpus("text", data_dir=given)

    @pytest.mark.parametrize(
        "make", [lambda path: path.mkdir(), lambda path: make_files(path, [".hidden"])], ids=["empty", "hidden"]
    )
    def test_an_empty_folder_is_refused_as_empty(self, tmp_path: Path, make: Callable[[Path], object]) -> None:
        """Not as too short a text."""
        make(tmp_path / "folder")
        with pytest.raises(UserError, match=r"must have files in its `data_dir`; got '.*folder', which is empty .*fix: put"):
            load_corpus("text", data_dir=tmp_path / "folder")

    def test_pipes_and_devices_are_not_read(self, tmp_path: Path) -> None:
        """A pipe would wait for a writer, `/dev/zero` has no end."""
        os.mkfifo(tmp_path / "pipe")
        for path in (tmp_path / "pipe", Path("/dev/zero")):
            with pytest.raises(UserError, match=r"a corpus file must be a regular file; got .*; fix: save the text in a file"):
                load_corpus("text", data_dir=path)
        make_files(tmp_path, ["a.txt"])
        assert [piece.file.label for piece in find_text(tmp_path).pieces["train"]] == ["a.txt"]

    def test_chars_name_the_file_that_is_not_text(self, tmp_path: Path) -> None:
        """With the position of the first bad byte."""
        root = make_files(tmp_path / "bad", ["a.txt", "b.txt"])
        (root / "c.bin").write_bytes(b"ab\xff" * 100)
        with pytest.raises(UserError, match=r"byte 0xff at offset 2 of .*c\.bin; fix: use tokenizer=bytes"):
            load_corpus("text", data_dir=root, tokenizer="chars")


class TestSize:
    @pytest.mark.parametrize("size", [0, 100, 1099])
    def test_too_little_training_text_is_refused(self, tmp_path: Path, cache_dir: Path, size: int) -> None:
        """At once, and nothing is kept."""
        (tmp_path / "tiny").write_bytes(b"x" * size)
        with pytest.raises(UserError, match="train split of corpus 'text' must have at least 1000 tokens; got"):
            load_corpus("text", data_dir=tmp_path / "tiny")
        assert not list(cache_dir.glob("tokens/*"))

    def test_too_few_tokens_for_many_bytes_are_refused(self, tmp_path: Path, cache_dir: Path) -> None:
        """Tokens count, not bytes."""
        (tmp_path / "long").write_text(("x" * 99 + "\n") * 500)
        with pytest.raises(UserError, match="at least 1000 tokens; got 900"):
            load_corpus("text", data_dir=tmp_path / "long", tokenizer="words")
        assert not list(cache_dir.glob("tokens/*"))
        assert not list(cache_dir.glob("tokens/.*"))

    def test_an_empty_test_split_is_refused(self, tmp_path: Path) -> None:
        """There would be nothing to report."""
        root = make_files(tmp_path / "named", ["train.txt", "valid.txt"], "words\n" * 300)
        (root / "test.txt").touch()
        with pytest.raises(UserError, match="test split of corpus 'text' must have at least 2 tokens"):
            load_corpus("text", data_dir=root)


class TestPtb:
    @pytest.mark.skipif(not PTB.is_dir(), reason="needs ../shared/data/ptb beside the repository")
    def test_words_are_the_known_ten_thousand(self) -> None:
        """929,589 / 73,760 / 82,430 words, as in the literature."""
        corpus = load_corpus("ptb", data_dir=PTB)
        assert corpus.tokenizer.vocab_size == 10_000
        assert [len(corpus.tokens(split)) for split in SPLITS] == [929_589, 73_760, 82_430]
        assert corpus.unit == "word"
        assert corpus.train.dtype == np.uint16

    @pytest.mark.skipif(not PTB.is_dir(), reason="needs ../shared/data/ptb beside the repository")
    def test_characters_are_fifty(self) -> None:
        """Line end included; every byte is one."""
        corpus = load_corpus("ptb", data_dir=PTB, tokenizer="chars")
        assert corpus.tokenizer.vocab_size == 50
        assert len(corpus.test) == (PTB / "ptb.test.txt").stat().st_size

    @pytest.mark.skipif(not PTB.is_dir(), reason="needs ../shared/data/ptb beside the repository")
    def test_what_was_prepared_is_found_without_its_folder(self) -> None:
        """`data prepare --data-dir` once; then neither commands nor runs need the folder."""
        prepared = prepare_corpus("ptb", data_dir=PTB)
        assert prepared.origin == CorpusOrigin(name="ptb", tokenizer="words")
        assert load_corpus("ptb").digest == prepared.origin.load().digest == prepared.digest

    def test_missing_files_are_named(self, tmp_path: Path) -> None:
        """Which of the three are not there."""
        make_files(tmp_path, ["ptb.train.txt"])
        with pytest.raises(UserError, match=r"ptb\.train\.txt, ptb\.valid\.txt, ptb\.test\.txt.*without ptb\.valid\.txt"):
            load_corpus("ptb", data_dir=tmp_path)

    def test_the_data_is_asked_for(self) -> None:
        """Nothing is downloaded."""
        with pytest.raises(UserError, match=r"must have a `data_dir` with .*plain files ptb\.train\.txt.*got nothing"):
            load_corpus("ptb")


class TestLoad:
    def test_corpora_are_listed_with_a_line_each(self) -> None:
        """For the command line."""
        listed = list_corpora()
        assert {"stdlib", "text", "ptb"} <= set(listed)
        assert all(summary and "\n" not in summary for summary in listed.values())

    def test_unknown_corpus_offers_the_nearest(self) -> None:
        """A typing error is the usual case."""
        with pytest.raises(UserError, match="unknown corpus 'stdlb'; fix: did you mean 'stdlib'"):
            load_corpus("stdlb")

    def test_a_vocabulary_size_without_effect_is_refused(self, book: Path) -> None:
        """Only bpe has one."""
        with pytest.raises(UserError, match="`vocab_size` must be left out for tokenizer 'chars'"):
            load_corpus("text", data_dir=book, tokenizer="chars", vocab_size=100)

    def test_bpe_is_trained_on_the_training_split_alone(self, tmp_path: Path) -> None:
        """Other validation and test text gives the same model."""
        pytest.importorskip("sentencepiece")
        root = make_files(tmp_path / "named", ["train.txt", "valid.txt", "test.txt"], "many words here\n" * 300)
        first = load_corpus("text", data_dir=root, tokenizer="bpe", vocab_size=275)
        make_files(root, ["valid.txt", "test.txt"], "quite different letters\n" * 400)
        other = load_corpus("text", data_dir=root, tokenizer="bpe", vocab_size=275)
        assert first.tokenizer.digest == other.tokenizer.digest
        assert first.digest != other.digest
        assert first.tokenizer.vocab_size == 275

    def test_a_tokenizer_made_elsewhere_can_be_used(self, book: Path) -> None:
        """That of a trained model, whatever this text would give."""
        tokenizer = tokenizer_class("chars").fit([bytes(range(128))])
        corpus = load_corpus("text", data_dir=book, tokenizer=tokenizer)
        assert corpus.tokenizer.digest == tokenizer.digest
        assert corpus.tokenizer.decode(corpus.valid) in book.read_text()

    def test_the_digest_follows_text_and_tokenizer(self, book: Path, tmp_path: Path) -> None:
        """Not the place of the file."""
        moved = tmp_path / "moved"
        moved.write_bytes(book.read_bytes())
        digest = load_corpus("text", data_dir=book).digest
        assert load_corpus("text", data_dir=moved).digest == digest
        assert load_corpus("text", data_dir=book, tokenizer="chars").digest != digest
        moved.write_bytes(book.read_bytes().replace(b"line 1 ", b"LINE 1 "))
        assert load_corpus("text", data_dir=moved).digest != digest

    def test_an_edit_of_the_same_length_and_time_is_noticed(self, book: Path) -> None:
        """The system's own time of change shows it."""
        before, stat = load_corpus("text", data_dir=book), book.stat()
        book.write_bytes(book.read_bytes()[::-1])
        os.utime(book, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert load_corpus("text", data_dir=book).digest != before.digest

    def test_a_corpus_is_opened_again_from_its_origin(
        self, book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """From another working directory; where the text was moved, its new place is given."""
        pytest.importorskip("sentencepiece")
        monkeypatch.chdir(book.parent)
        corpus = load_corpus("text", data_dir=book.name, tokenizer="bpe", vocab_size=300, cache_dir="tokens")
        monkeypatch.chdir("/")
        assert corpus.origin.data_dir == str(book) and corpus.origin.cache_dir == str(tmp_path / "tokens")
        assert corpus.origin.load().digest == corpus.digest
        moved = book.rename(tmp_path / "moved.txt")
        assert corpus.origin.load(data_dir=moved, tokenizer=corpus.tokenizer).digest == corpus.digest
        with pytest.raises(UserError, match=r"got '.*book\.txt'; fix: pass --data-dir PATH"):
            corpus.origin.load()

    def test_unknown_split_is_refused(self, book: Path) -> None:
        """Names are train, valid, test."""
        corpus = load_corpus("text", data_dir=book)
        for ask in (corpus.tokens, corpus.n_bytes):
            with pytest.raises(UserError, match="unknown split 'validation'; fix: did you mean 'valid'"):
                ask("validation")


class TestMetric:
    @pytest.mark.parametrize(
        ("unit", "name", "value"),
        [
            ("byte", "bits per byte", 2.0),
            ("character", "bits per character", 2.0),
            ("word", "perplexity", 4.0),
            ("sub-word", "perplexity", 4.0),
        ],
    )
    def test_two_bits_are_a_perplexity_of_four(self, unit: str, name: str, value: float) -> None:
        """log(4) nats."""
        assert to_metric(math.log(4), unit) == (name, pytest.approx(value))

    def test_a_hopeless_perplexity_is_infinite(self) -> None:
        """Not an overflow."""
        assert to_metric(1e6, "word") == ("perplexity", math.inf)

    def test_unknown_unit_is_refused(self) -> None:
        """With the nearest name."""
        with pytest.raises(UserError, match="unknown unit 'subword'; fix: did you mean 'sub-word'"):
            to_metric(1.0, "subword")
