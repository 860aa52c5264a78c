"""Verdicts on claims, and docs/results.md, which says what results/ says."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from sparseffn.paper.claims import DENSE, RELEASED_FORMS, ROW_CLAIMS, Measured, collapse, decide, difference, stated_claims
from sparseffn.paper.evidence import STAGES
from sparseffn.report.evidence_page import TABLES, evidence_blocks
from sparseffn.report.generated_blocks import BLOCK, with_blocks
from sparseffn.report.paper_report import paper_markdown, read_paper_table
from sparseffn.report.paper_view import paper_report
from sparseffn.results.bench_result import LayerResult
from sparseffn.results.evidence_result import ClaimsResult
from sparseffn.results.table_result import Cell, TableResult
from sparseffn.stats import Difference
from sparseffn.storage import read, read_json, write_json

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results"
PAGE = ROOT / "docs" / "results.md"


def tables(results: Path = RESULTS) -> list[TableResult]:
    """Those of the evidence."""
    return [read(results / "evidence" / f"{name}.json", TableResult, fix="") for name in TABLES]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Of the results, to change."""
    shutil.copytree(RESULTS, tmp_path / "results")
    return tmp_path / "results"


def change_cells(results: Path, **changes: Any) -> None:
    """Of every table, in the cells of the row that they name."""
    for path in sorted((results / "evidence").glob("table*.json")):
        table = read_json(path, fix="")
        for cell in table["cells"]:
            cell |= changes.get(table["rows"][cell["row"]]["label"], {})
        write_json(path, table)


def test_committed_verdicts_are_those_of_the_committed_tables() -> None:
    """Whoever changes a table decides again."""
    bench = read(RESULTS / "bench-layer-paper-2-cores.json", LayerResult, fix="")
    assert read(RESULTS / "evidence" / "claims.json", ClaimsResult, fix="") == decide(tables(), bench)


def test_page_holds_what_the_results_say() -> None:
    """Made anew, every block is the one on the page; a figure that was edited by hand is found."""
    text = PAGE.read_text(encoding="utf-8")
    assert with_blocks(text, RESULTS) == text
    shown = {found[3] for found in BLOCK.finditer(text) if found[2] == "evidence"}
    assert shown == set(evidence_blocks(RESULTS / "evidence"))
    for block in BLOCK.finditer(text):
        edited = text[: block.start()] + re.sub(r"\d", "7", block[0]) + text[block.end() :]
        assert edited != text and with_blocks(edited, RESULTS) == text


def test_page_follows_the_results(copy: Path) -> None:
    """Another mean in the JSON is another figure on the page, in its block alone."""
    text = PAGE.read_text(encoding="utf-8")
    change_cells(copy, dense={"mean": 9.876})
    changed = with_blocks(text, copy)
    assert "9.876" in changed and "9.876" not in text
    assert BLOCK.sub("", changed) == BLOCK.sub("", text)


@pytest.mark.parametrize("path", sorted((RESULTS / "evidence").glob("table*.json")), ids=lambda path: path.stem)
def test_markdown_is_that_of_the_json(path: Path) -> None:
    """Both were written by one command."""
    assert path.with_suffix(".md").read_text(encoding="utf-8") == paper_markdown(paper_report(read_paper_table(path)))


def test_means_over_other_seeds_do_not_rank_rows(copy: Path) -> None:
    """The row furthest behind sigma-MoE stays last, whatever its own mean is."""
    before = _labels(evidence_blocks(copy / "evidence")["rows"])
    change_cells(copy, **{before[-1]: {"mean": 0.111}})
    block = evidence_blocks(copy / "evidence")["rows"]
    assert "0.111" in block and _labels(block) == before


def _labels(block: str) -> list[str]:
    return [line.split("|")[1].strip() for line in block.splitlines() if line.startswith("| ")][2:]


