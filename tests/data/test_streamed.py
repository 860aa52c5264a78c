"""C4 and peS2o from a folder of shards: fixed evaluation text, a tokeniser of the training shards, training windows."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sparseffn.cli import main
from sparseffn.data import SPLITS, Place, load_corpus, prepare_corpus, registry
from sparseffn.data.corpora.c4 import C4
from sparseffn.data.corpus import open_corpus
from sparseffn.data.shards import read_local
from sparseffn.errors import UserError

from .sharded import SMALL_C4, SMALL_PES2O, document, open_small, write_shard, write_shards


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A folder with small C4 shards in the published layout."""
    return write_shards(tmp_path / "c4", SMALL_C4)


class TestStored:
    def test_test_is_the_first_documents_and_valid_the_next(self, shards: Path, cache_dir: Path) -> None:
        """Of the validation split; training tokens are not stored."""
        corpus = open_small(SMALL_C4, shards, cache_dir)
        wanted = [document("c4-validation.00000", i) + "\n\n" for i in range(40)]
        assert corpus.tokenizer.decode(corpus.test) == "".join(wanted[:20])
        assert corpus.tokenizer.decode(corpus.valid) == "".join(wanted[20:])
        assert len(corpus.train) == 0

    def test_every_validation_shard_has_its_share(self, tmp_path: Path, cache_dir: Path) -> None:
        """Those of peS2o differ in kind."""
        corpus = open_small(SMALL_PES2O, write_shards(tmp_path, SMALL_PES2O), cache_dir)
        text = corpus.tokenizer.decode(corpus.test)
        assert text.count("validation-00000 ") == text.count("validation-00001 ") == SMALL_PES2O.eval_documents

    def test_the_numbers_of_c4_are_those_of_its_card(self) -> None:
        """About 0.5% of 364,608 documents."""
        assert (C4.n_train, C4.eval_shards * C4.eval_documents) == (1024, 1823)
        assert C4.train.format(7) == "en/c4-train.00007-of-01024.json.gz"

    def test_a_flat_folder_is_the_same_corpus(self, shards: Path, tmp_path: Path, cache_dir: Path) -> None:
        """The digest does not depend on the place."""
        flat = write_shards(tmp_path / "flat", SMALL_C4, flat=True)
        assert open_small(SMALL_C4, flat, cache_dir).digest == open_small(SMALL_C4, shards, cache_dir).digest

    def test_other_shards_are_another_corpus(self, shards: Path, cache_dir: Path) -> None:
        """Some of the training shards are enough, and are counted in the result."""
        before = open_small(SMALL_C4, shards, cache_dir)
        (shards / SMALL_C4.train.format(2)).unlink()
        after = open_small(SMALL_C4, shards, cache_dir)
        assert after.digest != before.digest
        assert (before.info["train_shards"], after.info["train_shards"]) == ("4 of 4", "3 of 4")

    def test_a_changed_training_shard_is_another_corpus(self, shards: Path, cache_dir: Path) -> None:
        """Before it is read."""
        before = open_small(SMALL_C4, shards, cache_dir)
        write_shard(shards / SMALL_C4.train.format(2), [document("c4-train.00002", i) for i in range(59, -1, -1)])
        assert open_small(SMALL_C4, shards, cache_dir).digest != before.digest

    def test_every_part_of_a_shard_counts(self, tmp_path: Path, cache_dir: Path) -> None:
        """A gzip file may be several, one after the other, each of which ends with a checksum of its own."""
        digests = set()
        for letter in "AZ":
            folder = write_shards(tmp_path / letter, SMALL_C4)
            shard = folder / SMALL_C4.train.format(0)
            shard.write_bytes(gzip.compress(b'{"text": "%s"}\n' % letter.encode(), mtime=0) + shard.read_bytes())
            digests.add(open_small(SMALL_C4, folder, cache_dir).digest)
        assert len(digests) == 2

    def test_missing_shards_are_named(self, shards: Path, cache_dir: Path) -> None:
        """The validation shard, or all of training."""
        with pytest.raises(
            UserError, match=r"corpus 'c4' must have shards en/c4-train.* without en/c4-validation.*, en/c4-train"
        ):
            open_small(SMALL_C4, cache_dir, cache_dir)
        (shards / SMALL_C4.validation.format(0)).unlink()
        with pytest.raises(UserError, match=r"without en/c4-validation\.00000-of-00008\.json\.gz; fix: put them there"):
            open_small(SMALL_C4, shards, cache_dir)

    def test_a_short_validation_shard_is_reported(self, shards: Path, cache_dir: Path) -> None:
        """The subset would not be the fixed one."""
        write_shard(shards / SMALL_C4.validation.format(0), [document("v", i) for i in range(39)])
        with pytest.raises(UserError, match="must have 40 documents, half for test and half for valid; got 39"):
            open_small(SMALL_C4, shards, cache_dir)


