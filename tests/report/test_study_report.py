"""The studies' page and tables agree with the committed results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from sparseffn.errors import UserError
from sparseffn.report.formats import NOT_MEASURED, ranged, significant
from sparseffn.report.generated_blocks import BLOCK, with_blocks
from sparseffn.report.study_plots import along, study_plots
from sparseffn.report.study_report import TITLES, read_study, study_page, study_tables
from sparseffn.stats import difference

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("init", "competition", "balance")


def committed(name: str) -> dict[str, Any]:
    """A committed result."""
    return read_study(ROOT / "results" / f"study-{name}.json")


def test_page_holds_what_the_results_say() -> None:
    """Made anew, the tables are those on the page; a figure that was edited by hand is found."""
    text = (ROOT / "docs" / "why-this-selector.md").read_text(encoding="utf-8")
    assert with_blocks(text, ROOT / "results") == text
    assert {found[3] for found in BLOCK.finditer(text)} == set(NAMES)
    block = next(BLOCK.finditer(text))
    edited = text[: block.start()] + re.sub(r"\d\.\d", "7.7", block[0]) + text[block.end() :]
    assert edited != text and with_blocks(edited, ROOT / "results") == text


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
    page = study_page(result)
    for table in study_tables(result).values():
        assert page.count(table.title.replace("'", "&#39;")) >= 1
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


def trained(**losses: list[float]) -> dict[str, Any]:
    """A study of the selectors whose variants have these losses, a seed each."""
    result = committed("balance")
    probes = result["variants"][0]["runs"][0]["probes"]
    for variant, (name, values) in zip(result["variants"], losses.items(), strict=False):
        runs = [{"seed": seed, "valid": v, "test": v, "probes": probes} for seed, v in enumerate(values)]
        variant |= {"name": name, "runs": runs}
    return {**result, "variants": result["variants"][: len(losses)]}


def test_difference_is_paired_and_undecided_when_it_may_be_zero() -> None:
    """Only seeds that both have; 4.303 standard errors for three; one seed decides nothing."""
    rows = study_tables(trained(a=[1.0, 2.0, 3.0, 9.0], b=[1.1, 2.1, 3.4], c=[0.9, 1.89, 2.9], d=[1.5]))["loss"].rows
    shown = [[cell.text for cell in row.cells[5:7]] for row in rows]
    assert shown == [
        [NOT_MEASURED, NOT_MEASURED],
        ["+0.2000 ± 0.4303", "undecided"],
        ["-0.1033 ± 0.0143", "better"],
        ["+0.5000", "undecided"],
    ]


def test_selectors_are_compared_at_the_end() -> None:
    """By their last probe, against the first variant."""
    table = study_tables(committed("balance"))["selector differences"]
    base, *others = committed("balance")["variants"]
    assert [row.cells[0].text for row in table.rows] == [variant["name"] for variant in others]
    first, last = ({run["seed"]: run["probes"][-1]["dead"] for run in variant["runs"]} for variant in (base, others[1]))
    found = difference(last, first)
    column = [column.name for column in table.columns].index("dead experts")
    assert table.rows[1].cells[column].text == f"{found.difference:+.4f} ± {found.half_width:.4f}"


def test_numbers_have_three_digits() -> None:
    """Whatever their size."""
    assert [significant(v) for v in (0.070456, 2.2546, 13.84, 138.4, 1e-9, -0.196, None)] == [
        "0.0705",
        "2.25",
        "13.8",
        "138",
        "0",
        "-0.196",
        NOT_MEASURED,
    ]
    assert ranged([0.5, 0.4, 0.6]) == "0.500 [0.400, 0.600]" and ranged(None) == NOT_MEASURED


def test_result_of_another_version_is_refused(tmp_path: Path) -> None:
    """By its format."""
    path = tmp_path / "study-init.json"
    path.write_text(json.dumps({**committed("init"), "format": 2}))
    with pytest.raises(UserError, match=r"in format 1; got 'study-init' in format 2; fix: run `sparseffn study` again"):
        read_study(path)
