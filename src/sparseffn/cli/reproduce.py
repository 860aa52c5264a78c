"""`reproduce table` and `reproduce evidence`: missing runs of the pool are trained, then tables or the list are printed."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sparseffn.cli.launched import led
from sparseffn.cli.output import (
    Progress,
    can_draw,
    check_seeds,
    clock,
    console,
    log,
    parse_duration,
    print_files,
    print_json,
    print_records,
    use_machine,
)
from sparseffn.cli.reproduce_settings import ReproduceEvidence, ReproduceTable, Runs
from sparseffn.errors import UserError
from sparseffn.paper.claims import decide
from sparseffn.paper.corpus_choice import Corpora, CorpusChoice
from sparseffn.paper.costs import measure_speed
from sparseffn.paper.evidence import (
    Item,
    evidence_items,
    evidence_result,
    evidence_tables,
    experiments,
    lacking_runs,
    listed_items,
    recorded_runs,
    run_until_budget,
    statuses,
)
from sparseffn.paper.experiments import experiment_result, experiment_runs
from sparseffn.paper.jobs import check_layouts, run_all, run_here
from sparseffn.paper.measured import table_result
from sparseffn.paper.planned import Request
from sparseffn.paper.pool import Pool
from sparseffn.paper.reproduction import Reproduction
from sparseffn.paper.scales import get_scale
from sparseffn.report import formats
from sparseffn.report.paper_plots import sweep_plots
from sparseffn.report.paper_report import print_paper_table, write_index, write_paper_table
from sparseffn.report.plotting import write_plots
from sparseffn.results.bench_result import LayerResult
from sparseffn.results.experiment_result import ExperimentRun
from sparseffn.results.table_result import DryRunResult, PaperTable, TableResult
from sparseffn.storage import default_cache_dir, read, write_json
from sparseffn.training.layout import Strategy

TABLES = "runs/evidence"
"""Folder that is proposed for the tables of the evidence."""


@led
def tables(settings: ReproduceTable) -> int:
    """Run each table's missing runs, then print it as the pool knows it."""
    device = use_machine(settings)
    seeds = parse_seeds(settings.seeds)
    request = _request(settings, closed=settings.dry_run, settings=settings.settings, seeds=seeds)
    reproduction = Reproduction.plan(settings.names, request, columns=settings.columns, rows=settings.rows)
    if settings.dry_run:
        costs = reproduction.dry_run(measure_speed(device))
        if settings.out is not None:
            write_json(Path(settings.out) / "dry-run.json", costs)
        print_json(costs) if settings.json else _print_dry_run(costs)
        return 0
    reproduction.require_corpus()
    pool = _pool(settings)
    if not settings.view:
        with Progress() as progress:
            run_all(
                reproduction.runs(),
                pool,
                jobs=settings.jobs,
                device=str(device),
                strategy=settings.strategy,
                progress=progress,
            )
    results = reproduction.results(pool)
    index = [] if settings.out is None else _write_tables(results, settings.out)
    found = list(results.values())
    if settings.json:
        print_json(found if len(found) > 1 else found[0])
        return 0
    for result in found:
        print_paper_table(result, console())
    print_files(index)
    return 0


def _pool(settings: Runs) -> Pool:
    return Pool(settings.pool or default_cache_dir() / "pool")


def _request(settings: ReproduceTable | ReproduceEvidence, /, *, closed: bool = False, **more: Any) -> Request:
    scale = get_scale(settings.scale)
    choice = CorpusChoice(name=settings.corpus, **settings.corpus_options())
    return Request(scale=scale, corpora=Corpora(scale=scale, choice=choice, closed=closed), steps=settings.steps, **more)


def parse_seeds(words: Sequence[str]) -> tuple[int, ...]:
    """`3` is seeds 0, 1, 2; several numbers, or `5,`, are those seeds."""
    try:
        numbers = [int(part) for word in words for part in word.split(",") if part]
    except ValueError:
        raise UserError(f"`--seeds` must be numbers; got {' '.join(words)!r}; fix: --seeds 3, or --seeds 0,4") from None
    if len(words) == 1 and "," not in words[0] and numbers:
        check_seeds(numbers[0])
        return tuple(range(numbers[0]))
    return tuple(numbers)


def _write_tables(results: Mapping[str, PaperTable], out: str) -> list[Path]:
    """Each table's JSON and, beside it, the renderings; returns the files of the index of all that the folder holds."""
    for name, result in results.items():
        path = Path(out) / f"{name}.json"
        write_json(path, result)
        write_paper_table(path)
        if isinstance(result, TableResult) and result.sweep and can_draw():
            write_plots(sweep_plots(result), path.parent)
    return write_index(out)


