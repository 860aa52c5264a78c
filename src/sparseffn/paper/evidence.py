"""`reproduce evidence`: the runs that decide the paper's claims at scale cpu, most decisive first, within a budget of time.

First the control, by rules that stood before its runs; then the headline, dense against sigma-MoE, with three seeds; the core
rows of table 10 with two; Top-K and product keys with two; last the other experiments, by rules again. Each call goes on with
what is missing and starts no run that would not fit.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch

from sparseffn.errors import unknown_name
from sparseffn.paper.costs import measured_step_s, training_flops
from sparseffn.paper.experiments import awaited_seeds, experiment_runs, suffices
from sparseffn.paper.jobs import NamedRun
from sparseffn.paper.planned import PlannedTable, Request, plan_table
from sparseffn.paper.pool import Finished, Pool, RunSpec, Status
from sparseffn.paper.rules import Rule, rules
from sparseffn.paper.tables import Table, get_table
from sparseffn.results.evidence_result import EvidenceResult, EvidenceRun
from sparseffn.results.experiment_result import ExperimentResult, ExperimentRun
from sparseffn.storage import read

COLUMN = "WT-S"
# Evaluation and counting on top of training, before any run has shown it.
_OVERHEAD = 1.4
_CPU = torch.device("cpu")
_NOTHING: Mapping[str, ExperimentRun] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Rows of one table, all with one seed before any with the next."""

    table: str
    rows: tuple[str, ...]
    n_seeds: int
    why: str


