"""Options of `sparseffn reproduce` change something for its targets, or are refused."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from sparseffn.cli import main, reproduce
from sparseffn.cli.parser import build_parser
from sparseffn.cli.reproduce_evidence import TABLES
from sparseffn.cli.reproduce_options import USED_BY, checked
from sparseffn.errors import UserError
from sparseffn.paper import scales
from sparseffn.paper.choice import select_tables
from sparseffn.paper.corpus_choice import Corpora
from sparseffn.paper.costs import Speed
from sparseffn.paper.evidence import STAGES
from sparseffn.paper.planned import Request
from sparseffn.paper.scales import Scale, get_scale
from sparseffn.paper.tables import get_table


@pytest.fixture
def cpu(micro: Scale, song: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The micro scale stands for scale cpu; its corpus and its pool, as typed."""
    monkeypatch.setattr(scales, "SCALES", {**scales.SCALES, "cpu": micro})
    corpus = ["--corpus", "text", "--data-dir", str(song), "--cache-dir", str(tmp_path / "cache")]
    return [*corpus, "--pool", str(tmp_path / "a pool")]


@pytest.fixture
def _trains_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sparseffn.cli.reproduce.run_all", "sparseffn.cli.reproduce_evidence.run_here"):
        monkeypatch.setattr(name, lambda *args, **kwargs: pytest.fail("trained"))


def test_every_option_has_its_targets() -> None:
    """An option that is added must say what it is for; no default is set before that is checked."""
    options = vars(build_parser().parse_args(["reproduce", "table3"]))
    assert set(options) - set(USED_BY) == {"targets", "threads", "json", "run", "command"} & set(options)
    assert {options[name] for name in USED_BY} == {None, False}


REFUSED = {
    "evidence-rows": ("evidence --budget 60m --rows dense", "`--rows` must be left out for evidence"),
    "evidence-columns": ("evidence --list --columns WT-S", "`--columns` must be left out for evidence"),
    "evidence-seeds": ("evidence --list --seeds 2", "where it changes nothing; got --seeds 2; fix: leave it out, as it is for"),
    "evidence-settings": ("evidence --list --settings released", "`--settings` must be left out for evidence"),
    "evidence-scale": ("evidence --list --scale paper", "`--scale` must be cpu or base for evidence; got 'paper'"),
    "table-list": ("table3 --list", "`--list` must be left out for table3, where it changes nothing; got --list; fix:"),
    "table-budget": ("table3 table7 --budget 1m", "`--budget` must be left out for table3, table7"),
    "table-from": ("table3 --from runs/a", "got --from runs/a; fix: leave it out, as it is for figures 1 and 3 to 7"),
    "table-tokens": ("table3 --tokens 4", "`--tokens` must be left out for table3"),
    "table-max-tokens": ("table3 --max-tokens 4", "`--max-tokens` must be left out for table3"),
    "table-time": ("all --time-limit 1m", "`--time-limit` must be left out for table1, table2"),
    "counted-dry-run": ("table7 --dry-run", "`--dry-run` must be left out for table7"),
    "counted-rows": ("table8 --rows dense", "`--rows` must be left out for table8"),
    "counted-column": ("table7 --columns WTS", "unknown column 'WTS'; fix: did you mean"),
    "counted-without": ("table8 table3 --columns C4-S", "table8 has none of these columns or rows; fix: leave it out"),
    "counted-settings": (
        "table7 table8 --settings released",
        "fix: leave it out, as it is for tables that are trained, table 9",
    ),
    "counted-corpus": ("table9 --corpus stdlib", "`--corpus` must be left out for table9"),
    "figure-scale": ("fig1 --from runs/a --scale cpu", "`--scale` must be left out for fig1"),
    "figure-seeds": ("fig1 --seeds 1", "`--seeds` must be left out for fig1"),
    "figure-dry-run": ("fig2 fig1 --dry-run", "`--dry-run` must be left out for fig2, fig1"),
    "figure-view": ("fig2 --view", "`--view` must be left out for fig2"),
    "figure-pool": ("fig2 --pool p", "`--pool` must be left out for fig2"),
    "figure-from": ("fig2 --from runs/a", "`--from` must be left out for fig2"),
    "figure-tokens": ("fig1 --tokens 4", "got --tokens 4; fix: leave it out, as it is for figures 2 and 8 to 11"),
    "paper-tokenizer": ("table3 --view --tokenizer chars", "`--tokenizer` must be left out at scale paper"),
}