def _print_dry_run(result: DryRunResult) -> None:
    """Every run with its cost, and what the estimates rest on."""
    rows = [
        {
            "table": run.table,
            "column": run.column,
            "row": run.row + (" (shared)" if run.shared else ""),
            "params": formats.count(run.params),
            "residual": formats.signed_percent(run.residual_percent) + ("*" if run.unequal else ""),
            "FLOPs, K/N_E": "-" if run.flops_percent is None else formats.percent(run.flops_percent / 100),
            "FLOPs counted": formats.percent(run.counted_flops_percent / 100),
            "training FLOPs": f"{run.training_flops:.2e}",
            "tokens": formats.count(run.tokens),
            "memory": f"{run.memory_bytes / 2**30:.1f} GiB",
            "time here": _duration(run.seconds_here),
            "time GPU": _duration(run.seconds_gpu),
        }
        for run in result.runs
    ]
    print_records(rows, title=f"every run, scale {result.scale}", n_words=3)
    totals = result.totals
    print(
        f"\n{result.n_distinct} distinct runs, seeds counted: {totals.training_flops:.2e} FLOPs, "
        f"{_duration(totals.seconds_here)} here, {_duration(totals.seconds_gpu)} on the GPU"
    )
    if names := result.without_runs:
        print(f"- {', '.join(names)}: no run needed; `sparseffn reproduce table {' '.join(names)}` prints what is counted")
    for name in ("here", "gpu", "memory"):
        print(f"- {name}: {getattr(result, name)}")
    if any(run.unequal for run in result.runs):
        print("- *: more than 0.5% off the dense model's parameters, as published")
    for reason in dict.fromkeys(run.corpus_missing for run in result.runs if run.corpus_missing):
        print(f"- sizes without the corpus are of the vocabulary that it should have: {reason}")


def _duration(seconds: float) -> str:
    """In a unit that leaves few digits: some of these take years, which `clock` would give in hours."""
    for unit, size in (("y", 365.25 * 86400), ("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 1 else "under 1 s"


@led
def evidence(settings: ReproduceEvidence) -> int:
    """Go on with the missing runs while the budget lasts, then print how all of them stand."""
    device = use_machine(settings)
    request, pool = _request(settings), _pool(settings)
    items = listed_items(request, settings.only)
    recorded = {} if settings.out is None else recorded_runs(Path(settings.out), request, settings.only)
    if settings.budget is not None:
        _train(items, pool, recorded, parse_duration(settings.budget), device, settings.strategy)
    result = evidence_result(items, pool, recorded)
    index = [] if settings.out is None else _write_evidence(request, pool, recorded, settings, Path(settings.out))
    if settings.json:
        print_json(result)
        return 0
    rows = [
        {
            "": str(run.position),
            "table": run.table,
            "row": run.label,
            "seed": str(run.seed),
            "decides": run.why,
            "status": run.reason or run.status,
            "time": "" if run.wall_s is None else clock(run.wall_s),
        }
        for run in result.runs
    ]
    print_records(rows, n_words=6)
    done = [run.wall_s for run in result.runs if run.wall_s is not None]
    settled = sum(run.status == "settled" for run in result.runs)
    left_out = f", {settled} not needed as their comparisons are decided" if settled else ""
    print(f"\n{len(done)} of {len(rows)} runs finished in {clock(sum(done))}{left_out}")
    if settings.out is None:
        print(f"their tables are written by:\n  {_list_command(settings)}")
    print_files(index)
    return 0


def _write_evidence(
    request: Request, pool: Pool, recorded: Mapping[str, ExperimentRun], settings: ReproduceEvidence, out: Path
) -> list[Path]:
    """Records of experiments, tables and claims; tables whose runs the pool lacks stay as they are, and are decided again."""
    for name, rule in experiments(request).items():
        if not settings.only or name in settings.only:
            result = experiment_result(name, rule, experiment_runs(rule, request), pool, recorded)
            write_json(out / f"{name}.json", result)
    if settings.only:
        return []
    items = evidence_items(request)
    index: list[Path] = []
    if lacking := lacking_runs(out, items, pool):
        log(f"the tables of {out} stay as they are: the pool has not {len(lacking)} of the runs that they are of")
        names = dict.fromkeys(item.table for item in items)
        found = [read(out / f"{name}.json", TableResult, fix="run with the pool that it is of") for name in names]
    else:
        found = [table_result(planned, pool) for planned in evidence_tables(request, pool)]
        write_json(out / "evidence.json", evidence_result(items, pool))
        index = _write_tables({table.table: table for table in found}, str(out))
    bench = None if settings.bench is None else read(Path(settings.bench), LayerResult, fix="run `sparseffn bench layer`")
    write_json(out / "claims.json", decide(found, bench))
    return index


def _list_command(settings: ReproduceEvidence) -> str:
    """The command that writes the tables of the list, each row with the seeds that are planned or there, and trains nothing."""
    words = ["sparseffn", "reproduce", "evidence", "--list", "--out", TABLES]
    # All that a run's digest or its place depends on.
    for name in ("scale", "steps", "corpus", "tokenizer", "vocab_size", "data_dir", "cache_dir", "pool"):
        if (value := getattr(settings, name)) is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)


def _train(
    items: list[Item],
    pool: Pool,
    recorded: Mapping[str, ExperimentRun],
    budget_s: float,
    device: torch.device,
    strategy: Strategy,
) -> None:
    stand = statuses(items, pool, recorded)
    wanted = [item for item in items if stand[item.spec.digest].wanted]
    check_layouts(wanted, device=str(device), strategy=strategy)
    position = {item.spec.digest: place for place, item in enumerate(wanted)}
    with Progress() as progress:

        def run(item: Item) -> None:
            place = position[item.spec.digest]
            run_here(item, pool, place, len(wanted), device=str(device), strategy=strategy, progress=progress)

        run_until_budget(items, pool, budget_s, run, recorded=recorded, device=device, log=progress.log)