class TestTokenizer:
    def test_bpe_is_trained_on_the_first_training_shards_alone(self, shards: Path, cache_dir: Path) -> None:
        """Other validation text and later shards give the same model, another first shard another."""
        pytest.importorskip("sentencepiece")
        first = open_small(SMALL_C4, shards, cache_dir, "bpe")
        write_shard(shards / SMALL_C4.train.format(3), ["quite different words"] * 60)
        write_shard(shards / SMALL_C4.validation.format(0), ["quite different words"] * 60)
        assert open_small(SMALL_C4, shards, cache_dir, "bpe").tokenizer.digest == first.tokenizer.digest
        write_shard(shards / SMALL_C4.train.format(1), [document("c4-train.00001", i % 9) for i in range(60)])
        assert open_small(SMALL_C4, shards, cache_dir, "bpe").tokenizer.digest != first.tokenizer.digest
        assert first.tokenizer.vocab_size == 288

    def test_the_second_time_the_shards_are_not_read(self, shards: Path, cache_dir: Path) -> None:
        """Names, sizes and times are enough: no file is opened."""
        first = open_small(SMALL_C4, shards, cache_dir)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sparseffn.data.streamed.read_local", lambda *_: pytest.fail("a shard was read"))
            assert open_small(SMALL_C4, shards, cache_dir).digest == first.digest

    @pytest.mark.parametrize("name", ["chars", "words"])
    def test_a_tokenizer_that_may_not_know_a_character_is_refused(self, shards: Path, cache_dir: Path, name: str) -> None:
        """Training text is not read beforehand."""
        with pytest.raises(UserError, match=f"must be bpe or bytes for corpus 'c4', .* got '{name}'"):
            open_small(SMALL_C4, shards, cache_dir, name)


class TestTraining:
    def test_windows_hold_the_training_documents(self, shards: Path, cache_dir: Path) -> None:
        """Of all shards, and none of validation."""
        corpus = open_small(SMALL_C4, shards, cache_dir)
        streams = corpus.training_streams(batch=2, context=64)
        rows = torch.cat([streams.window(i)[0] for i in range(250)], dim=1)
        text = "".join(corpus.tokenizer.decode(row) for row in rows.numpy())
        assert all(f"c4-train.0000{shard} " in text for shard in range(4))
        assert "validation" not in text

    def test_seeds_differ(self, shards: Path, cache_dir: Path) -> None:
        """The order is the seed's."""
        corpus = open_small(SMALL_C4, shards, cache_dir)
        first, same, other = (corpus.training_streams(batch=2, context=64, seed=seed).window(0)[0] for seed in (0, 0, 1))
        assert torch.equal(first, same) and not torch.equal(first, other)


class TestNetwork:
    def test_nothing_is_streamed_before_it_is_prepared(self, cache_dir: Path) -> None:
        """A run must not begin with gigabytes."""
        with pytest.raises(
            UserError, match=r"corpus 'c4' must have a `data_dir` with shards .*`sparseffn data prepare --corpus c4`"
        ):
            load_corpus("c4")
        with pytest.raises(UserError, match="corpus 'pes2o' must have a `data_dir`"):
            prepare_corpus("pes2o", offline=True)

    def test_what_is_prepared_of_a_streamed_corpus_is_listed_and_checked(
        self, shards: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """With the bytes of the stored text and the place that it came from; a copy in a folder prepares nothing."""
        monkeypatch.setattr("sparseffn.data.streamed.read_remote", lambda url, skip=0: read_local(Path(url), skip))
        spec = dataclasses.replace(SMALL_C4, url=str(shards))
        monkeypatch.setitem(registry._CORPORA, "c4", dataclasses.replace(spec, tokenizer="bytes"))

        def found(*words: str) -> Any:
            assert main(["data", *words, "--json"]) == 0
            rows = json.loads(capsys.readouterr().out)
            return [row for row in (rows if words == ("list",) else rows["corpora"]) if row["corpus"] == "c4"]

        open_small(spec, shards, cache_dir)
        assert (found("list")[0]["here"], found("list")[0]["bytes"], found("check")) == ("no", None, [])
        stored = sum(prepare_corpus("c4").split_bytes.values())
        (listed,), (checked,) = found("list"), found("check")
        assert (listed["here"], listed["bytes"], listed["addresses"]) == ("prepared", stored, [str(shards)])
        assert checked["source"] == str(shards) and sum(split["bytes"] for split in checked["splits"].values()) == stored

    def test_the_datasets_library_gives_the_same_corpus(self, shards: Path, cache_dir: Path) -> None:
        """Here from a folder, which it reads as it reads the hub."""
        pytest.importorskip("datasets")
        spec = dataclasses.replace(SMALL_C4, url=str(shards))
        place = Place(cache_dir=cache_dir / "other")
        remote = open_corpus(spec, place, tokenizer="bytes", network=True)
        local = open_small(SMALL_C4, shards, cache_dir)
        # The address with its revision stands for the shards there, their bytes for those here.
        assert remote.digest != local.digest
        assert all((remote.tokens(split) == local.tokens(split)).all() for split in SPLITS)
        windows = [corpus.training_streams(batch=2, context=32).window(0)[0] for corpus in (remote, local)]
        assert torch.equal(*windows)
