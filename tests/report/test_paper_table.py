"""The paper's tables in the terminal and as Markdown, and the files that are refused."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sparseffn.errors import UserError
from sparseffn.report.formats import NOT_MEASURED
from sparseffn.report.paper_report import paper_markdown, print_paper_table, read_paper_table, write_paper_table
from sparseffn.report.paper_view import paper_report

from .synthetic_paper import column, counted_table, measured, paper_table, settings_table, typed, unmeasured

LONG = "softmax before top-k without renormalisation " * 4 + "x" * 150


def printed(result: dict[str, Any], width: int = 100) -> str:
    """What the terminal shows."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    print_paper_table(typed(result), console)
    assert isinstance(console.file, io.StringIO), "the console writes to memory"
    return console.file.getvalue().replace("\u00a0", " ")


def sections(result: dict[str, Any]) -> dict[str, dict[str, list[str]]]:
    """Heading of each Markdown table to its rows, label to cells."""
    found: dict[str, dict[str, list[str]]] = {}
    for line in paper_markdown(paper_report(typed(result))).replace("\u00a0", " ").splitlines():
        if line.startswith("## "):
            rows = found.setdefault(line[3:], {})
        if line.startswith("| "):
            label, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            rows[label] = cells
    return found


def test_measured_cell_holds_every_quantity() -> None:
    """In the order of the headings: loss, seeds, published, difference, validation, parameters, FLOPs."""
    rows = sections(paper_table())["WT-S: ptb, bits per character"]
    assert rows["sigma-moe"] == [
        *("2.260 ± 0.012", "3", "11.71", r"-0.050 [-0.070, -0.030] \*"),
        *("2.220", "2.280", "1.28 M", "-0.12%", "25.0%", "26.1%"),
    ]
    assert rows[""][:4] == [
        *("test, bits per character", "n", "published, perplexity"),
        "against dense, bits per character, 95% interval",
    ]
    assert rows[""][5] == "validation at equal time (61.2 s)"


def test_only_what_excludes_zero_is_marked() -> None:
    """A star in the overview and behind the interval, and nowhere is anything bold."""
    found = sections(paper_table())
    stars = {label: cells[0].endswith(r"\*") for label, cells in found["All columns"].items()}
    assert {label for label, star in stars.items() if star} == {"sigma-moe"}
    assert found["WT-S: ptb, bits per character"]["softmax after top-k (renorm.)"][3] == "-0.002 [-0.022, +0.018]"
    assert "**" not in paper_markdown(paper_report(typed(paper_table())))


def test_cell_without_result_says_why() -> None:
    """Failed, not run, of another version: a dash with a footnote, beside the published value and the counts."""
    result = paper_table()
    rows = sections(result)["WT-S: ptb, bits per character"]
    assert rows["s-base, K=4, G=64 <sup>c</sup>"][:4] == [f"{NOT_MEASURED} <sup>e</sup>", "", "13.01", NOT_MEASURED]
    assert rows["s-base, K=4, G=64 <sup>c</sup>"][6] == "1.28 M"
    table = paper_report(typed(result))
    assert [table.footnotes[letter] for letter in "def"] == [
        "failed: diverged at step 40",
        "missing: not run yet",
        "missing: made by version 0.0.9",
    ]
    assert table.incomplete == "incomplete: of 10 cells 2 missing and 1 failed; the footnotes say why"


def test_place_without_a_cell_is_missing() -> None:
    """A row that the file forgets is not left out."""
    result = paper_table()
    del result["cells"][0]
    table = paper_report(typed(result))
    assert "missing: the file holds nothing for it" in table.footnotes.values()
    assert "3 missing" in (table.incomplete or "")


def test_every_footnote_is_referred_to_and_explained() -> None:
    """Letters in the tables and letters below are the same, in order."""
    table = paper_report(typed(paper_table(n_columns=4)))
    used = set().union(*(block.marks for block in (*table.blocks, table.overview) if block))
    assert used == set(table.footnotes)
    assert list(table.footnotes) == sorted(table.footnotes) == list("abcdef")


def test_row_says_where_it_is_not_the_papers() -> None:
    """Other sizes, other settings."""
    table = paper_report(typed(paper_table()))
    assert {"K=1, G=256 stands for K=1, G=512", "the paper's row 'switch, K=1, G=512'", "released settings"} <= set(
        table.footnotes.values()
    )


