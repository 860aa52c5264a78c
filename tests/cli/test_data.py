"""`sparseffn data`: what there is, what is here, and what is in it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sparseffn.cli import main
from sparseffn.data import list_corpora

PTB = Path(__file__).parents[2].parent / "shared" / "data" / "ptb"


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of one's own."""
    monkeypatch.setenv("SPARSEFFN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def found(words: list[str], capsys: pytest.CaptureFixture[str], code: int = 0) -> dict:
    """What a command prints as JSON."""
    assert main(["data", *words, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The message of a command that fails."""
    assert main(["data", *words]) == 2
    return capsys.readouterr().err


def test_the_list_has_every_corpus_and_what_was_verified(capsys: pytest.CaptureFixture[str]) -> None:
    """Only what was seen here counts as verified."""
    rows = {row["corpus"]: row for row in found(["list"], capsys)}
    assert set(rows) == set(list_corpora())
    assert {name for name, row in rows.items() if row["digest"] == "verified"} == {"ptb"}
    assert all(re.search(r"@[0-9a-f]{40}$", rows[name]["addresses"][0]) for name in ("c4", "pes2o"))
    assert (rows["enwik8"]["here"], rows["enwik8"]["bytes"]) == ("no", 100_000_000)
    assert {row["here"] for row in rows.values()} == {"always", "no", "--data-dir"}
    assert len(rows["enwik8"]["addresses"]) >= 2
    assert all(len(rows[name]["addresses"]) == 1 and rows[name]["bytes"] is None for name in ("c4", "pes2o"))


def test_data_alone_is_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    """What there is comes first."""
    assert main(["data"]) == 0
    alone = capsys.readouterr().out
    assert main(["data", "list"]) == 0
    assert capsys.readouterr().out == alone
    assert (
        "\nunverified: " in alone
        and "\nverified: the digests of the plain files" in alone
        and "the revision of the repository" in alone
    )


@pytest.mark.skipif(not PTB.is_dir(), reason="needs ../shared/data/ptb beside the repository")
@pytest.mark.parametrize(("tokenizer", "vocabulary"), [("words", 10_000), ("chars", 50)])
def test_a_copy_of_ptb_is_the_published_one(tokenizer: str, vocabulary: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Its digests are checked; first lines come decoded."""
    info = found(["check", "--corpus", "ptb", "--data-dir", str(PTB), "--tokenizer", tokenizer], capsys)
    assert info["vocab_size"] == vocabulary
    assert "banknote berlitz" in info["first"]["train"]


def test_a_check_of_everything_tells_what_is_damaged(cache_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And goes on; the exit code says that something is."""
    assert [row["corpus"] for row in found(["check"], capsys)["corpora"]] == ["stdlib"]
    (cache_dir / "corpora" / "enwik8" / "text").mkdir(parents=True)
    result = found(["check"], capsys, code=1)
    assert [row["corpus"] for row in result["corpora"]] == ["stdlib"]
    assert "prepare it again" in result["failed"]["enwik8"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["prepare", "--corpus", "enwik8", "--offline"],
            "pass a folder with enwik8.zip, or the plain file enwik8 as --data-dir",
        ),
        (["prepare", "--corpus", "c4", "--offline"], "pass --data-dir PATH"),
        (["prepare", "--corpus", "enwik9"], "unknown corpus 'enwik9'; fix: did you mean 'enwik8'"),
        (["prepare", "--corpus", "stdlib", "--accept-digest", "0" * 32], "of which no digest is published"),
        (["prepare", "--corpus", "enwik8", "--accept-digest", "12"], "a digest must be md5:HEX"),
        (["check", "--corpus", "enwik8"], "`sparseffn data prepare --corpus enwik8`"),
        (["check", "--data-dir", "here"], "`--corpus` must be given with --data-dir"),
    ],
    ids=["offline", "offline-streamed", "unknown", "accept", "no-digest", "not-here", "no-corpus"],
)
def test_what_cannot_be_done_is_told_with_a_remedy(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In one line, and nothing is downloaded."""
    error = refused(words, capsys)
    assert message in error and error.count("\n") == 1


def test_an_archive_that_is_not_what_its_name_says_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A page in place of the archive."""
    (tmp_path / "enwik8.zip").write_text("<!DOCTYPE html>")
    error = refused(["prepare", "--corpus", "enwik8", "--data-dir", str(tmp_path)], capsys)
    assert "enwik8.zip must be the published file; got" in error
    accepted = error.split("--accept-digest ")[1].split()[0]
    error = refused(["prepare", "--corpus", "enwik8", "--data-dir", str(tmp_path), "--accept-digest", accepted], capsys)
    assert "an archive must be a zip, tar or gzip file" in error
