"""docs/results.md says what results/ says."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

from sparseffn.report.paper_result import read_paper_table
from sparseffn.report.paper_settings import build_table
from sparseffn.report.paper_table import paper_markdown
from sparseffn.stored import read_json, write_json

ROOT = Path(__file__).resolve().parents[3]
EVIDENCE = ROOT / "results" / "evidence"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """tools/evidence_tables.py."""
    spec = importlib.util.spec_from_file_location("evidence_tables", ROOT / "tools" / "evidence_tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_page_holds_what_the_results_say(tool: ModuleType) -> None:
    """Made anew, every block is the one on the page; a figure that was edited by hand is found."""
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert tool.with_evidence(text) == text
    assert {match[2] for match in tool.BLOCK.finditer(text)} == set(tool.BLOCKS)
    for block in tool.BLOCK.finditer(text):
        edited = text[: block.start()] + re.sub(r"\d\.\d", "7.7", block[0]) + text[block.end() :]
        assert edited != text and tool.with_evidence(edited) == text


def test_page_follows_the_results(tool: ModuleType, tmp_path: Path) -> None:
    """Another mean in the JSON is another figure on the page, in its block alone."""
    text, results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8"), tmp_path / "results"
    shutil.copytree(ROOT / "results", results)
    table = read_json(results / "evidence" / "table3.json", fix="")
    table["cells"][0]["mean"] = 9.876
    write_json(results / "evidence" / "table3.json", table)
    changed = tool.with_evidence(text, results)
    assert "9.876" in changed and "9.876" not in text
    assert tool.BLOCK.sub("", changed) == tool.BLOCK.sub("", text)


@pytest.mark.parametrize("path", sorted(EVIDENCE.glob("table*.json")), ids=lambda path: path.stem)
def test_markdown_is_that_of_the_json(path: Path) -> None:
    """Both were written by one command."""
    assert path.with_suffix(".md").read_text(encoding="utf-8") == paper_markdown(build_table(read_paper_table(path)))


@pytest.mark.parametrize(
    ("mean", "n_seeds", "scatter", "found", "words"),
    [
        (0.1, 1, 0.01, {"decided": True}, "worse, as far as one seed can say"),
        (0.01, 1, 0.01, {"decided": True}, "undecided"),
        (-0.1, 1, None, None, "undecided"),
        (-0.1, 2, 0.01, {"decided": False}, "undecided"),
        (-0.01, 2, 0.01, {"decided": True}, "better"),
        (0.015, 2, 0.01, None, "worse"),
    ],
    ids=["far", "near", "no-scatter", "interval-holds-zero", "interval-excludes-zero", "no-interval"],
)
def test_verdict_of_one_seed_is_not_its_interval(
    tool: ModuleType, mean: float, n_seeds: int, scatter: float | None, found: dict[str, bool] | None, words: str
) -> None:
    """Which covers the text alone; several seeds decide by theirs."""
    assert tool.verdict(mean, n_seeds, scatter, found) == words