@pytest.mark.parametrize(
    ("label", "published", "mark"),
    [
        ("switch, K=1, G=256", "switch, K=1, G=512", "switch, K=1, G=256 stands for switch, K=1, G=512"),
        ("s-base, K=4, G=64 (as released)", "s-base, K=4, G=128", "s-base, K=4, G=64 stands for s-base, K=4, G=128"),
        ("Top-K, K=64", "Top-K, K=128", "Top-K, K=64 of 1027 stands for K=128 of 2053"),
    ],
    ids=["whole", "with-a-form", "top-k"],
)
def test_row_of_the_paper_is_named_once(label: str, published: str, mark: str) -> None:
    """By the mark where that names it; letters stand in their order, whoever had them first."""
    result = paper_table()
    result["rows"][1]["settings"] = "released"
    result["rows"][3] |= {"label": label, "published_label": published, "marks": [mark], "settings": "released"}
    table = paper_report(typed(result))
    assert list(table.footnotes.values())[:2] == ["released settings", mark]
    assert table.blocks[0].rows[3].cells[0].marks == ("a", "b")


def test_measured_cell_that_lacks_a_seed_says_so() -> None:
    """Beside its loss, and beside a difference that is over fewer seeds than the loss."""
    result = paper_table()
    result["cells"][1]["reason"] = "seed 3: not run yet"
    result["cells"][2]["against_dense"]["n_seeds"] = 2
    table = paper_report(typed(result))
    notes = {
        cell.text: [table.footnotes[mark] for mark in cell.marks] for row in table.blocks[0].rows for cell in row.cells[1:]
    }
    assert notes["2.260 ± 0.012"] == ["seed 3: not run yet"]
    assert notes["-0.002 [-0.022, +0.018]"] == ["the difference is over 2 of 3 seeds, those that both rows have"]


def test_difference_from_another_row_stands_beside_that_from_dense() -> None:
    """Where a file has it."""
    result = paper_table()
    assert "sigma-moe, bits" not in printed(result, width=200)
    difference = {"difference": 0.048, "low": 0.01, "high": 0.09, "decided": True, "covers_seeds": True, "n_seeds": 3}
    result["cells"][2]["against_sigma_moe"] = difference
    assert "+0.048 [+0.010, +0.090] *" in printed(result)
    result["cells"][2]["against_sigma_moe"] = difference | {"decided": False, "covers_seeds": False}
    assert "+0.048 [+0.010, +0.090] *" not in printed(result), "an interval of the text alone marks nothing"


def test_column_of_our_own_has_no_published_values() -> None:
    """Neither in its block nor in the overview, whose other columns keep theirs."""
    result = paper_table()
    result["columns"][1] |= {"name": "PTB words", "published_name": None, "published_metric": None, "metric": "perplexity"}
    result["difference_unit"] = "bits per character or nats per token"
    for cell in result["cells"][5:]:
        cell["published"] = None
    found = sections(result)
    assert found["All columns"][""] == ["WT-S test", "WT-S published", "PTB words test"]
    assert found["PTB words: ptb, perplexity"][""][:3] == [
        *("test, perplexity", "n", "against dense, nats per token, 95% interval"),
    ]
    assert found["WT-S: ptb, bits per character"][""][3] == "against dense, bits per character, 95% interval"


def test_title_has_the_number_of_the_table() -> None:
    """Once."""
    assert paper_report(typed(paper_table())).title.startswith("Table 4: sigma")
    assert paper_report(typed(paper_table() | {"title": "Mixtures"})).title == "Table 4: Mixtures"
    assert paper_report(typed(paper_table() | {"title": "Words", "table": "ptb-words"})).title == "Words"


def test_one_seed_is_said() -> None:
    """No spread, and what the interval leaves out."""
    text = printed(paper_table(seeds=(0,)), width=200)
    assert "2.310  " in text and "±" not in text.split("Test:")[0]
    assert "Where n = 1 the spread is unknown; unless a note gives the scatter of all rows, the interval" in text
    assert "n = 1" not in printed(paper_table())


def test_columns_of_validation_are_told_apart() -> None:
    """One is of the whole split, the other of its beginning; where nothing was measured neither is explained."""
    result = paper_table()
    assert any("cannot be compared with the column of the whole split" in note for note in paper_report(typed(result)).notes)
    cells = [unmeasured(cell, "missing", "not run yet") for cell in result["cells"]]
    assert not any("At equal time" in note for note in paper_report(typed({**result, "cells": cells})).notes)


