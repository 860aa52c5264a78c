"""The table: what its cells, notes and headings say, in the terminal and in Markdown."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sparseffn.errors import UserError
from sparseffn.report import formats, markdown_table, print_table
from sparseffn.report.comparison_report import comparison_table
from sparseffn.results.comparison_result import read_comparison

from .synthetic import typed


def printed(result: dict[str, Any], width: int = 240) -> str:
    """What the terminal shows."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    print_table(comparison_table(typed(result)), console)
    assert isinstance(console.file, io.StringIO), "the console writes to memory"
    return console.file.getvalue().replace("\u00a0", " ")


def markdown_rows(result: dict[str, Any]) -> dict[str, list[str]]:
    """Label to cells."""
    lines = [line for line in markdown_table(comparison_table(typed(result))).splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in rows}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(formats.count(2_400_000), "2.40 M", id="millions"),
        pytest.param(formats.count(842_000), "0.84 M", id="one unit in a column"),
        pytest.param(formats.count(1_210_000_000), "1.21 B", id="billions"),
        pytest.param(formats.count(8_123), "8.1 k", id="thousands"),
        pytest.param(formats.count(812), "812", id="units"),
        pytest.param(formats.integer(9800.4), "9,800", id="rate"),
        pytest.param(formats.percent(0.2534), "25.3%", id="share"),
        pytest.param(formats.signed_percent(-0.001), "0.00%", id="no negative zero"),
        pytest.param(formats.signed_percent(0.123), "+0.12%", id="signed"),
        pytest.param(formats.times(0.416), "0.42\u00d7", id="ratio"),
        pytest.param(formats.times(0.0312), "0.031\u00d7", id="small ratio"),
        pytest.param(formats.seconds(61.2), "61.2\u00a0s", id="seconds"),
        pytest.param(formats.seconds(4210.3), "4,210\u00a0s", id="many seconds"),
        pytest.param(formats.loss(2.31, "bits per byte"), "2.310", id="bits"),
        pytest.param(formats.loss(18.234, "perplexity"), "18.23", id="perplexity"),
        pytest.param(formats.percent(None), "\u2013", id="not measured"),
        pytest.param(formats.setting({"a": [1, None], "b": True}), "a=1, none, b=true", id="setting"),
    ],
)
def test_number_is_written_in_its_format(text: str, expected: str) -> None:
    """Every quantity has one format."""
    assert text == expected


def test_row_holds_every_quantity(result: dict[str, Any]) -> None:
    """The cells of a method, in the order of the columns."""
    assert markdown_rows(result)["sigma-moe"] == [
        *("2.40 M", "+0.10%", "0.84 M"),
        *("25.8%", "25.0%", "48.1%", "0.47\u00d7", "0.44\u00d7"),
        *("2.318", "2.358", "2.346"),
        *("19,481", "0.7%"),
    ]


def test_headings_name_metric_and_equal_time(result: dict[str, Any]) -> None:
    """A column says its unit, and equal time its seconds."""
    headings = markdown_rows(result)["method"]
    assert "validation, bits per byte, n = 1" in headings
    assert "validation at equal time (61.2 s)" in headings
    assert len(headings) == 13


SETTINGS = (
    "Settings: 600 steps of 2,048 tokens, seed 0; batch=16, context=128, memory=128, eval_memory=512, lr=0.001, "
    "warmup_steps=50, clip=0.25, optimizer=adam, dropout=0.0"
)
CORPUS = (
    "Corpus: stdlib, tokenizer bytes, digest 9f2c5ad0e1b7, Python 3.11.7; train 912 files, 12,345,678 bytes; "
    "valid 49 files, 680,123 bytes; test 51 files, 690,456 bytes"
)


def test_settings_and_corpus_stand_below_the_table(result: dict[str, Any]) -> None:
    """A line each, in the terminal and in Markdown."""
    assert printed(result).splitlines()[-2:] == [SETTINGS, CORPUS]
    lines = markdown_table(comparison_table(typed(result))).splitlines()
    assert lines[-3:] == [SETTINGS, "", CORPUS]


def test_python_of_a_text_without_one_is_the_machines(result: dict[str, Any]) -> None:
    """Only the standard library's text is that of a Python; and a file may lack the optional parts."""
    del result["corpus"]["python_version"]
    result["environment"]["python"] = "3.12.1"
    assert "Python 3.12.1" in printed(result)
    for key in ("environment", "settings"):
        del result[key]
    for key in ("splits", "digest"):
        del result["corpus"][key]
    assert printed(result).splitlines()[-2:] == [SETTINGS.split(";")[0], "Corpus: stdlib, tokenizer bytes"]


