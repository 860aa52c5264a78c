"""`sparseffn reproduce evidence`: the list of runs that decide the claims, and spending a budget of time on it."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from sparseffn.cli.output import Watch, clock, parse_duration, print_json, print_rows
from sparseffn.cli.reproduce_jobs import run_here
from sparseffn.cli.reproduce_output import write_tables
from sparseffn.errors import UserError
from sparseffn.recipes.paper.corpora import Corpora
from sparseffn.recipes.paper.evidence import Item, evidence_items, evidence_tables, list_json, spend
from sparseffn.recipes.paper.outcome import table_json
from sparseffn.recipes.paper.plan import Request
from sparseffn.recipes.paper.pool import Pool
from sparseffn.recipes.paper.scales import get_scale
from sparseffn.train.stored import write_json

# Evidence is what minutes on a few cores can give; `--scale base` is there for more.
_SCALE = "cpu"


def evidence_command(options: argparse.Namespace, request: Request, pool: Pool) -> int:
    """Go on with the missing runs while the budget lasts, then say how all of them stand."""
    if request.scale.is_published:
        scale = get_scale(_SCALE)
        request = dataclasses.replace(request, scale=scale, corpora=Corpora(scale=scale, choice=request.corpora.choice))
    if options.budget is None and not options.list:
        raise UserError("evidence needs a budget of time; got none; fix: --budget 60m, or --list to see the order")
    if options.jobs != 1:
        raise UserError(f"evidence runs one at a time, as its times are compared; got --jobs {options.jobs}; fix: leave it out")
    items = evidence_items(request)
    if options.budget is not None and not options.list:
        _spend(items, pool, parse_duration(options.budget))
    result = list_json(items, pool)
    if options.out is not None:
        write_json(Path(options.out) / "evidence.json", result)
        write_tables({planned.table.name: table_json(planned, pool) for planned in evidence_tables(request)}, options.out)
    if options.json:
        print_json(result)
        return 0
    rows = [
        (
            str(run["position"]),
            run["table"],
            run["label"],
            str(run["seed"]),
            run["why"],
            run["reason"] or run["status"],
            "" if run["wall_s"] is None else clock(run["wall_s"]),
        )
        for run in result["runs"]
    ]
    print_rows(("", "table", "row", "seed", "decides", "status", "time"), rows, n_words=6)
    done = [run["wall_s"] for run in result["runs"] if run["wall_s"] is not None]
    print(f"\n{len(done)} of {len(rows)} runs finished in {clock(sum(done))}; tables show them: sparseffn reproduce table10")
    return 0


def _spend(items: list[Item], pool: Pool, budget_s: float) -> None:
    watch = Watch(lambda nats: f"loss {nats:.3f} nats")
    wanted = [item for item in items if pool.status(item.spec).wanted]
    position = {item.spec.digest: place for place, item in enumerate(wanted)}

    def run(item: Item) -> None:
        run_here((item.label, item.seed, item.spec), pool, position[item.spec.digest], len(wanted), watch)

    try:
        spend(items, pool, budget_s, run, say=watch.say)
    finally:
        watch.close()