def test_one_column_has_no_overview() -> None:
    """It would say the same twice."""
    assert paper_report(typed(paper_table(n_columns=1))).overview is None


def test_counted_table_shows_costs_beside_the_published_ones() -> None:
    """Nothing is trained, so nothing is missing, and no heading speaks of a loss."""
    found = sections(counted_table())
    assert found["All columns"][""] == ["WT-S K/N_E", "WT-S published", "E8 K/N_E", "E8 published"]
    rows = found["WT-S: none, percent of dense"]
    assert rows["sigma-moe"] == ["25.0%", "47.00 M", "-0.12%", "25.0%", "26.1%"]
    text = printed(counted_table())
    assert "incomplete" not in text and "test" not in text and "seed" not in text


def test_published_value_has_the_decimals_of_the_paper() -> None:
    """Neither 1.080 nor 11.7."""
    result = paper_table()
    result["cells"][5]["published"], result["cells"][0]["published"] = 1.08, 11.7
    found = sections(result)
    assert found["All columns"]["dense"] == ["2.310 ± 0.012", "11.70", "2.320 ± 0.012", "1.08"]


def test_narrow_interval_has_a_decimal_more() -> None:
    """A decided difference does not read as zero."""
    result = paper_table()
    result["cells"][1]["against_dense"] |= {"difference": -4e-4, "low": -6e-4, "high": -2e-4, "decided": True}
    assert "-0.0004 [-0.0006, -0.0002] *" in printed(result)


@pytest.mark.parametrize("n_columns", [1, 7], ids=["one column", "many columns"])
@pytest.mark.parametrize("label", ["dense", LONG], ids=["short", "long"])
def test_terminal_of_100_columns_is_wide_enough(n_columns: int, label: str) -> None:
    """No line is cut, and every loss is on a line of its row."""
    result = paper_table(n_columns=n_columns)
    result["rows"][1]["label"] = result["rows"][1]["published_label"] = label
    text = printed(result)
    assert max(map(len, text.splitlines())) <= 100
    assert text.count("2.260 ± 0.012") == (1 if n_columns == 1 else 2)
    assert "\u2026" not in text


def test_block_is_two_parts_in_100_columns() -> None:
    """The loss and its difference stand together, also where a label of the paper is long and a cell has a footnote."""
    result = paper_table(n_columns=1)
    result["rows"][2]["label"] = result["rows"][2]["published_label"] = "softmax before top-k (no renorm.)"
    lines = printed(result).splitlines()
    line = next(line for line in lines if line.startswith(" sigma-moe "))
    assert "11.71" in line and "-0.050 [-0.070, -0.030] *" in line
    assert sum(line.startswith(" sigma-moe ") for line in lines) == 2
    assert sum("+0.61%" in line for line in lines) == 1


def test_render_writes_three_files_beside_the_json(tmp_path: Path) -> None:
    """The same bytes for the same file, and nothing else in the folder."""
    path = tmp_path / "table4.json"
    path.write_text(json.dumps(paper_table()))
    written = write_paper_table(path)
    assert [file.name for file in written] == ["table4.md", "table4.tex", "table4.html"]
    first = [file.read_bytes() for file in written]
    assert [file.read_bytes() for file in write_paper_table(path)] == first
    assert sorted(file.name for file in tmp_path.iterdir()) == ["table4.html", "table4.json", "table4.md", "table4.tex"]


