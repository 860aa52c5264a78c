"""The page in a real browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sparseffn.cli import main
from sparseffn.report.comparison_report import write_comparison

from .synthetic import typed

LABEL = """<script>document.title = "x"</script> & "q" """


@pytest.fixture
def page(browser: Any, seeded: dict[str, Any], tmp_path: Path) -> Any:
    """The browser with the page of a comparison in which one label is hostile."""
    seeded["methods"][3]["label"] = LABEL
    _, path = write_comparison(typed(seeded), tmp_path)
    browser.get(path.as_uri())
    return browser


def test_continuous_integration_demands_the_browser() -> None:
    """`.ci/run` sets what makes the fixture fail, not skip, where there is no browser."""
    script = (Path(__file__).parents[2] / ".ci" / "run").read_text()
    assert "\nexport CI=true\n" in script.split("make ")[0]


def test_browser_reports_nothing_and_loads_nothing(page: Any) -> None:
    """The console is empty, and the page asked for no other resource."""
    assert page.get_log("browser") == []
    assert page.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)") == []


def test_every_figure_is_visible(page: Any) -> None:
    """All nine drawings have a size, each sparse method's usage among them."""
    figures = page.find_elements("css selector", "figure svg[role=img]")
    assert len(figures) == 9
    assert all(f.is_displayed() and f.size["width"] > 300 and f.size["height"] > 150 for f in figures)
    assert len(page.find_elements("css selector", "#usage figure svg")) == 4


def cut_off(page: Any) -> list[str]:
    """Words of drawings that do not lie inside them."""
    return page.execute_script("""
        return [...document.querySelectorAll("figure svg text")].filter(text => {
            const inner = text.getBoundingClientRect(), outer = text.closest("svg").getBoundingClientRect();
            return inner.left < outer.left - 1 || inner.right > outer.right + 1
                || inner.top < outer.top - 1 || inner.bottom > outer.bottom + 1;
        }).map(text => text.textContent)""")


def test_no_text_of_a_figure_is_cut_off(page: Any) -> None:
    """Every word of a drawing lies inside it."""
    assert cut_off(page) == []


def test_hostile_label_is_shown_as_text(page: Any) -> None:
    """The label runs nothing and reads as it was written."""
    assert page.title.startswith("stdlib, preset tiny")
    assert page.find_elements("css selector", "script") == []
    labels = page.find_elements("css selector", "#results tbody th")
    assert labels[3].text == LABEL.strip()


@pytest.mark.parametrize("width", [380, 1200], ids=["narrow", "wide"])
def test_page_fits_the_window(page: Any, width: int) -> None:
    """Only the tables scroll sideways, inside their own frame."""
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
    )
    assert page.execute_script("return document.documentElement.scrollWidth") <= width


def test_print_shows_the_whole_table(page: Any) -> None:
    """On paper nothing scrolls, so nothing may stick out."""
    # The text width of A4 with the margins of the page's style sheet, in CSS pixels.
    metrics = {"width": 687, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    widths = page.execute_script("return [...document.querySelectorAll('table')].map(t => t.getBoundingClientRect().right)")
    assert max(widths) <= 687


def test_page_of_a_real_comparison(browser: Any, tmp_path: Path) -> None:
    """Twelve steps of four methods by the command itself: nothing in the console, every figure there and whole."""
    (tmp_path / "song.txt").write_text("".join(f"{i} <b>bottles</b> & more\n" for i in range(900)))
    words = ["compare", "--methods", "dense", "topk", "k=64", "pkm", "sigma-moe", "--corpus", "text"]
    words += ["--data-dir", str(tmp_path / "song.txt"), "--steps", "12", "--batch", "2", "--context", "16"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    browser.get((tmp_path / "out" / "page.html").as_uri())
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    names = [figure.get_attribute("id") for figure in browser.find_elements("css selector", "figure")]
    drawn = ("curves-steps", "curves-time", "usage-1", "usage-2", "usage-3", "active-0", "cooccurrence-3")
    assert names == [f"figure-{name}" for name in drawn]
    drawings = browser.find_elements("css selector", "figure svg[role=img]")
    assert len(drawings) == len(drawn)
    assert all(d.is_displayed() and d.size["width"] > 300 and d.size["height"] > 150 for d in drawings)
    assert cut_off(browser) == []
    rows = [row.text.split("\n")[0] for row in browser.find_elements("css selector", "#results tbody tr")]
    assert [row.split()[0] for row in rows] == ["dense", "topk", "pkm", "sigma-moe"]
    # Every number is there; only what has no meaning for a method is a dash.
    cells = [row.find_elements("css selector", "td") for row in browser.find_elements("css selector", "#results tbody tr")]
    assert [[c.text for c in row].count("\u2013") for row in cells] == [1, 1, 1, 0]
