"""`sparseffn reproduce` as a user types it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from sparseffn.cli import main
from sparseffn.paper import evidence, scales
from sparseffn.paper.costs import Speed
from sparseffn.paper.rules import rules
from sparseffn.paper.scales import Scale

Command = Callable[..., int]


@pytest.fixture
def reproduce(micro: Scale, song: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """The command at the micro scale, which stands for scale cpu."""
    monkeypatch.setattr(scales, "SCALES", {**scales.SCALES, "cpu": micro})

    def run(*words: str, corpus: bool = True) -> int:
        data = ["--corpus", "text", "--data-dir", str(song)] if corpus else []
        kind = [] if words[0] in ("evidence", "figure") else ["table"]
        return main(["reproduce", *kind, *words, *data, "--pool", str(tmp_path / "pool")])

    return run


def printed(capsys: pytest.CaptureFixture[str]) -> Any:
    """Standard output as JSON."""
    return json.loads(capsys.readouterr().out)


def test_table_is_run_once_and_viewed(reproduce: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before: missing, with the reason; then measured; then the same without training."""
    words = ("table3", "--columns", "WT-S", "--json")
    assert reproduce(*words, "--view") == 0
    assert [cell["reason"] for cell in printed(capsys)["cells"]] == ["not run yet"] * 2
    assert reproduce(*words, "--out", str(tmp_path / "out")) == 0
    measured = printed(capsys)
    assert [cell["status"] for cell in measured["cells"]] == ["measured"] * 2
    assert json.loads((tmp_path / "out" / "table3.json").read_text()) == measured
    assert "](table3.html)" in (tmp_path / "out" / "tables.md").read_text()
    assert reproduce(*words, "--view") == 0 and printed(capsys)["cells"] == measured["cells"]


def test_each_table_takes_the_columns_that_it_has(reproduce: Command, capsys: pytest.CaptureFixture[str]) -> None:
    """C4-S is no column of table 10, and WT-S none of table 5."""
    assert reproduce("table3", "table10", "table7", "--columns", "WT-S", "C4-S", "--view", "--json") == 0
    names = [[column["name"] for column in table["columns"]] for table in printed(capsys)]
    assert names[:2] == [["WT-S", "C4-S"], ["WT-S"]]


def test_every_missing_row_is_printed_with_its_reason(reproduce: Command, capsys: pytest.CaptureFixture[str]) -> None:
    """The terminal too: no row is left out."""
    assert reproduce("table10", "--columns", "WT-S", "--view") == 0
    shown = capsys.readouterr().out
    assert "cells: 29 missing" in shown and "missing: not run yet" in shown and "2 N_E, G=4" in shown