def test_every_decided_claim_is_stated_and_its_rows_are_run() -> None:
    """By the numbers of the list; by the stages of the evidence."""
    stated = {numbers for claim in stated_claims() for numbers in (claim.numbers, *claim.numbers.split(", "))}
    assert {claim.numbers for claim in decide(tables(), None).claims} <= {*stated, "-"}
    run = {row for stage in STAGES for row in stage.rows}
    for claim in (*ROW_CLAIMS, *RELEASED_FORMS):
        assert all(any(row.startswith(label) for row in run) for label, _ in (claim.row, claim.other))


def found(low: float, high: float, **changes: Any) -> Difference:
    """A difference in the middle of its interval."""
    middle = {"difference": (low + high) / 2, "low": low, "high": high, "covers_seeds": True, "n_seeds": 2, **changes}
    return Difference(decided=middle["covers_seeds"] and (low > 0 or high < 0), **middle)


def test_rows_that_no_table_compares_go_through_dense() -> None:
    """With the widths of both intervals; a released form uses its own comparison as soon as there is one."""
    released, paper = ("pkm", True), ("pkm", False)
    cell = Cell(row=0, column=0, status="counted")
    far, near = found(0.2, 0.4), found(0.0, 0.2, covers_seeds=False, n_seeds=1)
    cells = {
        released: Measured(label="released", table="table6", freedom=3, cell=structs.replace(cell, against_dense=far)),
        paper: Measured(label="paper", table="table6", freedom=3, cell=structs.replace(cell, against_dense=near)),
    }
    assert difference(cells, released, paper) == (far.less(near), True)
    direct = found(0.2, 0.3)
    cells[released] = Measured(
        label="released", table="table6", freedom=3, cell=structs.replace(cells[released].cell, against_paper_form=direct)
    )
    assert difference(cells, released, paper) == (direct, False)
    assert difference(cells, released, DENSE) == (far, False)
    cells[paper] = Measured(label="paper", table="table6", freedom=3, cell=cell)
    assert difference(cells, paper, released) == (None, False)


def test_interval_of_the_text_alone_decides_no_claim() -> None:
    """Though it lies below the margin, and below zero."""
    text_alone = found(-0.5, -0.4, covers_seeds=False)
    names = ("against_dense", "against_sigma_moe", "against_paper_form")
    changed = []
    for table in tables():
        cells = [
            structs.replace(cell, **{name: text_alone for name in names if getattr(cell, name) is not None})
            for cell in table.cells
        ]
        changed.append(structs.replace(table, cells=cells))
    claims = [claim for claim in decide(changed, None).claims if claim.difference is not None]
    assert claims and {(claim.verdict, claim.reason) for claim in claims} == {("undecided", "one seed")}


def test_verdicts_stand_after_correction_for_their_number() -> None:
    """As Holm's procedure has them, of p values that the intervals imply; a margin that was chosen later decides nothing."""
    claims = [claim for claim in decide(tables(), None).claims if claim.topic == "loss" and claim.numbers != "-"]
    equal, tested = ([c for c in claims if (c.claimed == "equal or better") == wanted] for wanted in (True, False))
    assert {(c.verdict, c.reason) for c in equal} == {("undecided", "no margin stood before the runs")}
    ordered = sorted(tested, key=lambda claim: claim.p or 1.0)
    for rank, claim in enumerate(ordered):
        assert claim.difference is not None and claim.p is not None and claim.p_corrected is not None
        assert (claim.p < 0.05) == claim.difference.decided
        assert claim.p_corrected >= min(1.0, claim.p * (len(ordered) - rank)) and (claim.verdict == "undecided") == (
            claim.p_corrected >= 0.05
        )


@pytest.mark.parametrize(
    ("loads", "verdict"),
    [
        ([(2.4, 8.0), (1.1, 4.0)], "contradicted"),
        ([(3.9, 4.0), (30.0, 32.0)], "confirmed"),
        ([(3.9, 4.0), (3.9, 32.0)], "undecided"),
        ([(1.1, 4.0), (1.2, 4.0)], "undecided"),
    ],
    ids=["none", "all", "one", "no room"],
)
def test_collapse_is_near_the_most_that_there_can_be(loads: list[tuple[float, float]], verdict: str) -> None:
    """A load says nothing without N_E / K."""
    assert collapse(loads) == verdict
