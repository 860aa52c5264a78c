"""The studies' page and tables agree with the committed results."""

from __future__ import annotations

import importlib.util
import json
import math
import operator
import re
import statistics
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sparseffn.errors import UserError
from sparseffn.report.formats import NOT_MEASURED
from sparseffn.report.sheet import Sheet, markdown_sheet
from sparseffn.report.study_page import read_study, study_html
from sparseffn.report.study_plots import study_plots
from sparseffn.report.study_tables import (
    TITLES,
    along,
    differences,
    half_width,
    interval,
    number,
    ranged,
    study_sheets,
    verdict,
)
from sparseffn.stats import student_quantile

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("init", "competition", "balance")


def tool() -> ModuleType:
    """tools/study_tables.py."""
    spec = importlib.util.spec_from_file_location("study_tables", ROOT / "tools" / "study_tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def committed(name: str) -> dict[str, Any]:
    """A committed result."""
    return read_study(ROOT / "results" / f"study-{name}.json")


def test_page_holds_what_the_results_say() -> None:
    """Made anew, the tables are those on the page; a figure that was edited by hand is found."""
    text = (ROOT / "docs" / "why-this-selector.md").read_text(encoding="utf-8")
    module = tool()
    assert module.with_tables(text) == text
    assert {match[2] for match in module.BLOCK.finditer(text)} == set(NAMES)
    block = next(module.BLOCK.finditer(text))
    edited = text[: block.start()] + re.sub(r"\d\.\d", "7.7", block[0]) + text[block.end() :]
    assert edited != text and module.with_tables(edited) == text


@pytest.mark.parametrize("name", NAMES)
def test_committed_results_are_whole_and_small(name: str) -> None:
    """Nothing missing, several seeds of each variant, no path of a machine."""
    result = committed(name)
    text = json.dumps(result)
    assert result["missing"] == [] and result.get("missing_sizes", []) == []
    assert {len(variant["runs"]) for variant in result["variants"]} == {result["settings"]["n_seeds"]}
    assert len(text) < 200_000 and "/home" not in text and "/tmp" not in text
    # All results that are kept, together, are to stay below 1 MB.
    assert sum(path.stat().st_size for path in (ROOT / "results").rglob("*") if path.is_file()) < 1_000_000


def test_axes_of_the_grid_share_the_base() -> None:
    """The base size stands in each of the four tables once a scheme."""
    result = committed("init")
    for axis, value in zip(("n_layers", "n_experts", "expert_size", "k"), result["settings"]["grid"]["base"], strict=True):
        rows = [row for row in along(result, axis) if row[axis] == value]
        assert len(rows) == 12


@pytest.mark.parametrize("name", NAMES)
def test_page_without_figures_has_every_table(name: str) -> None:
    """One file that loads nothing."""
    result = committed(name)
    page = study_html(result, drawn=False)
    for sheet in study_sheets(result).values():
        assert page.count(sheet.title.replace("'", "&#39;")) >= 1
    assert TITLES[f"study-{name}"] in page and f"sparseffn study {name}" in page and "<script" not in page


def test_study_cut_short_draws_what_it_has() -> None:
    """As a small budget leaves it: one size, off the axis of the depth, and no training."""
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed here")
    result = committed("init")
    n_layers = result["settings"]["grid"]["base"][0]
    start = [row for row in along(result, "n_experts") if row["n_experts"] != result["settings"]["grid"]["base"][1]]
    cut = {**result, "start": start, "variants": [{**variant, "runs": []} for variant in result["variants"]]}
    assert {row["n_layers"] for row in start} == {n_layers} and along(cut, "n_layers") == []
    assert [plot.name for plot in study_plots(cut)] == [
        f"study-init-{name}" for name in ("output-n-experts", "load-gaussian", "load-text")
    ]


def test_difference_is_paired_and_undecided_when_it_may_be_zero() -> None:
    """Only seeds that both have; 4.303 standard errors for three."""
    base = {"runs": [{"seed": s, "valid": v} for s, v in ((0, 1.0), (1, 2.0), (2, 3.0), (7, 9.0))]}
    other = {"runs": [{"seed": s, "valid": v} for s, v in ((0, 1.1), (1, 2.1), (2, 3.4))]}
    found = differences(other, base, operator.itemgetter("valid"))
    assert found == pytest.approx([0.1, 0.1, 0.4])
    assert interval(found) == "+0.2000 ± 0.4303" and verdict(found) == "undecided"
    assert verdict([0.1, 0.11, 0.1]) == "worse" and verdict([-0.1, -0.11, -0.1]) == "better"
    assert verdict([0.5]) == "undecided" and verdict([]) == NOT_MEASURED


def test_selectors_are_compared_at_the_end() -> None:
    """By their last probe, against the first variant."""
    sheet = study_sheets(committed("balance"))["selector differences"]
    base, *others = committed("balance")["variants"]
    assert [row[0] for row in sheet.rows] == [variant["name"] for variant in others]
    last = [[run["probes"][-1]["dead"] for run in variant["runs"]] for variant in (base, others[1])]
    wanted = interval([b - a for a, b in zip(*last, strict=True)])
    assert sheet.rows[1][1 + sheet.head[1:].index("dead experts")] == wanted


@pytest.mark.parametrize(("n", "quantile"), [(2, 12.7062), (10, 2.2622), (11, 2.2281), (40, 2.0227), (1001, 1.9623)])
def test_any_number_of_seeds_has_its_interval_and_verdict(n: int, quantile: float) -> None:
    """Quantiles of Student's t from tables; a difference that is plain is decided, one just within the interval is not."""
    assert student_quantile(n - 1) == pytest.approx(quantile, abs=1e-4)
    spread = [(-1.0) ** seed for seed in range(n)]
    noise = [value - statistics.fmean(spread) for value in spread]
    half = quantile * statistics.stdev(noise) / math.sqrt(n)
    found = [verdict([value + shift * half for value in noise]) for shift in (1.01, -1.01, 0.99)]
    assert found == ["worse", "better", "undecided"]
    assert half_width(noise) == pytest.approx(half, rel=1e-4)


def test_numbers_have_three_digits() -> None:
    """Whatever their size."""
    assert [number(v) for v in (0.070456, 2.2546, 13.84, 138.4, 1e-9, -0.196, None)] == [
        "0.0705",
        "2.25",
        "13.8",
        "138",
        "0",
        "-0.196",
        NOT_MEASURED,
    ]
    assert ranged([0.5, 0.4, 0.6]) == "0.500 [0.400, 0.600]" and ranged(None) == NOT_MEASURED


def test_markdown_escapes_bars() -> None:
    """A bar in a cell must not end it."""
    text = markdown_sheet(Sheet(head=("a", "b"), rows=[("x|y", "1")], n_words=1, title="T", notes=("n",)))
    assert text == "**T**\n\n| a | b |\n| :-- | --: |\n| x\\|y | 1 |\n\nn\n"


def test_result_of_another_version_is_refused(tmp_path: Path) -> None:
    """By its format."""
    path = tmp_path / "study-init.json"
    path.write_text(json.dumps({**committed("init"), "format": 2}))
    with pytest.raises(UserError, match=r"in format 1; got 'study-init' in format 2; fix: run `sparseffn study` again"):
        read_study(path)
