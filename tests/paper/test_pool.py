"""Runs are shared, resumed, never repeated, and never silently stale."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
from micro_tables import MakeTable
from msgspec import to_builtins

from sparseffn import __version__
from sparseffn.paper import execution
from sparseffn.paper.execution import execute
from sparseffn.paper.measured import table_result
from sparseffn.paper.planned import PlannedTable
from sparseffn.paper.pool import Pool, RunSpec, makers_note, window_losses
from sparseffn.storage import json_digest, write_json
from sparseffn.training import TrainResult
from sparseffn.training.journal import StepReport


def run_table(planned: PlannedTable, pool: Pool) -> list[RunSpec]:
    """Do every distinct run."""
    specs = {spec.digest: spec for _, _, spec in planned.runs()}
    for spec in specs.values():
        assert execute(pool, spec).kind == "finished"
    return list(specs.values())


def test_tables_share_runs(table: MakeTable, tmp_path: Path) -> None:
    """Dense and sigma-moe of tables 3 and 10, and of columns with the same sizes, are one run each."""
    small = table("table3", ["WT-S", "C4-S"])
    large = table("table10", ["WT-S"], ["dense", "sigma-moe", "standard init"])
    assert len({spec.digest for _, _, spec in small.runs()}) == 2
    pool = Pool(tmp_path)
    run_table(small, pool)
    cells = table_result(large, pool).cells
    assert [cell.status for cell in cells] == ["measured", "measured", "missing"]
    assert cells[2].reason == "not run yet"
    first = table_result(small, pool).cells
    assert cells[0].mean == first[0].mean and cells[0].params == first[0].params


def test_finished_run_is_not_repeated(table: MakeTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second call trains nothing."""
    pool = Pool(tmp_path)
    (spec,) = run_table(table("table3", ["WT-S"], ["sigma-moe"]), pool)
    monkeypatch.setattr(execution, "train", lambda *args, **kwargs: pytest.fail("trained again"))
    status = execute(pool, spec)
    assert status.finished is not None and status.finished.load is not None
    assert status.finished.load.training >= 1.0 and status.finished.load.valid >= 1.0
    assert status.finished.wall_s >= status.finished.result.seconds


