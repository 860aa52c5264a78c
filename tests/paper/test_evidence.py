"""Evidence: the most decisive runs first, none twice, none that does not fit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from micro_tables import MakeTable
from msgspec import structs

from sparseffn import __version__
from sparseffn.errors import UserError
from sparseffn.paper import evidence
from sparseffn.paper.corpus_choice import Corpora
from sparseffn.paper.costs import Speed, dry_run
from sparseffn.paper.evidence import (
    COLUMN,
    STAGES,
    Item,
    Stage,
    estimated_s,
    evidence_items,
    evidence_result,
    evidence_tables,
    lacking_runs,
    listed_items,
    run_until_budget,
)
from sparseffn.paper.execution import execute
from sparseffn.paper.measured import table_result
from sparseffn.paper.planned import Request
from sparseffn.paper.pool import Pool
from sparseffn.paper.rules import rules
from sparseffn.paper.scales import Scale, get_scale
from sparseffn.results.experiment_result import ExperimentRun
from sparseffn.storage import write_json
from sparseffn.training.step_costs import forward_flops


@pytest.fixture
def request_micro(micro: Scale, corpora: Corpora) -> Request:
    """The micro scale."""
    return Request(scale=micro, corpora=corpora)


def test_headline_comes_first_and_no_run_twice(request_micro: Request) -> None:
    """Dense and sigma-moe with three seeds, one seed after the other; then two seeds of the rest."""
    items = evidence_items(request_micro)
    assert [(item.label, item.seed) for item in items[:6]] == [(m, s) for s in range(3) for m in ("dense", "sigma-moe")]
    assert {item.table for item in items[6:]} == {"table10", "table1", "table6"} and {i.seed for i in items[6:]} == {0, 1}
    order = [item.table for item in items]
    assert order == sorted(order, key=["table3", "table10", "table1", "table6"].index)
    assert len({item.spec.digest for item in items}) == len(items) == 40


def test_no_claim_is_named_that_the_column_cannot_decide() -> None:
    """Without expert dropout in the column, "no reg" is without the entropy loss alone."""
    delta = get_scale("cpu").column(COLUMN).shape.expert_dropout
    (stage,) = [stage for stage in STAGES if "no reg (gamma=0, delta=0)" in stage.rows]
    assert delta == 0 and "but for expert dropout" in stage.why


SHORT = (Stage(table="table3", rows=("sigma-moe", "dense"), n_seeds=1, why="headline"),)


def test_rows_keep_every_seed_that_exists(request_micro: Request, tmp_path: Path) -> None:
    """Each row its own number; a difference is over the seeds that both have, and nobody asks for what no stage wants."""
    stages = (
        Stage(table="table3", rows=("dense", "sigma-moe"), n_seeds=3, why="headline"),
        Stage(table="table10", rows=("standard init",), n_seeds=1, why="another"),
    )
    pool = Pool(tmp_path)
    seeds = dataclasses.replace(stages[1], n_seeds=2)
    for item in evidence_items(request_micro, (stages[0], seeds)):
        if (item.label, item.seed) != ("sigma-moe", 1):
            execute(pool, item.spec)
    dense, sigma, init = table_result(evidence_tables(request_micro, pool, stages)[1], pool).cells
    assert (dense.seeds, sigma.seeds, init.seeds) == ([0, 1, 2], [0, 2], [0, 1])
    assert (sigma.reason, init.reason) == ("seed 1: not run yet", None)
    assert [found and found.n_seeds for found in (init.against_dense, init.against_sigma_moe)] == [2, 1]


def test_budget_stops_before_what_does_not_fit(request_micro: Request, tmp_path: Path) -> None:
    """Two of 10 s each in 25 s; the next call goes on with the third and repeats none."""
    stage = Stage(table="table3", rows=("dense", "sigma-moe"), n_seeds=2, why="headline")
    items, pool = evidence_items(request_micro, (stage,)), Pool(tmp_path)
    now, started, said = [0.0], [], []

    def run(item: Item) -> None:
        started.append((item.label, item.seed))
        execute(pool, item.spec)
        now[0] += 10.0

    def go(budget_s: float) -> int:
        return run_until_budget(items, pool, budget_s, run, log=said.append, clock=lambda: now[0], estimate=lambda i, w: 10.0)

    assert go(25.0) == 2 and "next is dense, seed 1: about 10 s, and 5 s are left" in said[0]
    assert go(15.0) == 1 and go(100.0) == 1 and go(100.0) == 0
    assert started == [("dense", 0), ("sigma-moe", 0), ("dense", 1), ("sigma-moe", 1)]
    assert {run.status for run in evidence_result(items, pool).runs} == {"finished"}


def test_tables_whose_runs_are_gone_are_known(request_micro: Request, tmp_path: Path) -> None:
    """Of a record in the folder, the finished runs that the pool has not; none where there is no record or none is finished."""
    items, pool = evidence_items(request_micro, SHORT), Pool(tmp_path / "pool")
    assert lacking_runs(tmp_path, items, pool) == []
    stored = evidence_result(items, pool)
    write_json(tmp_path / "evidence.json", stored)
    assert lacking_runs(tmp_path, items, pool) == []
    runs = [structs.replace(run, status="finished") for run in stored.runs]
    write_json(tmp_path / "evidence.json", structs.replace(stored, runs=runs))
    assert lacking_runs(tmp_path, items, pool) == items


def test_experiments_are_listed_around_the_tables(request_micro: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first before, the others after; parts by name, and a name that nothing has is refused."""
    planned = {name: structs.replace(rule, scale="micro") for name, rule in rules().items()}
    monkeypatch.setattr(evidence, "rules", lambda: planned)
    names = list(dict.fromkeys(item.table for item in listed_items(request_micro)))
    first, *others = rules()
    assert names == [first, "table3", "table10", "table1", "table6", *others] and first == "control"
    assert {item.table for item in listed_items(request_micro, ("ablations", "table1"))} == {"ablations", "table1"}
    with pytest.raises(UserError, match="control"):
        listed_items(request_micro, ("controls",))