def test_one_seed_is_said(result: dict[str, Any]) -> None:
    """Without a spread the table says why."""
    text = printed(result)
    assert "n = 1: one seed, so the spread between seeds is not known." in text
    assert "±" not in text


def test_several_seeds_show_mean_and_spread(seeded: dict[str, Any]) -> None:
    """Three seeds give a deviation, and their number stands in the heading."""
    rows = markdown_rows(seeded)
    assert rows["dense"][8:10] == ["2.310 ± 0.012", "2.350 ± 0.009"]
    assert "test, bits per byte, mean ± std, n = 3" in rows["method"]


def test_rows_with_different_seeds_each_say_n(seeded: dict[str, Any]) -> None:
    """A method that lost seeds is not taken for one that has them all."""
    seeded["methods"][1]["valid"] = {"mean": 2.3, "std": None, "n": 1}
    rows = markdown_rows(seeded)
    assert rows["topk k=256"][8] == "2.300 (n = 1)"
    assert rows["dense"][8] == "2.310 ± 0.012 (n = 3)"


def test_marks_are_footnotes_and_equal_marks_share_a_letter(result: dict[str, Any]) -> None:
    """A mark stands once below the table and is named in each row it concerns."""
    result["methods"][4]["marks"] = ["K x G deviates by 12% from the preset", "other"]
    text = printed(result)
    assert "pkm (a)" in text
    assert "switch (a,b)" in text
    assert text.count("(a) K x G deviates by 12% from the preset") == 1


def test_missing_method_has_a_row_with_the_reason(result: dict[str, Any]) -> None:
    """A method without any result is not left out."""
    result["missing"] = [{"label": "s-base", "seed": 0, "reason": "out of memory"}]
    assert markdown_rows(result)["s-base"][0] == "seed 0 missing: out of memory"
    text = printed(result)
    assert "incomplete: s-base seed 0 missing: out of memory" in text
    assert "s-base: seed 0 missing: out of memory" in text


def test_missing_seed_is_a_footnote_of_its_method(seeded: dict[str, Any]) -> None:
    """A method with fewer seeds keeps its row and says what it lacks."""
    seeded["missing"] = [{"label": "switch", "seed": 2, "reason": "stopped"}]
    assert "switch <sup>b</sup>" in markdown_rows(seeded)
    assert "<sup>b</sup> seed 2 missing: stopped" in markdown_table(comparison_table(typed(seeded)))


def test_unfinished_comparison_says_so(result: dict[str, Any]) -> None:
    """A partial file cannot be taken for a whole one."""
    result["finished"] = False
    for text in (printed(result), markdown_table(comparison_table(typed(result)))):
        assert "incomplete: the comparison had not finished" in text


def test_absent_measurements_become_dashes_with_a_note(result: dict[str, Any]) -> None:
    """Optional parts may be missing from the file altogether."""
    optional = ("layer_time_forward_vs_dense", "saved_bytes_vs_dense", "dead_share", "test", "marks", "curves")
    for method in result["methods"]:
        for key in optional:
            del method[key]
    result["equal_time_s"] = None
    assert markdown_rows(result)["switch"][5:7] == ["\u2013", "\u2013"]
    assert "\u2013: not measured, or without meaning for the method." in printed(result)


@pytest.mark.parametrize("width", [60, 80, 120, 240])
def test_terminal_table_keeps_to_the_width(result: dict[str, Any], width: int) -> None:
    """A narrow terminal gets several tables, each with the labels, and no number is lost."""
    text = printed(result, width)
    assert max(map(len, text.splitlines())) <= width
    for number in ("2.318", "19,481", "0.84 M", "25.8%"):
        assert number in text


def test_read_comparison_returns_the_file(result: dict[str, Any], tmp_path: Path) -> None:
    """What was written is read back."""
    path = tmp_path / "comparison.json"
    path.write_text(json.dumps(result), encoding="utf-8")
    assert read_comparison(path) == typed(result)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(None, "must exist", id="absent"),
        pytest.param("{", "must hold JSON", id="broken"),
        pytest.param("[]", "must hold an object; got array", id="not a comparison"),
        pytest.param('{"format": 1}', "must hold `title`; got nothing", id="fields"),
        pytest.param('{"format": 2}', "`format` of the comparison must be 1; got 2", id="another format"),
    ],
)
def test_unusable_file_is_refused(content: str | None, message: str, tmp_path: Path) -> None:
    """The error names the file's fault."""
    path = tmp_path / "comparison.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_comparison(path)
