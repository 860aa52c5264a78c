"""docs/results.md says what results/ says."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

from sparseffn.report.paper_report import paper_markdown, read_paper_table
from sparseffn.report.paper_view import paper_report
from sparseffn.storage import read_json, write_json

ROOT = Path(__file__).resolve().parents[2]
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
    path = results / "evidence" / f"{tool.TABLES[0]}.json"
    table = read_json(path, fix="")
    table["cells"][0]["mean"] = 9.876
    write_json(path, table)
    changed = tool.with_evidence(text, results)
    assert "9.876" in changed and "9.876" not in text
    assert tool.BLOCK.sub("", changed) == tool.BLOCK.sub("", text)


@pytest.mark.parametrize("path", sorted(EVIDENCE.glob("table*.json")), ids=lambda path: path.stem)
def test_markdown_is_that_of_the_json(path: Path) -> None:
    """Both were written by one command."""
    assert path.with_suffix(".md").read_text(encoding="utf-8") == paper_markdown(paper_report(read_paper_table(path)))


def test_means_over_other_seeds_do_not_rank_rows(tool: ModuleType, tmp_path: Path) -> None:
    """The row furthest behind sigma-MoE stays last, whatever its own mean is."""
    results = tmp_path / "results"
    shutil.copytree(ROOT / "results", results)
    before = _labels(tool.BLOCKS["rows"](tool.Evidence.read(results)))
    for path in sorted((results / "evidence").glob("table*.json")):
        table = read_json(path, fix="")
        for cell in table["cells"]:
            if table["rows"][cell["row"]]["label"] == before[-1]:
                cell["mean"] = 0.111
        write_json(path, table)
    block = tool.BLOCKS["rows"](tool.Evidence.read(results))
    assert "0.111" in block and _labels(block) == before


def _labels(block: str) -> list[str]:
    return [line.split("|")[1].strip() for line in block.splitlines() if line.startswith("| ")][2:]


@pytest.mark.parametrize(
    ("claimed", "interval", "words"),
    [
        ("equal or better", (-0.03, 0.019), "confirmed"),
        ("equal or better", (0.001, 0.019), "confirmed"),
        ("equal or better", (-0.03, 0.021), "undecided"),
        ("equal or better", (0.021, 0.03), "contradicted"),
        ("better", (-0.03, -0.001), "confirmed"),
        ("better", (-0.03, 0.001), "undecided"),
        ("better", (0.001, 0.03), "contradicted"),
        ("worse", (0.001, 0.03), "confirmed"),
        ("worse", (-0.001, 0.03), "undecided"),
        ("worse", (-0.03, -0.001), "contradicted"),
        ("-", (0.001, 0.03), "differs"),
        ("-", (-0.03, -0.001), "differs"),
        ("-", (-0.001, 0.03), "undecided"),
    ],
    ids=lambda value: str(value).replace(" ", "-"),
)
def test_verdict_is_by_the_interval_and_what_is_claimed(
    tool: ModuleType, claimed: str, interval: tuple[float, float], words: str
) -> None:
    """One rule, however many seeds there are: only "equal or better" has a margin."""
    assert tool.verdict(claimed, interval) == words


def test_rows_that_no_table_compares_go_through_dense(tool: ModuleType) -> None:
    """With the widths of both intervals; a released form uses its own comparison as soon as there is one."""
    released, paper = ("pkm", True), ("pkm", False)
    cells = {
        released: {"against_dense": {"difference": 0.3, "low": 0.2, "high": 0.5, "covers_seeds": True, "n_seeds": 2}},
        paper: {"against_dense": {"difference": 0.1, "low": 0.0, "high": 0.3, "covers_seeds": False, "n_seeds": 1}},
    }
    found, through = tool.difference(cells, released, paper)
    assert through and found == pytest.approx(
        {"difference": 0.2, "low": -0.1, "high": 0.5, "covers_seeds": False, "n_seeds": 1}
    )
    cells[released]["against_paper_form"] = {"difference": 0.25, "low": 0.2, "high": 0.3, "n_seeds": 2}
    assert tool.difference(cells, released, paper) == (cells[released]["against_paper_form"], False)
    assert tool.difference(cells, released, tool.DENSE) == (cells[released]["against_dense"], False)
    cells[paper]["against_dense"] = None
    assert tool.difference(cells, paper, released) == (None, False)


def test_interval_of_the_text_alone_decides_no_claim(tool: ModuleType, tmp_path: Path) -> None:
    """Though it lies below the margin, and below zero."""
    results = tmp_path / "results"
    shutil.copytree(ROOT / "results", results)
    for path in sorted((results / "evidence").glob("table*.json")):
        table = read_json(path, fix="")
        for cell in table["cells"]:
            for found in filter(None, (cell.get(f"against_{name}") for name in ("dense", "sigma_moe", "paper_form"))):
                found |= {"low": -0.5, "high": -0.4, "decided": False, "covers_seeds": False}
        write_json(path, table)
    told = tool.BLOCKS["claims"](tool.Evidence.read(results))
    lines = [line for line in told.splitlines() if "[-0.500, -0.400]" in line]
    assert lines and all("| undecided (one seed) |" in line for line in lines)


@pytest.mark.parametrize(
    ("loads", "words"),
    [
        ([(2.4, 4.0), (1.1, 4.0)], "contradicted"),
        ([(3.9, 4.0), (30.0, 32.0)], "confirmed"),
        ([(3.9, 4.0), (3.9, 32.0)], "undecided"),
    ],
    ids=["none", "all", "one"],
)
def test_collapse_is_near_the_most_that_there_can_be(tool: ModuleType, loads: list[tuple[float, float]], words: str) -> None:
    """A load says nothing without N_E / K."""
    assert tool.collapse(loads) == words