def test_what_changes_no_verdict_is_not_run(request_micro: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One expert is worse at the first look, of six seeds, and has no seventh; the others do not."""
    planned = {name: structs.replace(rule, scale="micro") for name, rule in rules().items()}
    monkeypatch.setattr(evidence, "rules", lambda: planned)
    items, pool, started = listed_items(request_micro, ("ablations",)), Pool(tmp_path), []
    recorded = {
        item.spec.digest: ExperimentRun(
            candidate=item.label, seed=item.seed, test=1.3 + 0.1 * item.label.startswith("K = 1") + 0.001 * (i % 5), valid=1.3,
            train_s=1.0, wall_s=1.0, digest=item.spec.digest, version=__version__, sources="",
        )
        for i, item in enumerate(items[:42])
    }  # fmt: skip
    done = run_until_budget(items, pool, 1.0, started.append, recorded=recorded, clock=lambda: 0.0, estimate=lambda i, w: 1.0)
    assert done == len(started) == 36 and {item.label for item in started} == {i.label for i in items} - {"K = 1, G 256"}
    result = evidence_result(items, pool, recorded)
    settled = [(run.label, run.seed) for run in result.runs if run.status == "settled"]
    assert settled == [("K = 1, G 256", seed) for seed in range(206, 212)]


def test_estimate_is_of_the_same_model_else_by_flops(request_micro: Request) -> None:
    """The other seed's time; another model's scaled by FLOPs; measured steps where nothing is finished."""
    stage = Stage(table="table3", rows=("dense", "sigma-moe"), n_seeds=2, why="headline")
    dense, sigma, again, _ = [item.spec for item in evidence_items(request_micro, (stage,))]
    specs = {spec.digest: spec for spec in (dense, sigma, again)}
    assert estimated_s(again, {dense.digest: 7.0, sigma.digest: 5.0}, specs) == 7.0
    assert 1.0 < estimated_s(sigma, {dense.digest: 7.0}, specs) < 7.0
    assert 0 < estimated_s(dense, {}, specs) < 60


def test_flops_are_those_of_the_matrix_products(request_micro: Request) -> None:
    """Against PyTorch's counter, with the memory full: a training forward of dense and mixture."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from sparseffn.models import TransformerXL

    for item in evidence_items(request_micro, SHORT):
        model, train = TransformerXL(item.spec.model).train(), item.spec.train
        tokens = torch.zeros(train.batch, train.context, dtype=torch.int64)
        memory = tuple(torch.zeros(train.batch, train.memory, item.spec.model.d_model) for _ in model.layers)
        with FlopCounterMode(display=False) as counter:
            model(tokens, memory)
        assert counter.get_total_flops() == pytest.approx(forward_flops(item.spec.model, train) * tokens.numel(), rel=0.02)


def test_dry_run_counts_shared_runs_once(table: MakeTable) -> None:
    """C4-S has the sizes of WT-S; totals count seeds and distinct runs."""
    planned = [table("table3", ["WT-S", "C4-S"], None, (0, 1)), table("table10", ["WT-S"], ["sigma-moe"])]
    speed = Speed(dense=1e9, mixture=5e8, basis="a test")
    result = dry_run(planned, speed)
    assert [run.shared for run in result.runs] == [False, True, False, True, True]
    assert result.n_distinct == 4
    assert [run.flops_percent for run in result.runs[::2]] == [100.0, 25.0, 25.0]
    assert all(25.0 < run.counted_flops_percent < 60.0 for run in result.runs[2:])
    cell, dense = planned[0].cells[0], result.runs[0]
    assert dense.seconds_here == pytest.approx(dense.training_flops / 1e9)
    assert dense.params == cell.model.num_params() and dense.tokens == 4 * 32
    own = sum(run.training_flops for run in result.runs if not run.shared)
    assert result.totals.training_flops == pytest.approx(2 * own)
