"""Tables, drawings and pages of the benchmark, made from JSON alone."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from sparseffn.errors import UserError
from sparseffn.report.bench_plots import bench_plots, figure_plots
from sparseffn.report.bench_report import bench_page, bench_tables, machine_line, read_bench, write_bench
from sparseffn.report.plotting import write_plots
from sparseffn.report.table import Table

from .synthetic_bench import KINDS, figures_result, layer_result, typed


def cells(table: Table, row: int) -> dict[str, str]:
    """Heading to text."""
    return {column.name: cell.text for column, cell in zip(table.columns, table.rows[row].cells, strict=True)}


HOSTILE = """<script>document.title = "x"</script> & "q" """


@pytest.mark.parametrize("kind", KINDS)
def test_tables_are_rectangular_and_say_the_machine(kind: str) -> None:
    """Every row has a cell for each heading."""
    result = typed(KINDS[kind]())
    tables = bench_tables(result)
    assert tables and all(table.rows and table.title for table in tables)
    assert all(
        word in machine_line(typed(result).environment)
        for word in ("A processor", "2 threads", "mkl", "2.13.0", "32 MiB", "2026-11-24")
    )


def test_machine_line_names_packages_and_compiler() -> None:
    """Where the file has them; older ones do not."""
    result = layer_result()
    assert machine_line(typed(result).environment).count("BLAS mkl, oneDNN on, sparseffn") == 1
    result["environment"] |= {"packages": {"transformers": "5.0", "triton": "3.7"}, "compiler": "c++ 12.2"}
    assert "oneDNN on, transformers 5.0, triton 3.7, c++ 12.2, sparseffn" in machine_line(typed(result).environment)


def test_busy_machine_is_said() -> None:
    """Load beyond the processors is somebody else's work."""
    result = layer_result()
    assert "busy" not in machine_line(typed(result).environment)
    result["environment"]["load_average"] = 3.9
    assert "busy (load average 3.9 on 2 processors): measure again" in machine_line(typed(result).environment)


def test_layer_table_holds_the_ratios() -> None:
    """Against dense, share, limit and the fastest peer; what was not timed is said."""
    forward = bench_tables(typed(layer_result()))[0]
    row = cells(forward, 1)
    assert (row["layer"], row["/ dense"], row["/ dense / (K/N)"], row["x fastest HF"]) == (
        "sigma-moe",
        "0.30",
        "1.20",
        "2.50 (eager)",
    )
    assert row["weights"] == "cold" and row["/ limit"] == "1.50" and row["warm ms"] != "\u2013"
    assert forward.notes[1:] == ("not timed: hf batched_mm at 1024 tokens: it would copy 3.2 GiB",)


def test_row_faster_than_its_limit_has_a_note() -> None:
    """The limit is then not one; the speeds that it was computed from are said."""
    result = layer_result()
    result["rows"][1]["forward"]["over_limit"] = 0.71
    first, second = bench_tables(typed(result))[0].notes[:2]
    assert "100 GFLOP/s, reading 10 GB/s in one long pass" in first and first.endswith("come at 5 GB/s")
    assert second.startswith("sigma-moe at 1 tokens is faster than its limit (0.71)")


def test_figures_list_what_was_not_measured() -> None:
    """In the drawing itself, with the limit that each point met, and not in a figure that is whole."""
    time, memory = figure_plots(typed(figures_result()), 2)
    for plot in (time, memory):
        words = " ".join(
            "".join(node.itertext()) for node in ElementTree.fromstring(plot.svg).iter() if node.tag.endswith("text")
        )
        assert "4,096 (half of the memory); 2,048 (time limit)" in words
    assert "Not measured" not in figure_plots(typed(figures_result()), 9)[0].svg


def test_figure_without_points_is_not_drawn() -> None:
    """Nothing to show."""
    result = figures_result()
    result["points"] = []
    assert bench_plots(typed(result)) == []


def test_figures_are_written_as_svg_and_png(tmp_path: Path) -> None:
    """Two drawings a figure, each in both forms; the SVG stands alone, the same result gives the same bytes."""
    written = write_plots(bench_plots(typed(figures_result())), tmp_path)
    assert len(written) == 8 and all(path.stat().st_size > 2000 for path in written)
    first = {path: path.read_bytes() for path in written}
    assert first[tmp_path / "figure-2-time.png"].startswith(b"\x89PNG")
    assert ElementTree.fromstring(first[tmp_path / "figure-2-time.svg"]).tag.endswith("svg")
    assert {path: path.read_bytes() for path in write_plots(bench_plots(typed(figures_result())), tmp_path)} == first


@pytest.mark.parametrize("kind", KINDS)
def test_page_needs_no_network_and_no_drawing_library(kind: str) -> None:
    """With and without figures, nothing is loaded from elsewhere."""
    for drawn in (True, False):
        result = typed(KINDS[kind]())
        text = bench_page(result, bench_plots(result) if drawn else ())
        assert "<table" in text and "A processor" in text and f"sparseffn bench {kind}" in text
        assert not any(word in text for word in ("<script", "<link", "url(http", "src="))
        assert ("<svg" in text) == (drawn and kind in ("layer", "figures"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "must exist"),
        ("{", "must hold JSON"),
        ('{"format": 1, "kind": "poem"}', "a valid `kind`; got invalid value 'poem'"),
        ("[]", "must hold an object"),
    ],
    ids=["absent", "cut", "kind", "list"],
)
def test_other_files_are_refused(text: str | None, message: str, tmp_path: Path) -> None:
    """With the remedy."""
    path = tmp_path / "figures.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_bench(path)


def test_result_is_read_back(tmp_path: Path) -> None:
    """What was written."""
    path = tmp_path / "layer.json"
    path.write_text(json.dumps(layer_result()))
    assert read_bench(path) == typed(layer_result())


@pytest.mark.parametrize("kind", KINDS)
def test_page_opens_in_a_browser(kind: str, browser: Any, tmp_path: Path) -> None:
    """Nothing is reported or loaded, labels are text, no drawing's word is cut off, and it fits window and paper."""
    result = layer_result(HOSTILE) if kind == "layer" else KINDS[kind]()
    path, *_ = write_bench(typed(result), tmp_path)
    browser.get(path.as_uri())
    assert browser.get_log("browser") == [] and browser.find_elements("css selector", "script") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)") == []
    outside = browser.execute_script("""
        return [...document.querySelectorAll("figure svg text")].filter(text => {
            const inner = text.getBoundingClientRect(), outer = text.closest("svg").getBoundingClientRect();
            return inner.left < outer.left - 1 || inner.right > outer.right + 1
                || inner.top < outer.top - 1 || inner.bottom > outer.bottom + 1;
        }).map(text => text.textContent)""")
    assert outside == []
    metrics = {"width": 380, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 380
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {**metrics, "width": 687})
    rights = browser.execute_script("return [...document.querySelectorAll('table')].map(t => t.getBoundingClientRect().right)")
    assert max(rights) <= 687
