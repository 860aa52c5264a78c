"""`sparseffn reproduce evidence`: the list of runs that decide the claims, and spending a budget of time on it."""

from __future__ import annotations

import argparse
from pathlib import Path

from sparseffn.cli.output import Watch, clock, parse_duration, print_files, print_json, print_rows
from sparseffn.cli.reproduce_jobs import run_here
from sparseffn.cli.reproduce_options import typed
from sparseffn.cli.reproduce_output import write_tables
from sparseffn.errors import UserError
from sparseffn.paper.evidence import Item, evidence_items, evidence_result, evidence_tables, run_until_budget
from sparseffn.paper.measured import table_result
from sparseffn.paper.planned import Request
from sparseffn.paper.pool import Pool
from sparseffn.storage import write_json

TABLES = "runs/evidence"
"""Folder that is proposed for the tables."""


def evidence_command(options: argparse.Namespace, request: Request, pool: Pool) -> int:
    """Go on with the missing runs while the budget lasts, then say how all of them stand."""
    if request.scale.is_published:
        raise UserError("`--scale` must be cpu or base for evidence; got 'paper'; fix: leave it out for cpu")
    lists = [f"--{name.replace('_', '-')}" for name in ("list", "dry_run", "view") if getattr(options, name)]
    if options.budget is None and not lists:
        raise UserError("evidence needs a budget of time; got none; fix: --budget 60m, or --list to see the order")
    if options.budget is not None and lists:
        raise UserError(
            f"`--budget` must be left out with {' '.join(lists)}, which trains nothing; got {options.budget}; "
            "fix: leave out one of them"
        )
    if options.jobs != 1:
        raise UserError(f"evidence runs one at a time, as its times are compared; got --jobs {options.jobs}; fix: leave it out")
    items = evidence_items(request)
    if options.budget is not None:
        _spend(items, pool, parse_duration(options.budget))
    result = evidence_result(items, pool)
    index: list[Path] = []
    if options.out is not None:
        write_json(Path(options.out) / "evidence.json", result)
        index = write_tables(
            {planned.table.name: table_result(planned, pool) for planned in evidence_tables(request, pool)},
            options.out,
        )
    if options.json:
        print_json(result)
        return 0
    rows = [
        (
            str(run.position),
            run.table,
            run.label,
            str(run.seed),
            run.why,
            run.reason or run.status,
            "" if run.wall_s is None else clock(run.wall_s),
        )
        for run in result.runs
    ]
    print_rows(("", "table", "row", "seed", "decides", "status", "time"), rows, n_words=6)
    done = [run.wall_s for run in result.runs if run.wall_s is not None]
    print(f"\n{len(done)} of {len(rows)} runs finished in {clock(sum(done))}")
    if options.out is None:
        print(f"their tables are written by:\n  {view_command(options)}")
    print_files(index)
    return 0


def view_command(options: argparse.Namespace) -> str:
    """The command that writes the tables of the list, each row with the seeds that are planned or there, and trains nothing."""
    # All that a run's digest or its place depends on.
    rest = typed(options, ("scale", "steps", "corpus", "tokenizer", "vocab_size", "data_dir", "cache_dir", "pool"))
    return f"sparseffn reproduce evidence --view --out {TABLES} {rest}"


def _spend(items: list[Item], pool: Pool, budget_s: float) -> None:
    watch = Watch(lambda nats: f"loss {nats:.3f} nats")
    wanted = [item for item in items if pool.status(item.spec).wanted]
    position = {item.spec.digest: place for place, item in enumerate(wanted)}

    def run(item: Item) -> None:
        run_here((item.label, item.seed, item.spec), pool, position[item.spec.digest], len(wanted), watch)

    try:
        run_until_budget(items, pool, budget_s, run, log=watch.say)
    finally:
        watch.close()
