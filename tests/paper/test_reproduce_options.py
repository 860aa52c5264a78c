"""Tables, figures and evidence have options of their own: what would change nothing is not among them."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from sparseffn.cli import main, reproduce
from sparseffn.cli.parse import parse
from sparseffn.cli.reproduce import TABLES
from sparseffn.cli.reproduce_settings import ReproduceEvidence, ReproduceFigure, ReproduceTable
from sparseffn.distribution import World
from sparseffn.errors import UserError
from sparseffn.paper import scales
from sparseffn.paper.corpus_choice import Corpora
from sparseffn.paper.costs import Speed
from sparseffn.paper.evidence import STAGES
from sparseffn.paper.planned import Request
from sparseffn.paper.reproduction import select_tables
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
    for name in ("sparseffn.cli.reproduce.run_all", "sparseffn.cli.reproduce.run_here"):
        monkeypatch.setattr(name, lambda *args, **kwargs: pytest.fail("trained"))


REFUSED = {
    "evidence-rows": ("evidence --budget 60m --rows dense", "unknown option --rows"),
    "evidence-columns": ("evidence --list --columns WT-S", "unknown option --columns"),
    "evidence-seeds": ("evidence --list --seeds 2", "unknown option --seeds"),
    "evidence-jobs": ("evidence --budget 60m --jobs 2", "unknown option --jobs"),
    "evidence-scale": ("evidence --list --scale paper", "unknown --scale 'paper'"),
    "evidence-both": ("evidence --list --budget 60m", "`--list` and `--budget` must not both be given"),
    "evidence-neither": ("evidence", "`--budget` or `--list` must be given"),
    "table-budget": ("table table3 --budget 1m", "unknown option --budget"),
    "table-from": ("table table3 --from runs/a", "unknown option --from"),
    "table-figure": ("table fig1", "unknown table 'fig1'"),
    "figure-scale": ("figure fig1 --from runs/a --scale cpu", "unknown option --scale"),
    "figure-dry-run": ("figure fig2 --dry-run", "unknown option --dry-run"),
    "figure-table": ("figure table3", "unknown figure 'table3'"),
    "no-column": ("table table7 --columns WTS", "unknown column 'WTS'; fix: did you mean"),
    "no-such-column": ("table table8 table3 --columns C4-S", "table8 has none of these columns or rows; fix: leave it out"),
    "paper-tokenizer": ("table table3 --scale paper --view --tokenizer chars", "`--tokenizer` must be left out at scale paper"),
}


@pytest.mark.usefixtures("_trains_nothing")
@pytest.mark.parametrize(("words", "message"), REFUSED.values(), ids=list(REFUSED))
def test_option_that_changes_nothing_is_refused(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is opened, measured or trained."""
    assert main(["reproduce", *words.split()]) == 2
    assert message in capsys.readouterr().err


def test_each_kind_has_its_defaults() -> None:
    """Minutes on a few cores, one seed, no files for tables; figures have a folder."""
    tables = parse("reproduce table", ReproduceTable, ["table3", "table7", "--rows", "dense"])
    assert (tables.rows, tables.scale, tables.seeds, tables.out) == (("dense",), "cpu", ("1",), None)
    figures = parse("reproduce figure", ReproduceFigure, ["fig1", "fig2", "--tokens", "4"])
    assert (figures.tokens, figures.time_limit, figures.out) == (4, "20m", "runs/figures")
    assert parse("reproduce evidence", ReproduceEvidence, ["--list"]).scale == "cpu"


def test_counted_tables_take_columns(capsys: pytest.CaptureFixture[str]) -> None:
    """In any case, in the table's order."""
    assert main(["reproduce", "table", "table7", "table9", "--columns", "e8", "WT-S", "--json"]) == 0
    seven, nine = json.loads(capsys.readouterr().out)
    assert [column["name"] for column in seven["columns"]] == ["WT-S", "E8"]
    assert len(seven["cells"]) == 2 * len(seven["rows"]) and [row["name"] for row in nine["rows"]] == ["WT-S", "E8"]


@pytest.mark.usefixtures("_trains_nothing")
def test_evidence_lists_without_training(cpu: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """All runs, none of which is there."""
    assert main(["reproduce", "evidence", "--list", "--steps", "3", *cpu]) == 0
    assert "0 of 40 runs finished" in capsys.readouterr().out


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
        assert main(["reproduce", "table", *words, *cpu]) == 0
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
    """It is nothing to be fixed."""
    speed = Speed(dense=1e10, mixture=1e10, basis="a test")
    monkeypatch.setattr(reproduce, "measure_speed", lambda device: speed)
    assert main(["reproduce", "table", "table5", "table3", "--scale", "paper", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("opens no published corpus") == 1 and "leave out --dry-run" not in shown


@pytest.mark.parametrize(
    ("words", "got"),
    [
        ("table table3 --columns WT-S --strategy ep", "got 'dense, WT-S': experts can be spread over 1 device for dense"),
        ("evidence --budget 1h --strategy ep", "got 'dense': experts can be spread"),
        ("table table3 --columns WT-S --jobs 2", "`--jobs` must be 1 where several processes share each run; got 2"),
    ],
    ids=["table", "evidence", "jobs"],
)
def test_rows_that_processes_cannot_share_are_refused_first(
    words: str, got: str, cpu: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sigma-MoE could be spread over two; nothing of it is trained either."""
    monkeypatch.setattr(World, "here", lambda: World(0, 2))
    monkeypatch.setattr("sparseffn.paper.jobs.execute", lambda *args, **kwargs: pytest.fail("trained"))
    assert main(["reproduce", *words.split(), *cpu]) == 2
    assert got in capsys.readouterr().err


def test_strategy_reaches_the_training(cpu: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each run; what it does there is held in tests/training."""
    seen = []
    monkeypatch.setattr("sparseffn.paper.execution.train", lambda *args, **how: seen.append(how["strategy"]))
    words = ["table", "table3", "--columns", "WT-S", "--rows", "sigma-moe", "--strategy", "fsdp"]
    main(["reproduce", *words, *cpu])
    assert seen == ["fsdp"]
