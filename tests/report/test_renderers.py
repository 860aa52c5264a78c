"""One table in its four forms: text stays text, a row without a result says why, wide tables repeat what names a row."""

from __future__ import annotations

import io
from html import unescape

import pytest
from rich.console import Console

from sparseffn.report import Cell, Column, Row, Table, markdown_table, print_table
from sparseffn.report.latex import latex_table
from sparseffn.report.markdown import markdown_text
from sparseffn.report.page import Page, Section, page_html

HOSTILE = "[bold]a[/bold] <script> & b|c *d* _e_ $f$ #1 {g} [h](i) \\j"


def forms(table: Table, width: int = 200) -> dict[str, str]:
    """What each renderer writes."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    print_table(table, console)
    assert isinstance(console.file, io.StringIO), "the console writes to memory"
    page = Page(title="T", summary="S", sections=(Section(name="s", title="S", tables=(table,)),), source="x.json")
    return {
        "terminal": console.file.getvalue(),
        "markdown": markdown_table(table),
        "html": page_html(page),
        "latex": latex_table(table, caption="C", label="L", footnotes=table.footnotes),
    }


def test_text_is_never_markup() -> None:
    """Heading, label, cell, footnote and note; read back, each form holds the text as it was."""
    column = Column(name=HOSTILE, is_words=True)
    rows = (Row(cells=(Cell(HOSTILE, ("a",)), Cell(HOSTILE))),)
    table = Table(title=HOSTILE, columns=(column, column), rows=rows, footnotes={"a": HOSTILE}, notes=(HOSTILE,))
    found = forms(table, width=400)
    assert found["terminal"].count(HOSTILE) == 7
    assert unescape(found["html"]).count(HOSTILE) >= 7 and "<script>" not in found["html"]
    assert "&lt;script&gt; &amp; b\\|c \\*d\\* \\_e\\_" in found["markdown"] and "[h\\](i)" in found["markdown"]
    assert "<script>" not in found["markdown"] and "\\textless{}script\\textgreater{} \\&" in found["latex"]


def test_row_without_a_result_says_why() -> None:
    """In its place; the other columns stay empty."""
    rows = (Row(cells=(Cell("dense"), Cell("1"), Cell("2"))), Row(cells=(Cell("switch"),), missing="out of memory"))
    table = Table(columns=(Column(name="method", is_words=True), Column(name="a"), Column(name="b")), rows=rows)
    found = forms(table)
    assert "| switch | out of memory |  |" in found["markdown"]
    assert "switch: out of memory" in found["terminal"]
    assert '<td class="missing start" colspan="2">out of memory</td>' in found["html"]
    assert r"switch & \multicolumn{2}{l}{out of memory} \\" in found["latex"]


def test_parts_of_a_wide_table_repeat_the_labels() -> None:
    """Both columns that name a row, in every part; no cell is lost or cut."""
    head = ("layer", "tokens", *(f"quantity {i}" for i in range(12)))
    rows = [("dense", "1,024", *(f"{i}.25" for i in range(12))), ("sigma-moe", "64", *(f"{i}.75" for i in range(12)))]
    text = forms(Table.of(head, rows, n_labels=2), width=60)["terminal"]
    n_parts = text.count(" layer ")
    assert n_parts > 1 and text.count("1,024") == text.count("sigma-moe") == n_parts
    assert all(f" {i}.25 " in text and f" {i}.75 " in text for i in range(12))
    assert max(map(len, text.splitlines())) <= 60


def test_columns_of_words_are_broken_before_a_table_is_parted() -> None:
    """A long meaning is folded beside its option."""
    rows = [("lr", "4e-3", "peak of the learning rate, reached after the warm-up " * 2)]
    text = forms(Table.of(("option", "default", "meaning"), rows, n_words=3), width=70)["terminal"]
    assert text.count("lr") >= 1 and text.count(" option ") == 1 and max(map(len, text.splitlines())) <= 70


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("N_E of n_experts", "N_E of n_experts"),
        ("0.1 [0.0, 0.2] *", "0.1 [0.0, 0.2] \\*"),
        ("_a_ b_", "\\_a\\_ b\\_"),
        ("[a](b) [c][d] [e]: f", "[a\\](b) [c\\][d] [e\\]: f"),
        ("a\n| b", "a \\| b"),
    ],
    ids=["names", "interval", "emphasis", "links", "cells"],
)
def test_markdown_escapes_what_means_something(text: str, expected: str) -> None:
    """And nothing else, so that sources stay readable."""
    assert markdown_text(text) == expected