# The models of scale cpu have no dropout: Switch with it inside the experts alone would be handicapped.
_RENORM, _SWITCH, _SBASE = "softmax after top-k (renorm.)", "switch, K=1, G=512, no dropout", "s-base, K=4, G=128"
_NO_TOP_K = " (no top-K, as released)"
STAGES = (
    Stage(table="table3", rows=("dense", "sigma-moe"), n_seeds=3, why="claims 1, 5, 18"),
    Stage(
        table="table10",
        rows=(
            "softmax before top-k (no renorm.)",
            _RENORM,
            f"{_RENORM} (balanced over the K slots, as released)",
            _SWITCH,
            _SBASE,
            f"{_SBASE} (Sinkhorn as released)",
            "standard init",
            "no reg (gamma=0, delta=0)",
            f"{_SWITCH} (balancing weight 0.01 / N_E^2, as released)",
        ),
        n_seeds=2,
        # Delta is 0 in this column: "no reg" takes away the entropy loss alone.
        why="claims 10-12 but for expert dropout, which column WT-S has not (delta 0), and 20, 21",
    ),
    Stage(table="table1", rows=tuple(f"Top-K, K={k}" for k in (128, 256, 512, 64)), n_seeds=2, why="claim 15"),
    Stage(
        table="table6",
        rows=tuple(f"pkm, parameters, {name}{form}" for name in ("relu", "softmax") for form in ("", _NO_TOP_K)),
        n_seeds=2,
        why="claims 16, 17",
    ),
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Item(NamedRun):
    """One run of the list."""

    table: str
    why: str


def evidence_items(request: Request, stages: Sequence[Stage] = STAGES) -> list[Item]:
    """All runs, in order; a run that an earlier stage holds is not repeated.

    Raises:
        UserError: the corpus is not there.
    """
    items: dict[str, Item] = {}
    for stage in stages:
        staged = dataclasses.replace(request, seeds=tuple(range(stage.n_seeds)))
        table = get_table(stage.table).selected(columns=[COLUMN], rows=stage.rows, settings="paper")
        planned = plan_table(table, staged)
        # What `reason` holds is why there is no corpus: asked for again, it raises.
        request.corpora.of(planned.columns[0].column)
        for cell, seed, spec in sorted(planned.runs(), key=lambda run: (run[1], stage.rows.index(run[0].key))):
            item = Item(label=cell.sized.label, table=stage.table, seed=seed, spec=spec, why=stage.why)
            items.setdefault(spec.digest, item)
    return list(items.values())


def listed_items(request: Request, only: Collection[str] = ()) -> list[Item]:
    """All runs in the order in which they are trained: tables between the first experiment of the scale and its others.

    Args:
        request: what is common to all.
        only: names of tables and experiments; empty for all.

    Raises:
        UserError: the corpus is not there, or nothing has such a name.
    """
    parts: dict[str, list[Item]] = {}
    for name, rule in experiments(request).items():
        runs = experiment_runs(rule, request)
        items = [Item(label=r.label, table=name, seed=r.seed, spec=r.spec, why=f"claims {rule.claims}") for r in runs]
        parts[name] = items
        if len(parts) == 1:
            for item in evidence_items(request):
                parts.setdefault(item.table, []).append(item)
    parts = parts or {"": evidence_items(request)}
    if unknown := [name for name in only if name not in parts]:
        raise unknown_name("part", unknown[0], parts)
    return [item for name, items in parts.items() for item in items if not only or name in only]


def experiments(request: Request) -> Mapping[str, Rule]:
    """Those that are planned at the scale."""
    return {name: rule for name, rule in rules().items() if rule.scale == request.scale.name}


def evidence_tables(request: Request, pool: Pool, stages: Sequence[Stage] = STAGES) -> list[PlannedTable]:
    """Each stage's rows as a table, with the dense model, and sigma-MoE where the table has it, to be compared with.

    A row has the seeds that some stage wants for it and those that the pool holds beyond them, whatever the other rows have.
    """
    wanted = {item.spec.digest for item in evidence_items(request, stages)}
    tables = []
    for stage in stages:
        table = get_table(stage.table)
        headline = [row.key for row in table.rows if row.key in ("dense", "sigma-moe")]
        chosen = table.selected(columns=[COLUMN], rows=list(dict.fromkeys([*headline, *stage.rows])), settings="paper")
        tables.append(_with_held_seeds(chosen, request, pool, wanted))
    return tables


def _with_held_seeds(table: Table, request: Request, pool: Pool, wanted: Collection[str]) -> PlannedTable:
    """A table with as many seeds as are wanted or held of any of its rows."""

    def has_place(spec: RunSpec) -> bool:
        return spec.digest in wanted or pool.status(spec).kind != "missing"

    def plan(n_seeds: int) -> PlannedTable:
        return plan_table(table, dataclasses.replace(request, seeds=tuple(range(n_seeds))))

    n_seeds = 1
    while any(has_place(cell.specs[n_seeds]) for cell in plan(n_seeds + 1).cells):
        n_seeds += 1
    planned = plan(n_seeds)
    cells = [
        dataclasses.replace(cell, specs={seed: spec for seed, spec in cell.specs.items() if has_place(spec)})
        for cell in planned.cells
    ]
    return dataclasses.replace(planned, cells=cells)


def recorded_runs(out: Path, request: Request, only: Collection[str] = ()) -> dict[str, ExperimentRun]:
    """What records of experiments in a folder hold of runs, by digest: verdicts do not need these in the pool.

    Args:
        out: the folder.
        request: what is common to all.
        only: names of experiments, whose records and those that share runs with them are read; empty for all.

    Raises:
        UserError: a record is damaged. It may be all that is left of its runs.
    """
    planned = experiments(request)
    wanted = {name for name, rule in planned.items() if not only or name in only or rule.shares in only}
    wanted |= {shared for name in wanted if (shared := planned[name].shares) is not None}
    paths = [path for name in sorted(wanted) if (path := out / f"{name}.json").exists()]
    runs = [run for path in paths for run in read(path, ExperimentResult, fix="restore it, or remove it with its runs").runs]
    # Of a run that two experiments share, the record with loads.
    return {run.digest: run for run in sorted(runs, key=lambda run: len(run.loads))}


def statuses(items: Sequence[Item], pool: Pool, recorded: Mapping[str, ExperimentRun]) -> dict[str, Status]:
    """How runs stand, by digest.

    One that the pool has not is `recorded` where its record is all that its experiments ask, and `settled` where what it would
    be compared for is decided without it.
    """
    planned = [(item, rules()[item.table]) for item in items if item.table in rules()]
    asking: dict[str, list[Rule]] = {}
    for item, rule in planned:
        asking.setdefault(item.spec.digest, []).append(rule)
    found = {item.spec.digest: pool.status(item.spec) for item in items}
    tests = {digest: status.finished.result.test for digest, status in found.items() if status.finished is not None}
    for digest in asking.keys() & recorded.keys() - tests.keys():
        if all(suffices(recorded[digest], rule) for rule in asking[digest]):
            found[digest] = Status(kind="recorded", reason=None)
            tests[digest] = recorded[digest].test
    losses: dict[str, dict[str, dict[int, float]]] = {item.table: {} for item, _ in planned}
    for item, _ in planned:
        if (test := tests.get(item.spec.digest)) is not None:
            losses[item.table].setdefault(item.label, {})[item.seed] = test
    awaited = {name: awaited_seeds(rules()[name], of) for name, of in losses.items()}
    needed = {item.spec.digest for item, rule in planned if rule.seeds.index(item.seed) < awaited[item.table][item.label]}
    settled = Status(kind="settled", reason="its comparisons are decided")
    return found | {digest: settled for digest in asking.keys() - needed if found[digest].wanted}


def evidence_result(items: Sequence[Item], pool: Pool, recorded: Mapping[str, ExperimentRun] = _NOTHING) -> EvidenceResult:
    """The order and how each run stands; `recorded` is of `recorded_runs`."""
    runs, found = [], statuses(items, pool, recorded)
    for position, item in enumerate(items, 1):
        status = found[item.spec.digest]
        source = recorded[item.spec.digest] if status.kind == "recorded" else status.finished
        runs.append(
            EvidenceRun(
                position=position,
                table=item.table,
                label=item.label,
                seed=item.seed,
                why=item.why,
                status=status.kind,
                reason=status.reason,
                wall_s=None if source is None else source.wall_s,
                digest=item.spec.digest,
            )
        )
    return EvidenceResult(column=COLUMN, runs=runs)


def lacking_runs(out: Path, items: Sequence[Item], pool: Pool) -> list[Item]:
    """Runs that an earlier record in a folder has finished and the pool does not: its tables could not be made again."""
    path = out / "evidence.json"
    if not path.exists():
        return []
    held = {run.digest for run in read(path, EvidenceResult, fix="remove it").runs if run.status == "finished"}
    return [item for item in items if item.spec.digest in held and pool.status(item.spec).kind != "finished"]


def run_until_budget(
    items: Sequence[Item],
    pool: Pool,
    budget_s: float,
    run: Callable[[Item], None],
    *,
    recorded: Mapping[str, ExperimentRun] = _NOTHING,
    device: torch.device = _CPU,
    log: Callable[[str], None] = lambda text: None,
    clock: Callable[[], float] = time.monotonic,
    estimate: Callable[[Item, Mapping[str, float]], float] | None = None,
) -> int:
    """Do the missing runs in order until the next one would not fit the budget; those that change no verdict are left out.

    Args:
        items: the list.
        pool: where runs are kept.
        budget_s: seconds.
        run: does one run.
        recorded: of `recorded_runs`; what it holds is not missing.
        device: that the runs are on.
        log: receives what happens, in words.
        clock: seconds from any start.
        estimate: seconds of a run, given the wall time of the finished ones by digest.

    Returns:
        The number of runs that were started.
    """
    started, n_started = clock(), 0
    specs = {item.spec.digest: item.spec for item in items}
    estimate = estimate or (lambda item, walls: estimated_s(item.spec, walls, specs, device))
    stand = statuses(items, pool, recorded)
    walls = {digest: _usual_s(status.finished) for digest, status in stand.items() if status.finished is not None}
    for item in items:
        if not stand[item.spec.digest].wanted:
            continue
        needed, left = estimate(item, walls), budget_s - (clock() - started)
        if needed > left:
            words = f"about {needed:.0f} s, and {max(0.0, left):.0f} s are left of the budget"
            log(f"next is {item.label}, seed {item.seed}: {words}")
            break
        run(item)
        n_started += 1
        # It may have decided what others are for.
        stand = statuses(items, pool, recorded)
        if (finished := stand[item.spec.digest].finished) is not None:
            walls[item.spec.digest] = _usual_s(finished)
    return n_started


def _usual_s(finished: Finished) -> float:
    """Seconds of a finished run without what slowed single steps: the median step, and what came on top of training."""
    return finished.train_s + max(0.0, finished.wall_s - finished.result.seconds)


def estimated_s(spec: RunSpec, walls: Mapping[str, float], specs: Mapping[str, RunSpec], device: torch.device = _CPU) -> float:
    """Seconds of a run: of the same model with another seed, else by FLOPs from the others, else from measured steps."""
    same = [wall for digest, wall in walls.items() if _differs_in_seed(specs[digest], spec)]
    if same:
        return max(same)
    if walls:
        # The slowest speed seen: a run that is too long for the budget is worse than one that is left for the next call.
        slowest = max(wall / training_flops(specs[digest].model, specs[digest].train) for digest, wall in walls.items())
        return slowest * training_flops(spec.model, spec.train)
    return _OVERHEAD * spec.train.steps * measured_step_s(spec.model, spec.train, device)


def _differs_in_seed(a: RunSpec, b: RunSpec) -> bool:
    return a.model == b.model and dataclasses.replace(a.train, seed=b.train.seed) == b.train
