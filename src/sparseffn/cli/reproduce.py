"""`sparseffn reproduce`: the paper's tables, one command each."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from sparseffn.cli.compare import set_threads
from sparseffn.cli.output import Watch, console, print_files, print_json
from sparseffn.cli.reproduce_evidence import evidence_command
from sparseffn.cli.reproduce_figures import FIGURE_NAMES, run_figures
from sparseffn.cli.reproduce_jobs import run_all
from sparseffn.cli.reproduce_options import checked
from sparseffn.cli.reproduce_output import print_dry_run, write_tables
from sparseffn.errors import UserError, unknown_name
from sparseffn.paper.choice import select_columns, select_tables
from sparseffn.paper.corpus_choice import Corpora, CorpusChoice
from sparseffn.paper.costs import dry_run, measure_speed
from sparseffn.paper.counted import COUNTED, settings_table, table7
from sparseffn.paper.measured import table_result
from sparseffn.paper.planned import PlannedTable, Request, plan_table
from sparseffn.paper.pool import Pool
from sparseffn.paper.scales import get_scale
from sparseffn.paper.tables import OWN_TABLES, get_table
from sparseffn.report.paper_report import print_paper_table
from sparseffn.results.table_result import PaperTable
from sparseffn.storage import default_cache_dir, write_json

PAPER_TABLES = tuple(f"table{n}" for n in range(1, 11))


def reproduce_command(options: argparse.Namespace) -> int:
    """Run each target's missing runs, then print its table as the pool knows it."""
    set_threads(options)
    targets = _targets(options.targets)
    _refuse_mixtures(targets)
    options = checked(options, targets)
    if targets[0] in FIGURE_NAMES:
        return run_figures(targets, options)
    if targets == ["evidence"]:
        return evidence_command(options, _request(options), _pool(options))
    request = _request(options)
    pool = _pool(options)
    tables = [get_table(name) for name in targets if name not in COUNTED]
    columns = select_columns(options.columns, tables, [name for name in targets if name in COUNTED])
    chosen = select_tables(tables, columns, options.rows, request)
    trained = {table.name: plan_table(table, request) for table in chosen}
    if options.dry_run:
        return _dry_run(options, trained, [name for name in targets if name in COUNTED])
    _refuse_without_corpus(trained, request)
    if not options.view:
        _run(options, pool, trained)
    results = {
        name: table_result(trained[name], pool) if name in trained else _counted(name, request, columns[name])
        for name in targets
    }
    return _show(options, results)


def _targets(names: list[str]) -> list[str]:
    """The targets in order; `all` is every table of the paper."""
    known = {*PAPER_TABLES, *OWN_TABLES, "all", "evidence", *FIGURE_NAMES}
    for name in names:
        if name not in known:
            raise unknown_name("target", name, known)
    expanded = [table for name in names for table in (PAPER_TABLES if name == "all" else (name,))]
    return list(dict.fromkeys(expanded))


def _refuse_mixtures(targets: Sequence[str]) -> None:
    """Figures and evidence are commands of their own.

    Raises:
        UserError: they are asked for together with something else.
    """
    figures = [target for target in targets if target in FIGURE_NAMES]
    if figures and len(figures) < len(targets):
        raise UserError("figures and tables must be asked for apart; got both; fix: run the command twice")
    if "evidence" in targets and len(targets) > 1:
        raise UserError("evidence must be asked for alone; got other targets too; fix: run the command twice")


def _pool(options: argparse.Namespace) -> Pool:
    return Pool(options.pool or default_cache_dir() / "pool")


def _request(options: argparse.Namespace) -> Request:
    scale = get_scale(options.scale)
    choice = CorpusChoice(
        name=options.corpus,
        tokenizer=options.tokenizer,
        vocab_size=options.vocab_size,
        data_dir=options.data_dir,
        cache_dir=options.cache_dir,
    )
    return Request(
        scale=scale,
        corpora=Corpora(scale=scale, choice=choice, closed=options.dry_run),
        settings=options.settings,
        seeds=parse_seeds(options.seeds),
        steps=options.steps,
    )


def parse_seeds(words: list[str]) -> tuple[int, ...]:
    """`3` is seeds 0, 1, 2; several numbers, or `5,`, are those seeds."""
    try:
        numbers = [int(part) for word in words for part in word.split(",") if part]
    except ValueError:
        raise UserError(f"`--seeds` must be numbers; got {' '.join(words)!r}; fix: --seeds 3, or --seeds 0,4") from None
    if len(words) == 1 and "," not in words[0] and numbers:
        if numbers[0] < 1:
            raise UserError(f"`--seeds` must be at least 1; got {numbers[0]}; fix: --seeds 1")
        return tuple(range(numbers[0]))
    return tuple(numbers)


def _refuse_without_corpus(trained: dict[str, PlannedTable], request: Request) -> None:
    """A scale none of whose corpora is there is an error; where some are, the others' columns say so."""
    columns = [column for planned in trained.values() for column in planned.columns]
    if columns and all(column.corpus is None for column in columns):
        raise UserError(f"scale {request.scale.name} needs its corpus: {columns[0].reason}")


def _dry_run(options: argparse.Namespace, trained: dict[str, PlannedTable], counted: Sequence[str]) -> int:
    result = dry_run(list(trained.values()), measure_speed(), counted)
    if options.out is not None:
        write_json(Path(options.out) / "dry-run.json", result)
    if options.json:
        print_json(result)
    else:
        print_dry_run(result)
    return 0


def _run(options: argparse.Namespace, pool: Pool, trained: dict[str, PlannedTable]) -> None:
    """The missing runs of all tables, each once."""
    runs = {}
    for planned in trained.values():
        for cell, seed, spec in planned.runs():
            name = f"{cell.sized.label}, {planned.columns[cell.column].column.name}"
            runs.setdefault(spec.digest, (name, seed, spec))
    watch = Watch(lambda nats: f"loss {nats:.3f} nats")
    try:
        run_all(list(runs.values()), pool, jobs=options.jobs, choice=options, watch=watch)
    finally:
        watch.close()


def _counted(name: str, request: Request, columns: Sequence[str] | None) -> PaperTable:
    return table7(request, columns) if name == "table7" else settings_table(name, request, columns)


def _show(options: argparse.Namespace, results: dict[str, PaperTable]) -> int:
    index = [] if options.out is None else write_tables(results, options.out)
    if options.json:
        print_json(list(results.values()) if len(results) > 1 else next(iter(results.values())))
        return 0
    for result in results.values():
        print_paper_table(result, console())
    print_files(index)
    return 0