@pytest.mark.usefixtures("_trains_nothing")
@pytest.mark.parametrize(("words", "message"), REFUSED.values(), ids=list(REFUSED))
def test_option_that_changes_nothing_is_refused(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is opened, measured or trained, naming the option and the targets."""
    assert main(["reproduce", *words.split()]) == 2
    assert message in capsys.readouterr().err


def test_option_of_one_of_the_targets_is_taken() -> None:
    """Rows are for table 3 alone, the benchmark's tokens for figure 2; what is not given has the targets' default."""
    parse = build_parser().parse_args
    tables = checked(parse(["reproduce", "table3", "table7", "--rows", "dense"]), ["table3", "table7"])
    assert (tables.rows, tables.scale, tables.seeds, tables.out, tables.list) == (["dense"], "paper", ["1"], None, False)
    figures = checked(parse(["reproduce", "fig1", "fig2", "--tokens", "4"]), ["fig1", "fig2"])
    assert (figures.tokens, figures.time_limit, figures.out) == (4, "20m", "runs/figures")
    assert checked(parse(["reproduce", "evidence", "--list"]), ["evidence"]).scale == "cpu"


def test_counted_tables_take_columns(capsys: pytest.CaptureFixture[str]) -> None:
    """In any case, in the table's order."""
    assert main(["reproduce", "table7", "table9", "--columns", "e8", "WT-S", "--json"]) == 0
    seven, nine = json.loads(capsys.readouterr().out)
    assert [column["name"] for column in seven["columns"]] == ["WT-S", "E8"]
    assert len(seven["cells"]) == 2 * len(seven["rows"]) and [row["name"] for row in nine["rows"]] == ["WT-S", "E8"]


@pytest.mark.usefixtures("_trains_nothing")
@pytest.mark.parametrize("flag", ["--list", "--dry-run", "--view"])
def test_evidence_lists_where_nothing_is_to_be_trained(flag: str, cpu: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """With a budget it would be unclear whether something is; that is refused."""
    words = ["reproduce", "evidence", flag, "--steps", "3", *cpu]
    assert main(words) == 0
    assert "0 of 40 runs finished" in capsys.readouterr().out
    assert main([*words, "--budget", "60m"]) == 2
    assert f"`--budget` must be left out with {flag}, which trains nothing; got 60m" in capsys.readouterr().err


@pytest.mark.usefixtures("_trains_nothing")
def test_evidence_prints_the_command_that_shows_its_runs(
    cpu: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Typed as printed it trains nothing; its tables have the list's rows and no others."""
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", "evidence", "--list", "--steps", "3", *cpu]) == 0
    lines = capsys.readouterr().out.splitlines()
    (command,) = [line.strip() for line in lines if line.startswith("  sparseffn reproduce ")]
    assert " --scale cpu --steps 3 --corpus text --data-dir " in command and "/a pool'" in command
    assert main(shlex.split(command)[1:]) == 0
    assert "sparseffn reproduce" not in capsys.readouterr().out
    tables = {path.stem: json.loads(path.read_text()) for path in (tmp_path / TABLES).glob("table*.json")}
    assert set(tables) == {stage.table for stage in STAGES}
    (planned,) = [stage.rows for stage in STAGES if stage.table == "table10"]
    assert len(tables["table10"]["rows"]) == len(("dense", "sigma-moe", *planned)) < len(get_table("table10").rows)


def test_rows_are_named_by_either_label(cpu: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Top-K, K=128 is shown as K=8 at the micro scale."""
    for label in ("Top-K, K=128", "top-k, k=8", "published:Top-K, K=128", "shown:Top-K, K=8"):
        words = ["table1", "--columns", "WT-S", "--rows", label, "--view", "--json"]
        assert main(["reproduce", *words, "--scale", "cpu", *cpu]) == 0
        (row,) = json.loads(capsys.readouterr().out)["rows"]
        assert (row["label"], row["published_label"]) == ("Top-K, K=8", "Top-K, K=128")


def test_label_of_two_rows_is_refused_with_the_choices() -> None:
    """At scale cpu K=64 is published for one row and shown for another; the choices name one each."""
    request = Request(scale=get_scale("cpu"), corpora=Corpora(scale=get_scale("cpu")))

    def rows(*labels: str) -> list[str]:
        (table,) = select_tables([get_table("table1")], {"table1": None}, labels, request)
        return [row.published for row in table.rows]

    choices = r"fix: 'published:Top-K, K=64', shown as 'Top-K, K=32' or 'published:Top-K, K=128', shown as 'Top-K, K=64'"
    with pytest.raises(UserError, match=rf"a label of its own; got 'Top-K, K=64' of table1; {choices}"):
        rows("Top-K, K=64")
    assert rows("published:Top-K, K=64") == ["Top-K, K=64"] and rows("shown:Top-K, K=64") == ["Top-K, K=128"]
    assert rows("Top-K, K=32", "Top-K, K=512") == ["Top-K, K=64", "Top-K, K=512"]
    with pytest.raises(UserError, match=r"each row must be named once; got 'Top-K, K=64' twice"):
        rows("Top-K, K=32", "published:Top-K, K=64")


def test_dry_run_says_once_why_no_corpus_is_open(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is nothing to be mended."""
    speed = Speed(dense=1e10, mixture=1e10, basis="a test")
    monkeypatch.setattr(reproduce, "measure_speed", lambda: speed)
    assert main(["reproduce", "table5", "table3", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("opens no published corpus") == 1 and "leave out --dry-run" not in shown
