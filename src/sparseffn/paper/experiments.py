"""Experiments by the rules of `rules.toml`: their runs, the compact record of those that are finished, and the verdicts.

    runs = experiment_runs(rule, request)              # what to train, in this order
    result = experiment_result("control", rule, runs, pool, recorded)

A record keeps each run's losses, so that verdicts can be made anew where the pool of runs is gone; runs of other settings have
another digest, are not those that the rule plans and are left out.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

from msgspec import structs

from sparseffn.analysis.pairs import pair_numbers
from sparseffn.paper.collapse import collapses, layer_loads
from sparseffn.paper.costs import training_flops
from sparseffn.paper.jobs import NamedRun
from sparseffn.paper.planned import Request, plan_table, train_settings
from sparseffn.paper.pool import Finished, Pool, RunSpec, is_compatible
from sparseffn.paper.published import published_percent
from sparseffn.paper.rules import Contrast, Rule, in_order
from sparseffn.paper.table_rows import sized
from sparseffn.paper.tables import get_table
from sparseffn.results.comparison_result import UsageCounts
from sparseffn.results.experiment_result import (
    DecidedContrast,
    ExperimentResult,
    ExperimentRun,
    PairNumbers,
    PlannedCandidate,
)
from sparseffn.stats import Verdict
from sparseffn.storage import read

# Losses of one split by candidate, then by seed, in nats.
Losses = Mapping[str, Mapping[int, float]]


def experiment_runs(rule: Rule, request: Request) -> list[NamedRun]:
    """Every run of a rule, in the order in which they are trained.

    Raises:
        UserError: the corpus is not there.
    """
    keys = list(dict.fromkeys(candidate.row for candidate in rule.candidates))
    table = get_table("table10").selected(columns=[rule.column], rows=keys, settings="paper")
    (column,) = plan_table(table, request).columns
    # What `reason` holds is why there is no corpus: asked for again, it raises.
    corpus = request.corpora.of(column.column)
    rows = {row.key: row for row in table.rows}
    runs = []
    for seed, candidate in in_order(rule):
        own = column.column.resized(
            d_model=candidate.d_model, n_experts=candidate.n_experts, d_ff=candidate.d_ff, lr=candidate.lr
        )
        ffn = sized(rows[candidate.row], own, column.vocab_size).ffn
        steps = max(1, round(candidate.steps_share * column.steps))
        planned = dataclasses.replace(column, column=own, steps=steps)
        train = train_settings(planned, rows[candidate.row].method, request, seed)
        spec = RunSpec(model=own.model(ffn, column.vocab_size), train=train, corpus=corpus)
        runs.append(NamedRun(label=candidate.name, seed=seed, spec=spec))
    return runs


def experiment_result(
    name: str, rule: Rule, runs: Sequence[NamedRun], pool: Pool, recorded: Mapping[str, ExperimentRun] | None = None
) -> ExperimentResult:
    """How an experiment stands.

    Args:
        name: of the rule.
        rule: what was planned.
        runs: those of `experiment_runs`.
        pool: where they are.
        recorded: runs of earlier records by digest, also of another experiment that shares them, for what the pool has not.
    """
    found = []
    for run in runs:
        finished = pool.status(run.spec).finished
        if finished is not None:
            found.append(_record(run, finished, with_loads=bool(rule.collapse)))
        elif (known := (recorded or {}).get(run.spec.digest)) is not None and suffices(known, rule):
            found.append(structs.replace(known, candidate=run.label, loads=known.loads if rule.collapse else []))
    first = {run.label: run.spec for run in reversed(runs)}
    return ExperimentResult(
        name=name,
        claims=rule.claims,
        question=rule.question,
        reference=rule.reference,
        seeds=list(rule.seeds),
        looks=list(rule.looks),
        bounds=list(rule.bounds),
        alpha=rule.alpha,
        candidates=[
            PlannedCandidate(
                name=label,
                params=spec.model.num_params(),
                flops=round(training_flops(spec.model, spec.train) / (spec.train.steps * spec.train.tokens_per_step)),
                steps=spec.train.steps,
                ffn={"method": spec.model.ffn.name, **spec.model.ffn.to_json()},
            )
            for label, spec in ((candidate.name, first[candidate.name]) for candidate in rule.candidates)
        ],
        corpus={
            key: value for key, value in runs[0].spec.corpus.info.items() if key in ("corpus", "tokenizer", "unit", "digest")
        },
        runs=found,
        contrasts=judged(rule, losses_of(found, "test"), losses_of(found, "valid")),
        collapses=collapses(rule, found),
    )


def suffices(recorded: ExperimentRun, rule: Rule) -> bool:
    """Whether the record of a run holds all that an experiment asks of it: on collapse, the loads; no version but ours."""
    return is_compatible(recorded.version) and (bool(recorded.loads) or not rule.collapse)


def _record(run: NamedRun, finished: Finished, *, with_loads: bool) -> ExperimentRun:
    made_by = finished.environment
    points = [record for record in finished.folder.read_metrics() if "valid" in record]
    return ExperimentRun(
        candidate=run.label,
        seed=run.seed,
        test=finished.result.test,
        valid=finished.result.valid,
        train_s=finished.train_s,
        wall_s=finished.wall_s,
        curve=[(record["step"], round(record["valid"], 4)) for record in points],
        load=finished.load,
        pairs=_pairs(finished),
        loads=layer_loads(finished.folder.path, run.spec.model.ffn.to_json()["n_experts"]) if with_loads else [],
        digest=run.spec.digest,
        version=str(made_by.get("sparseffn", "unknown")),
        sources=str(made_by.get("sources", "unknown")),
    )


def _pairs(finished: Finished) -> PairNumbers | None:
    """From what a run wrote of the use of its experts."""
    path = finished.folder.path / "usage.json"
    together = read(path, UsageCounts, fix="remove the run's folder").cooccurrence if path.exists() else None
    return None if together is None else pair_numbers(together.matrix)


def losses_of(runs: Sequence[ExperimentRun], split: str) -> Losses:
    """By candidate and seed."""
    losses: dict[str, dict[int, float]] = {}
    for run in runs:
        losses.setdefault(run.candidate, {})[run.seed] = getattr(run, split)
    return losses


def judged(rule: Rule, test: Losses, valid: Losses | None = None) -> list[DecidedContrast]:
    """Every contrast with its verdict; `valid` is shown beside the test split and decides nothing."""
    decided: dict[str, DecidedContrast] = {}
    for contrast in rule.contrasts:
        needed = None if contrast.needs is None else decided[contrast.needs]
        decided[contrast.name] = _judged(rule, contrast, test, valid or {}, needed)
    return list(decided.values())


def _judged(rule: Rule, contrast: Contrast, test: Losses, valid: Losses, needed: DecidedContrast | None) -> DecidedContrast:
    values = contrast_values(rule, contrast, test)
    found = DecidedContrast(
        name=contrast.name,
        words=contrast.words,
        claimed=contrast.claimed,
        published_percent=sum(map(published_percent, contrast.published)) if contrast.published else None,
        n_finished=len(values),
        values=values,
    )
    if len(values) < rule.looks[0]:
        return structs.replace(found, reason=f"{len(values)} of the {rule.looks[0]} seeds of the first look")
    look, verdict = _look(rule, contrast, values)
    n, bound = rule.looks[look], rule.bounds[look]
    mean, low, high = _interval(values[:n], bound)
    unit = _one_percent(rule, test, n)
    others = contrast_values(rule, contrast, valid)[:n]
    found = structs.replace(
        found,
        n_seeds=n,
        bound=bound,
        nats=mean,
        low=low,
        high=high,
        percent=mean / unit,
        low_percent=low / unit,
        high_percent=high / unit,
        valid_percent=statistics.fmean(others) / _one_percent(rule, valid, n) if len(others) == n else None,
    )
    verdict, reason = _verdict(rule, found, verdict, needed)
    return structs.replace(found, verdict=verdict, reason=reason)


def awaited_seeds(rule: Rule, test: Losses) -> dict[str, int]:
    """For each candidate, how many of the rule's seeds verdicts wait for: of decided ones those of the look that decided."""
    every = len(rule.seeds)
    ends = [
        ({rule.reference, *contrast.weights}, found.n_seeds if found.verdict in ("confirmed", "contradicted") else every)
        for contrast, found in zip(rule.contrasts, judged(rule, test), strict=True)
    ]
    # Candidates of no contrast are there for something else: for loads, say.
    return {one.name: max((n for names, n in ends if one.name in names), default=every) for one in rule.candidates}