def test_failed_writing_leaves_the_file_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk is an error that says so, and no half of a table stays."""
    path = tmp_path / "table4.json"
    path.write_text(json.dumps(paper_table()))
    (tmp_path / "table4.md").write_text("before")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*table4\.md': No space left on device"):
        write_paper_table(path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["table4.json", "table4.md"]
    assert (tmp_path / "table4.md").read_text() == "before"


def test_settings_stand_beside_the_published_ones_where_they_differ(tmp_path: Path) -> None:
    """In every form; a damaged file and one of another version are refused."""
    path = tmp_path / "table8.json"
    path.write_text(json.dumps(settings_table()))
    markdown, latex, html = (file.read_text() for file in write_paper_table(path))
    assert r"| E8 | 47.26 | 96 [412] | 0.1 |" in markdown and "Table 8: Hyperparameters" in markdown
    assert "96 [412]" in html and r"96 {[}412{]}" in latex and "96 [412]" in printed(settings_table())
    path.write_text(json.dumps(settings_table() | {"rows": [{"name": "E8"}]}))
    with pytest.raises(UserError, match=r"must hold `rows\[0\]\.here`; got nothing; fix: run `sparseffn reproduce` again"):
        write_paper_table(path)


Damage = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(lambda r: r.update(kind="comparison"), "a valid `kind`; got invalid value 'comparison'", id="kind"),
        pytest.param(lambda r: r.update(version=2), "a valid `version`; got invalid enum value 2", id="version"),
        pytest.param(lambda r: r.pop("difference_unit"), "`difference_unit`; got nothing", id="absent"),
        pytest.param(lambda r: r.update(rows=[]), "`rows` must not be empty", id="no rows"),
        pytest.param(lambda r: r["columns"][0].pop("metric"), r"`columns\[0\]\.metric`; got nothing", id="metric"),
        pytest.param(lambda r: r["columns"].append(column("E8")), "columns must have different names", id="twice"),
        pytest.param(lambda r: r["rows"][2].update(marks="a"), r"`rows\[2\]\.marks`, an array; got \"a\"", id="marks"),
        pytest.param(lambda r: r["cells"][0].update(status="done"), r"a valid `cells\[0\]\.status`", id="status"),
        pytest.param(lambda r: r["cells"][0].update(mean=None), r"`cells\[0\]`; got \(a measured cell must have", id="mean"),
        pytest.param(lambda r: r["cells"][0].update(mean=float("nan")), "JSON is malformed", id="nan"),
        pytest.param(lambda r: r["cells"][0].update(n=True), r"`cells\[0\]\.n`, an int; got true", id="flag"),
        pytest.param(lambda r: r["cells"][0].update(row=5), r"must be in the table; got row 5, column 0", id="row"),
        pytest.param(lambda r: r["cells"].append(measured(0, 0)), "got row 0, column 0 again", id="same place"),
        pytest.param(lambda r: r["cells"][4].update(reason=None), "is missing must have a reason", id="reason"),
        pytest.param(lambda r: r["cells"][3].update(reason=""), "is failed must have a reason", id="no reason"),
        pytest.param(lambda r: r["cells"][0].update(seeds=[0, 0, 1]), "n different seeds; got 2.31, 3", id="seeds repeat"),
        pytest.param(lambda r: r["cells"][0].update(seeds=[0]), "n different seeds; got 2.31, 3", id="seeds lack"),
        pytest.param(
            lambda r: r["cells"][1]["against_dense"].update(decided=True, low=-1.0, high=1.0), "excludes 0", id="decided"
        ),
        pytest.param(lambda r: r["cells"][1]["against_dense"].pop("low"), r"against_dense\.low`; got nothing", id="low"),
    ],
)
def test_damaged_table_is_refused(damage: Damage, message: str, tmp_path: Path) -> None:
    """Naming the file and the field, and what to do."""
    result, path = paper_table(), tmp_path / "table4.json"
    damage(result)
    path.write_text(json.dumps(result))
    with pytest.raises(UserError, match=rf"table4\.json` must hold .*{message}.*; fix: run `sparseffn reproduce` again"):
        read_paper_table(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "must exist"), ("{", "must hold JSON"), ("[]", "must hold an object"), ("\x00", "must hold JSON")],
    ids=["absent", "cut", "list", "binary"],
)
def test_other_files_are_refused(text: str | None, message: str, tmp_path: Path) -> None:
    """Before anything is written."""
    path = tmp_path / "table4.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        write_paper_table(path)
    assert [file.name for file in tmp_path.iterdir()] == ([] if text is None else ["table4.json"])


def test_optional_fields_may_be_absent(tmp_path: Path) -> None:
    """Only what is needed is asked for; what lacks is a dash."""
    result = paper_table(n_columns=1)
    for key in ("published_name", "published_metric", "digest", "sizes", "steps", "equal_time_s"):
        del result["columns"][0][key]
    for key in ("spread", "valid_mean", "params", "residual_percent", "flops_percent", "equal_time", "against_dense"):
        del result["cells"][1][key]
    result["cells"][2] = unmeasured({"row": 2, "column": 0}, "missing", "not run yet")
    path = tmp_path / "table.json"
    path.write_text(json.dumps(result))
    rows = sections(read_paper_table(path))["WT-S: ptb, bits per character"]
    assert rows["sigma-moe"] == ["2.260", "3", "11.71", *(NOT_MEASURED,) * 6, "26.1%"]
