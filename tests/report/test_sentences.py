"""Sentences of the README and of docs/ that conclude something are found where the page or the results change alone."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from sparseffn.storage import read_json, write_json

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for name in ("docs", "results"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "README.md", tmp_path)
    return tmp_path


def test_every_sentence_stands_and_follows(copy: Path) -> None:
    from sentences import SENTENCES, failing

    assert failing(copy) == [] and len(SENTENCES) > 10


def test_changed_page_or_result_is_named(copy: Path) -> None:
    from sentences import failing

    page = copy / "docs" / "statistics.md"
    page.write_text(page.read_text().replace("0.612 of them", "half of them"))
    path = copy / "results" / "evidence" / "table3.json"
    table = read_json(path, fix="")
    table["cells"][0]["values"] = [value + 0.5 for value in table["cells"][0]["values"]]
    write_json(path, table)
    lines = failing(copy)
    assert sum("0.612 of them" in line and line.endswith("change tools/sentences.py with it") for line in lines) == 1
    assert sum("does not follow from results/" in line for line in lines) == 2 and len(lines) == 3
