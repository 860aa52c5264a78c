"""The pages of the paper's tables and of a folder of them, as text and in a browser."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from sparseffn.errors import UserError
from sparseffn.report.paper_report import paper_page, write_index, write_paper_table
from sparseffn.report.paper_view import paper_report

from .synthetic_paper import counted_table, paper_table, settings_table, typed

HOSTILE = """<script>document.title = "x"</script> & "q" """
LONG = "softmax-" * 40


def page(result: dict[str, Any]) -> str:
    """The page's text."""
    return paper_page(paper_report(typed(result)), source="table4.json")


def hostile() -> dict[str, Any]:
    """Seven columns, texts that are markup, and a label without a space."""
    result = paper_table(n_columns=7)
    result |= {"title": f"Table {HOSTILE}", "notes": [HOSTILE], "difference_unit": HOSTILE}
    result["rows"][0] |= {"label": HOSTILE, "published_label": HOSTILE, "marks": [HOSTILE]}
    result["rows"][1] |= {"label": LONG, "published_label": LONG}
    result["columns"][0] |= {"name": HOSTILE, "corpus": HOSTILE, "sizes": LONG}
    result["columns"][1]["name"] = LONG.replace("-", "")
    result["cells"][3]["reason"] = HOSTILE
    return result


def folder_of(tmp_path: Path, **tables: dict[str, Any]) -> Path:
    """Tables as files, those whose name says so rendered."""
    for name, result in tables.items():
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(result))
        write_paper_table(path)
    return tmp_path


def test_page_says_what_the_table_says() -> None:
    """Every cell of every block, every footnote once, the same bytes for the same table."""
    result = paper_table()
    text, table = page(result), paper_report(typed(result))
    cells = [cell.text for block in table.blocks for row in block.rows for cell in row.cells[1:]]
    assert re.findall(r"<td[^>]*>([^<]*)", text.split('id="column-1"')[1].split('id="notes"')[0]) == cells
    assert re.findall(r'<li id="note-(\w+)">', text) == list(table.footnotes)
    assert set(re.findall(r'href="#note-(\w+)"', text)) == set(table.footnotes)
    assert "A processor" in text and "table4.json" in text and page(result) == text


def test_page_loads_nothing_and_marks_nothing_bold() -> None:
    """One file; a star is the only mark."""
    text = page(paper_table())
    assert not any(word in text for word in ("<script", "<link", "url(http", "src=", "<b>", "<strong"))
    assert "-0.050 [-0.070, -0.030] *" in text


def test_markup_of_a_file_is_text() -> None:
    """Nothing in a file becomes an element."""
    text = page(hostile())
    assert "<script" not in text and text.count("&lt;script&gt;") >= 8


def test_index_lists_the_tables_in_order_with_links(tmp_path: Path) -> None:
    """Table 4 before table 10; to the page where there is one, else to the file; what else lies there is passed over."""
    table10 = paper_table(n_columns=3) | {"title": "Table 10: all variants"}
    folder = folder_of(tmp_path, table10=table10, table8=settings_table(), table4=paper_table())
    (folder / "cpu runs").mkdir()
    (folder / "cpu runs" / "table7.json").write_text(json.dumps(counted_table()))
    (folder / "config.json").write_text('{"steps": 3}')
    written = write_index(folder)
    assert [path.name for path in written] == ["tables.html", "tables.md"]
    lines = [line for line in written[1].read_text().splitlines() if line.startswith("| [")]
    links = ["cpu%20runs/table7.json", "table4.html", "table8.html", "table10.html"]
    assert [re.findall(r"\]\((.*?)\)", line)[0] for line in lines] == links
    assert lines[1].split("|")[2:-1] == [f" {word} " for word in ("cpu", "paper", 7, 0, 2, 1, 2, 1, 2)]
    text = written[0].read_text()
    assert all(name in text for name in ('href="table10.html"', "2.260 ± 0.012 *", 'href="table4.html#note-d"'))
    assert all((folder / link.split("#")[0]).exists() for link in re.findall(r'href="(table[^"]*)"', text))


def test_index_names_the_tables_that_it_cannot_show(tmp_path: Path) -> None:
    """A damaged file, one of another version and what is no file are no silent gap."""
    folder = folder_of(tmp_path, table4=paper_table())
    (folder / "table5.json").write_text('{"kind": "paper-table", ')
    (folder / "table6.json").write_text(json.dumps(paper_table() | {"version": 7}))
    (folder / "table9.json").mkdir()
    html, markdown = (path.read_text() for path in write_index(folder))
    for text in (html, markdown):
        assert text.count("annot be shown: ") == 3 and all(f"table{n}.json: " in text for n in (5, 6, 9))
        assert "must hold a valid `version`; got invalid enum value 7" in text.replace("\\`", "`")
        assert str(tmp_path) not in text


def test_folder_without_a_table_is_refused(tmp_path: Path) -> None:
    """An empty page would say that there is nothing to show."""
    with pytest.raises(UserError, match="must hold tables of the paper"):
        write_index(tmp_path)
    assert list(tmp_path.iterdir()) == []


def emulate(browser: Any, width: int, *, media: str = "screen") -> None:
    """A window, or paper, of a width."""
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media})
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def test_pages_open_in_a_browser(browser: Any, tmp_path: Path) -> None:
    """Table and index of hostile texts: nothing in the console, nothing loaded, no overflow, labels as they were written."""
    folder = folder_of(tmp_path, table4=hostile(), table7=counted_table(), one=paper_table(n_columns=1, seeds=(0,)))
    write_index(folder)
    for name in ("table4", "table7", "one", "tables"):
        browser.get((folder / f"{name}.html").as_uri())
        assert browser.get_log("browser") == [] and browser.find_elements("css selector", "script") == []
        assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
        for width in (400, 1280):
            emulate(browser, width)
            assert browser.execute_script("return document.documentElement.scrollWidth") <= width, (name, width)
    browser.get((folder / "table4.html").as_uri())
    labels = browser.find_elements("css selector", "#overview tbody th span")
    assert labels[0].text.startswith(HOSTILE.strip()) and labels[1].text == LONG


def test_page_fits_paper(browser: Any, tmp_path: Path) -> None:
    """Seven columns beside each other; the text width of A4 in CSS pixels, with the margins of the style sheet."""
    folder = folder_of(tmp_path, table4=paper_table(n_columns=7))
    write_index(folder)
    for name in ("table4", "tables"):
        browser.get((folder / f"{name}.html").as_uri())
        emulate(browser, 687, media="print")
        rights = browser.execute_script(
            "return [...document.querySelectorAll('table')].map(t => t.getBoundingClientRect().right)"
        )
        assert max(rights) <= 687, name