def _one_percent(rule: Rule, losses: Losses, n: int) -> float:
    """Of the reference's mean loss over the rule's first n seeds."""
    return statistics.fmean(losses[rule.reference][seed] for seed in rule.seeds[:n]) / 100


def contrast_values(rule: Rule, contrast: Contrast, losses: Losses) -> list[float]:
    """Of the rule's first seeds for which all candidates of the contrast are there, in nats."""
    values: list[float] = []
    for seed in rule.seeds:
        # The reference too, whose loss percentages are of.
        if any(seed not in losses.get(name, {}) for name in (rule.reference, *contrast.weights)):
            break
        values.append(sum(weight * losses[name][seed] for name, weight in contrast.weights.items()))
    return values


def _interval(values: Sequence[float], bound: float) -> tuple[float, float, float]:
    """Mean, and it less and plus as many standard errors as the bound."""
    mean, half = statistics.fmean(values), bound * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def _look(rule: Rule, contrast: Contrast, values: Sequence[float]) -> tuple[int, Verdict | None]:
    """The first look that decides, with what it says; else the last one that there is."""
    look = 0
    for look, (n, bound) in enumerate(zip(rule.looks, rule.bounds, strict=True)):
        if n > len(values):
            return look - 1, None
        _, low, high = _interval(values[:n], bound)
        if contrast.claimed is not None and (low > 0 or high < 0):
            return look, "confirmed" if (high < 0) == (contrast.claimed == "better") else "contradicted"
    return look, None


def _verdict(
    rule: Rule, found: DecidedContrast, decided: Verdict | None, needed: DecidedContrast | None
) -> tuple[Verdict | None, str | None]:
    """The verdict with the reason why it is none or open."""
    if found.claimed is None:
        return None, "not tested"
    if needed is not None and needed.verdict != "confirmed":
        if needed.n_seeds == rule.looks[-1]:
            return "bounded", f"untestable: '{needed.name}' is not confirmed"
        return None, f"needs '{needed.name}'"
    if decided is not None:
        return decided, None
    if found.n_seeds != rule.looks[-1]:
        return "undecided", f"next look at {rule.looks[rule.looks.index(found.n_seeds) + 1]} seeds"
    assert found.low_percent is not None and found.high_percent is not None, "there was a look"
    effect = found.published_percent
    excluded = effect is not None and not found.low_percent <= effect <= found.high_percent
    return ("bounded", "the published effect is excluded") if excluded else ("undecided", None)