def test_windows_average_to_the_loss(table: MakeTable, tmp_path: Path) -> None:
    """A dozen windows in the order of the text, whose mean over equal lengths is the test loss."""
    pool = Pool(tmp_path)
    (spec,) = run_table(table("table3", ["WT-S"], ["dense"]), pool)
    finished = pool.status(spec).finished
    assert finished is not None
    losses = window_losses(finished, "test")
    n_windows = sum(-(-len(chunk) // 16) for chunk in np.array_split(np.zeros(len(spec.corpus.test) - 1), 4))
    assert losses.shape == (n_windows,)
    assert losses.mean() == pytest.approx(finished.result.test, rel=0.02)


def test_interrupted_run_goes_on(table: MakeTable, tmp_path: Path) -> None:
    """It is shown as missing with its step, and ends with the same losses as one in one go."""
    planned = table("table3", ["WT-S"], ["sigma-moe"])
    ((_, _, spec),) = planned.runs()

    def interrupt(report: StepReport) -> None:
        if report.step == 3:
            raise KeyboardInterrupt

    broken, whole = Pool(tmp_path / "a"), Pool(tmp_path / "b")
    with pytest.raises(KeyboardInterrupt):
        execute(broken, spec, interrupt)
    assert table_result(planned, broken).cells[0].reason == "not finished: step 3 of 4"
    results = [execute(pool, spec).finished for pool in (broken, whole)]
    assert results[0] is not None and results[1] is not None
    assert results[0].result.test == results[1].result.test


def test_failure_is_recorded_and_the_rest_goes_on(table: MakeTable, tmp_path: Path) -> None:
    """A run that diverges has its reason in the table and is not tried again."""
    planned = table("table3", ["WT-S"])

    def poison(report: StepReport) -> None:
        if report.step == 2:
            raise execution.NonFiniteError("loss and gradient must be finite; got nan")

    pool = Pool(tmp_path)
    dense, sigma = [spec for _, _, spec in planned.runs()]
    assert execute(pool, sigma, poison).permanent and execute(pool, dense).kind == "finished"
    cells = table_result(planned, pool).cells
    assert [cell.status for cell in cells] == ["measured", "failed"]
    assert str(cells[1].reason).startswith("diverged at step 3: loss and gradient must be finite")
    assert execute(pool, sigma).kind == "failed"


@pytest.mark.parametrize(
    "error",
    [MemoryError("no room"), OSError(28, "No space left on device"), ConnectionError("reset"), KeyError("text")],
    ids=["memory", "disk", "network", "any"],
)
def test_passing_failure_is_tried_again(
    table: MakeTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Memory that ran out may suffice the next time; so may a disk, or a connection."""
    ((_, _, spec),) = table("table3", ["WT-S"], ["dense"]).runs()
    pool = Pool(tmp_path)

    def fail(*args: object, **kwargs: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(execution, "train", fail)
        assert execute(pool, spec).reason == f"{type(error).__name__}: {error}" and not execute(pool, spec).permanent
    assert execute(pool, spec).kind == "finished" and not pool.failure_path(spec).exists()


def test_failure_that_cannot_be_recorded_does_not_stop_the_rest(
    table: MakeTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk has no room for the reason either; it is given back all the same."""
    ((_, _, spec),) = table("table3", ["WT-S"], ["dense"]).runs()

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(execution, "train", full)
    monkeypatch.setattr(os, "fsync", full)
    status = execute(Pool(tmp_path), spec)
    assert status.kind == "failed" and status.wanted and "No space left on device (not recorded: " in str(status.reason)


@pytest.mark.parametrize(
    ("file", "field", "value", "reason"),
    [
        ("environment.json", "sparseffn", "0.0.9", "made by version 0.0.9; this is"),
        ("paper.json", "format", 0, "made in format 0; this version reads"),
    ],
    ids=["version", "format"],
)
def test_stale_result_is_missing_and_set_aside(
    table: MakeTable, tmp_path: Path, file: str, field: str, value: object, reason: str
) -> None:
    """Of another version or format: shown as missing, kept beside, and run anew."""
    planned, pool = table("table3", ["WT-S"], ["dense"]), Pool(tmp_path)
    (spec,) = run_table(planned, pool)
    path = pool.folder(spec).path / file
    # What another version wrote has no seal, or its own.
    unsealed = {key: old for key, old in json.loads(path.read_text()).items() if key != "sealed"}
    path.write_text(json.dumps({**unsealed, field: value}))
    cell = table_result(planned, pool).cells[0]
    assert cell.status == "missing" and str(cell.reason).startswith(reason) and cell.mean is None
    assert execute(pool, spec).kind == "finished"
    assert (pool.folder(spec).path.parent / f"{spec.digest}.old-1" / file).exists()


def test_runs_of_version_01_are_used_and_named(table: MakeTable, tmp_path: Path) -> None:
    """As this version would make them: not run again, and marked in the cell and in the notes."""
    planned, pool = table("table3", ["WT-S"]), Pool(tmp_path)
    for spec in run_table(planned, pool)[:1]:
        path = pool.folder(spec).path / "environment.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "sparseffn": "0.1.0"}))
    result = table_result(planned, pool)
    assert [cell.status for cell in result.cells] == ["measured"] * 2
    assert [cell.versions for cell in result.cells] == [["0.1.0"], [__version__]]
    assert "of 2 runs, version 0.1.0 made 1" in result.notes


def test_method_of_another_revision_is_another_run(table: MakeTable) -> None:
    """The released S-BASE of 0.1 balanced the whole batch: its runs do not stand for this version's; the paper's form does."""
    planned = table("table10", ["WT-S"], ["s-base, K=4, G=128", "s-base, K=4, G=128 (Sinkhorn as released)"])
    digests = {cell.key: (cell.specs[0].digest, json_digest(cell.specs[0].identity)) for cell in planned.cells}
    paper, released = digests.values()
    assert paper[0] == paper[1] and released[0] != released[1]


def test_runs_of_other_sources_are_counted(table: MakeTable, tmp_path: Path) -> None:
    """Runs of older code have no digest of it; with those of the same code there is nothing to say."""
    pool = Pool(tmp_path)
    specs = run_table(table("table3", ["WT-S"]), pool)

    def note() -> str | None:
        return makers_note(finished for spec in specs if (finished := pool.status(spec).finished) is not None)

    assert note() is None
    for spec, change in zip(specs, ({"sources": "0" * 32}, {}), strict=True):
        path = pool.folder(spec).path / "environment.json"
        kept = {key: value for key, value in json.loads(path.read_text()).items() if key != "sources"}
        path.write_text(json.dumps({**kept, **change}))
    found = note()
    assert found is not None and found.startswith("of 2 runs, other") and found.endswith("made 1, and unknown ones 1")


def test_damaged_result_is_failed_with_the_file(table: MakeTable, tmp_path: Path) -> None:
    """Never a number from a file that does not parse."""
    planned, pool = table("table3", ["WT-S"], ["dense"]), Pool(tmp_path)
    (spec,) = run_table(planned, pool)
    pool.folder(spec).result_path.write_text("{")
    cell = table_result(planned, pool).cells[0]
    assert cell.status == "failed" and "result.json` must hold JSON" in str(cell.reason)


def test_loss_without_a_perplexity_is_a_failure(table: MakeTable, tmp_path: Path) -> None:
    """Its table is written all the same."""
    planned, pool = table("table3", ["WT-S"], ["dense"]), Pool(tmp_path)
    (spec,) = run_table(planned, pool)
    folder = pool.folder(spec)
    dataclasses.replace(TrainResult.read(folder.result_path), test=800.0).write(folder)
    result = table_result(planned, pool)
    write_json(tmp_path / "table.json", result)
    cell = result.cells[0]
    assert cell.status == "failed" and cell.reason == "a loss of 800 nats has no perplexity"


@pytest.mark.parametrize("damage", ["missing", "cut", "empty", "nan"])
def test_damaged_windows_cost_their_run_alone(table: MakeTable, tmp_path: Path, damage: str) -> None:
    """The other rows of the table stay; this one says which file it is."""
    planned, pool = table("table3", ["WT-S"]), Pool(tmp_path)
    _, sigma = run_table(planned, pool)
    # A result of version 0.1, which knows no digests of other files.
    result = pool.folder(sigma).result_path
    write_json(result, dataclasses.asdict(TrainResult.read(result)))
    path = pool.folder(sigma).window_losses_path("test")
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-5])
    else:
        np.save(path, np.full(0 if damage == "empty" else 3, np.nan))
    cells = table_result(planned, pool).cells
    assert [cell.status for cell in cells] == ["measured", "failed"]
    assert "windows-test.npy` must hold" in str(cells[1].reason) and "remove the run's folder" in str(cells[1].reason)


def test_two_processes_do_not_share_a_run(table: MakeTable, tmp_path: Path) -> None:
    """The second one leaves it alone and says so."""
    ((_, _, spec),) = table("table3", ["WT-S"], ["dense"]).runs()
    pool = Pool(tmp_path)
    with pool.claimed(spec) as ours:
        assert ours and execute(Pool(tmp_path), spec).reason == "another process is running it"
    assert not pool.folder(spec).path.exists()


def test_stopped_step_does_not_count(table: MakeTable, tmp_path: Path) -> None:
    """A step of an hour among others: the time that is compared stays that of a usual one."""
    planned, pool = table("table3", ["WT-S"]), Pool(tmp_path)
    for spec in run_table(planned, pool):
        folder = pool.folder(spec)
        records, result = folder.read_metrics(), TrainResult.read(folder.result_path)
        for record in records:
            if "time_s" in record:
                record["time_s"] = 0.1 * record["step"] + 3600.0 * (record["step"] >= 2)
        folder.metrics_path.write_text("".join(json.dumps(record) + "\n" for record in records))
        result.write(folder)
    result = table_result(planned, pool)
    assert [cell.train_s for cell in result.cells] == pytest.approx([0.4, 0.4])
    assert result.columns[0].equal_time_s == pytest.approx(0.4)
    assert all((cell.equal_time or 0) > 0 for cell in result.cells)


def test_digest_depends_on_every_setting(table: MakeTable) -> None:
    """Each of training, the model, its block, and the corpus; not on the table."""
    ((_, _, spec),) = table("table3", ["WT-S"], ["sigma-moe"]).runs()
    words = {"optimizer": "adamw", "precision": "bfloat16"}
    train = {
        field.name: words.get(field.name) or 2 * getattr(spec.train, field.name) or 2
        for field in dataclasses.fields(spec.train)
    }
    changed = [
        *(dataclasses.replace(spec, train=dataclasses.replace(spec.train, **{name: value})) for name, value in train.items()),
        dataclasses.replace(spec, model=dataclasses.replace(spec.model, d_head=4)),
        dataclasses.replace(spec, model=dataclasses.replace(spec.model, ffn=spec.model.ffn.replace(k=3))),
        dataclasses.replace(spec, corpus=dataclasses.replace(spec.corpus, digest="0" * 32)),
    ]
    digests = [spec.digest, *(one.digest for one in changed)]
    assert len(set(digests)) == len(digests) == len(train) + 4
    ((_, _, same),) = table("table10", ["WT-S"], ["sigma-moe"]).runs()
    assert same.digest == spec.digest


def test_table_result_is_complete(table: MakeTable, tmp_path: Path) -> None:
    """Mean, spread, load, and a reason for the seed that is not there."""
    planned, pool = table("table3", ["WT-S"], None, (0, 1)), Pool(tmp_path)
    runs = list(planned.runs())
    for _, _, spec in runs[:3]:
        execute(pool, spec)
    result = table_result(planned, pool)
    json.dumps(to_builtins(result), allow_nan=False)
    dense, sigma = result.cells
    assert dense.n == 2 and (dense.spread or 0) > 0 and dense.mean == pytest.approx(np.mean(dense.values))
    assert sigma.n == 1 and sigma.spread is None and sigma.reason == "seed 1: not run yet"
    assert sigma.flops_percent == 25.0 and dense.equal_time is not None
    assert result.columns[0].metric == "bits per byte" and result.rows[0].published_label == "dense"