@pytest.mark.slow
def test_processes_give_the_same_numbers(reproduce: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--jobs 2` against one after the other."""
    words = ("table3", "--columns", "WT-S", "--json", "--threads", "2")
    assert reproduce(*words, "--jobs", "2") == 0
    several = printed(capsys)["cells"]
    (tmp_path / "pool").rename(tmp_path / "first")
    assert reproduce(*words) == 0
    assert [cell["mean"] for cell in several] == pytest.approx([cell["mean"] for cell in printed(capsys)["cells"]], rel=1e-4)


def test_evidence_spends_its_budget_and_writes_tables(
    reproduce: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A budget of nothing starts nothing; the list and the tables say so."""
    assert reproduce("evidence", "--budget", "0.001s", "--out", str(tmp_path / "out"), "--json") == 0
    runs = printed(capsys)["runs"]
    assert len(runs) == 40 and {run["status"] for run in runs} == {"missing"}
    names = {path.stem for path in (tmp_path / "out").glob("*.json")}
    assert names == {"evidence", "claims", "table1", "table3", "table6", "table10"}
    assert reproduce("evidence", "--list") == 0 and "0 of 40 runs finished" in capsys.readouterr().out


def test_runs_that_a_record_holds_are_not_trained_again(
    reproduce: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an experiment, by the folder of its record; without that folder they are missing."""
    experiment = rules()["control"]
    candidates = [candidate for candidate in experiment.candidates if candidate.name in ("dense", "sigma-MoE")]
    small = structs.replace(
        experiment, scale="micro", seeds=(100, 101), looks=(2,), bounds=(9.0,), candidates=candidates, contrasts=()
    )
    monkeypatch.setattr(evidence, "rules", lambda: {"control": small})
    words = ("evidence", "--only", "control", "--budget", "9m", "--json")
    out = ("--out", str(tmp_path / "out"))

    def statuses() -> list[str]:
        return [run["status"] for run in printed(capsys)["runs"]]

    assert reproduce(*words, *out) == 0 and statuses() == ["finished"] * 4
    record = (tmp_path / "out" / "control.json").read_bytes()
    (tmp_path / "pool").rename(tmp_path / "gone")
    assert reproduce(*words, *out) == 0 and statuses() == ["recorded"] * 4
    assert not list(tmp_path.glob("pool/**/result.json"))
    assert (tmp_path / "out" / "control.json").read_bytes() == record
    assert reproduce("evidence", "--only", "control", "--list") == 0 and "0 of 4 runs finished" in capsys.readouterr().out


def test_dry_run_trains_nothing(
    reproduce: Command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every table at the published scale, without its corpora."""
    speed = Speed(dense=1e10, mixture=1e10, basis="a test")
    monkeypatch.setattr("sparseffn.cli.reproduce.measure_speed", lambda device: speed)
    assert main(["reproduce", "table", "all", "--scale", "paper", "--dry-run", "--json"]) == 0
    result = printed(capsys)
    dense = {run["column"]: run["params"] for run in result["runs"] if run["row"] == "dense"}
    assert {round(count / 1e6, 1) for count in dense.values()} == {41.2, 47.3, 237.7, 262.5}
    assert {run["corpus"] for run in result["runs"]} == {"wikitext103", "enwik8", "c4", "pes2o"}
    listed = {run["table"] for run in result["runs"]} | set(result["without_runs"])
    assert listed == {f"table{number}" for number in range(1, 11)} and len(result["without_runs"]) == 3
    assert main(["reproduce", "table", "table5", "table8", "--scale", "paper", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "assumed utilisation" in shown and "- table8: no run needed; `sparseffn reproduce table table8` prints" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("table11",), "unknown table 'table11'; fix: did you mean"),
        (("table3", "--columns", "WTS"), "unknown column 'WTS'; fix: did you mean"),
        (("table3", "--rows", "sigma-mo"), "unknown row 'sigma-mo'; fix: did you mean 'sigma-moe'?"),
        (("table3", "table10", "--rows", "sigma-mo"), "unknown row 'sigma-mo'; fix: did you mean 'sigma-moe'?"),
        (("table3", "table5", "--columns", "WT-S"), "table5 has none of these columns or rows; fix: leave it out"),
        (("table3", "--seeds", "1", "1"), "`seeds` must be different from one another; got [1, 1]"),
        (("table3", "--seeds", "0"), "`--seeds` must be 1 to 1000; got 0"),
        (("table3", "--seeds", "two"), "`--seeds` must be numbers; got 'two'"),
        (("table3", "--jobs", "0"), "`--jobs` must be at least 1; got 0"),
        (("table3", "--steps", "0"), "`steps` must be at least 1; got 0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_is_refused(
    words: tuple[str, ...], message: str, reproduce: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line with the remedy."""
    assert reproduce(*words) == 2
    assert message in capsys.readouterr().err


def test_scale_without_its_corpus_is_refused(reproduce: Command, capsys: pytest.CaptureFixture[str]) -> None:
    """It says which corpus is always there; published corpora cannot be replaced."""
    assert reproduce("table3", corpus=False) == 2
    error = capsys.readouterr().err
    assert "scale micro needs its corpus" in error and "--corpus stdlib, which is always there" in error
    assert main(["reproduce", "table", "table3", "--scale", "paper", "--corpus", "stdlib"]) == 2
    assert "`--corpus` must be left out at scale paper" in capsys.readouterr().err
