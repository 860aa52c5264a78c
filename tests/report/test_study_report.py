"""The studies' page and tables agree with the committed results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sparseffn.errors import UserError
from sparseffn.report.formats import NOT_MEASURED, ranged, significant
from sparseffn.report.generated_blocks import BLOCK, with_blocks
from sparseffn.report.study_contrasts import contrast_table, drift_table
from sparseffn.report.study_plots import along, study_plots
from sparseffn.report.study_report import TITLES, read_study, study_page, study_tables
from sparseffn.results.study_result import StudyResult
from sparseffn.stats import Difference, MeanStd, p_value
from sparseffn.storage import read_json

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("init", "competition", "balance")


def raw(name: str) -> dict[str, Any]:
    """A committed file."""
    return read_json(ROOT / "results" / f"study-{name}.json")


def committed(name: str) -> StudyResult:
    """A committed result."""
    return read_study(ROOT / "results" / f"study-{name}.json")


def test_page_holds_what_the_results_say() -> None:
    """Made anew, the tables are those on the page; a figure that was edited by hand is found."""
    text = (ROOT / "docs" / "why-this-selector.md").read_text(encoding="utf-8")
    assert with_blocks(text, ROOT / "results") == text
    assert {found[3] for found in BLOCK.finditer(text)} == {*NAMES, "all"}
    block = next(BLOCK.finditer(text))
    edited = text[: block.start()] + re.sub(r"\d\.\d", "7.7", block[0]) + text[block.end() :]
    assert edited != text and with_blocks(edited, ROOT / "results") == text


@pytest.mark.parametrize("name", NAMES)
def test_committed_results_are_whole_and_small(name: str) -> None:
    """Nothing missing, several seeds of each variant, no path of a machine."""
    result, text = committed(name), json.dumps(raw(name))
    assert result.missing == [] and result.missing_sizes == []
    assert {len(variant.runs) for variant in result.variants} == {result.settings.n_seeds}
    assert len(text) < 200_000 and "/home" not in text and "/tmp" not in text
    # All results that are kept, together, are to stay below 1 MB.
    assert sum(path.stat().st_size for path in (ROOT / "results").rglob("*") if path.is_file()) < 1_000_000


def test_axes_of_the_grid_share_the_base() -> None:
    """The base size stands in each of the four tables once a scheme."""
    result = committed("init")
    for axis, value in zip(("n_layers", "n_experts", "expert_size", "k"), result.settings.grid.base, strict=True):
        rows = [row for row in along(result, axis) if getattr(row, axis) == value]
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
    n_layers, n_experts, *_ = result.settings.grid.base
    start = [row for row in along(result, "n_experts") if row.n_experts != n_experts]
    cut = msgspec.structs.replace(
        result, start=start, variants=[msgspec.structs.replace(variant, runs=[]) for variant in result.variants]
    )
    assert {row.n_layers for row in start} == {n_layers} and along(cut, "n_layers") == []
    assert [plot.name for plot in study_plots(cut)] == [
        f"study-init-{name}" for name in ("output-n-experts", "load-gaussian", "load-text")
    ]


def test_differences_and_verdicts_are_those_of_the_file() -> None:
    """What is undecided is said so; one seed has no interval; without a result there is a dash."""
    result = committed("balance")
    first, other, *_ = result.variants
    wide = Difference(difference=0.2, low=-0.2, high=0.6, decided=False, covers_seeds=True, n_seeds=3)
    alone = Difference(difference=0.5, low=0.5, high=0.5, decided=False, covers_seeds=False, n_seeds=1)
    shown = msgspec.structs.replace(
        other,
        valid=MeanStd(mean=2.5, std=None, n=1),
        against_first={"valid": wide, "test": alone, "dead": wide},
    )
    tables = study_tables(msgspec.structs.replace(result, variants=[first, shown]))
    loss, selectors = tables["loss"].rows[1], tables["selector differences"].rows[0]
    assert [cell.text for cell in loss.cells][3] == "2.5000"
    assert [cell.text for cell in loss.cells][5:] == ["+0.2000 ± 0.4000", "+0.5000"]
    assert [cell.text for cell in selectors.cells][2:5] == [NOT_MEASURED, "+0.2000 ± 0.4000", NOT_MEASURED]
    assert [cell.text for cell in tables["loss"].rows[0].cells][5:] == [NOT_MEASURED] * 2


def test_verdicts_are_corrected_for_all_studies_together() -> None:
    """Switch and softmax before top-k exclude 0 alone, and stand no longer among eight; one seed is not tested."""
    together = contrast_table([committed(name) for name in NAMES])
    rows = {row.cells[0].text: [cell.text for cell in row.cells[1:]] for row in together.rows}
    assert len(rows) == 8 and {row[4] for row in rows.values()} == {"undecided"}
    variants = committed("init").variants
    alone = {v.name: p_value(v.against_first["test"], 11) for v in variants[1:]}
    assert alone["switch, equal-norm"] < 0.05 < float(rows["switch, equal-norm less shared, equal-norm"][3])
    single = Difference(difference=0.5, low=0.5, high=0.5, decided=False, covers_seeds=False, n_seeds=1)
    one = msgspec.structs.replace(variants[1], against_first={"test": single})
    (lone,) = contrast_table([msgspec.structs.replace(committed("init"), variants=[variants[0], one])]).rows
    assert [cell.text for cell in lone.cells][1:] == [*[NOT_MEASURED] * 2, "+24.48%", NOT_MEASURED, "undecided", "1"]


def test_load_over_training_is_the_difference_of_probes() -> None:
    """At each probe, and 0 where variants start alike."""
    table = drift_table([committed("balance")])
    neither = {column.name: cell.text for column, cell in zip(table.columns, table.rows[1].cells, strict=True)}
    first, _, variant, *_ = committed("balance").variants
    pairs = list(zip(variant.runs, first.runs, strict=True))
    gaps = [run.probes[-1].load_entropy - base.probes[-1].load_entropy for run, base in pairs]
    assert neither["step 0"] == "+0.000 ± 0.000" and neither["step 300"].startswith(f"{sum(gaps) / len(gaps):+.3f}")


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


def test_result_without_comparisons_is_refused(tmp_path: Path) -> None:
    """As version 0.1 wrote it; its runs are used again."""
    result, path = raw("balance"), tmp_path / "study-balance.json"
    for variant in result["variants"]:
        for key in ("valid", "test", "start", "end", "against_first"):
            variant.pop(key, None)
    path.write_text(json.dumps(result))
    with pytest.raises(UserError, match="must hold `valid` and `against_first` of every variant; got neither in one; fix: run"):
        read_study(path)


def test_result_of_another_version_is_refused(tmp_path: Path) -> None:
    """By its format."""
    path = tmp_path / "study-init.json"
    path.write_text(json.dumps({**raw("init"), "format": 2}))
    with pytest.raises(UserError, match=r"a valid `format`; got invalid enum value 2; fix: run `sparseffn study` again"):
        read_study(path)
