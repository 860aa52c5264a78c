"""Tables of one run's `analysis.json`, and the files that are made of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sparseffn.report import formats
from sparseffn.report.table import Table
from sparseffn.results.analysis_result import AnalysisResult, OverlapOfSteps, ServedByExpert

# Rows of the table of experts, and tokens named in each.
_MAX_EXPERTS, _MAX_TOKENS = 16, 6


def analysis_tables(analysis: AnalysisResult) -> list[Table]:
    """Layers, and the tokens of the experts of the middle layer."""
    tables = [_layers(analysis)]
    if analysis.tokens:
        middle = len(analysis.tokens) // 2
        tables.append(_experts(analysis.tokens[middle], middle))
    return tables


def facts_line(analysis: AnalysisResult) -> str:
    """The run and what was read, in one line."""
    run = analysis.run
    return (
        f"{run.method}, {formats.count(run.params)} parameters, {run.steps:,} steps; "
        f"{formats.integer(analysis.n_tokens)} tokens of {' and '.join(analysis.splits)} of {run.corpus}, "
        f"digest {run.digest}"
    )


def _layers(analysis: AnalysisResult) -> Table:
    unit, training = analysis.unit, analysis.training
    active = "active channels" if unit == "experts" else f"active {unit}"
    columns: list[tuple[str, Callable[[Any], str]]] = [
        ("layer", lambda layer: str(layer[0])),
        (active, lambda layer: f"{layer[1].mean:.1f}"),
        ("std", lambda layer: f"{layer[1].std:.1f}"),
        ("of", lambda layer: formats.integer(layer[1].total)),
        (f"dead {unit}", lambda layer: f"{layer[2].n_dead} of {layer[2].n_units}"),
        ("largest load / mean", lambda layer: f"{layer[2].largest_over_mean:.2f}"),
        ("load entropy", lambda layer: f"{layer[2].entropy:.3f}"),
        ("weight entropy", lambda layer: f"{layer[2].weight_entropy:.3f}"),
    ]
    notes = ["entropies over their maximum: 1 when all are used alike"]
    if training and training.stability:
        kept = _last_full(training.stability)
        columns.append(("stability", lambda layer: formats.percent(kept.layers[layer[0]].jaccard)))
        notes.append(
            f"stability: experts that a token keeps from step {kept.from_step} to {kept.to} (Jaccard index), "
            f"by chance {formats.percent(training.chance.jaccard)}"
        )
    layers = zip(range(len(analysis.load)), analysis.active, analysis.load, strict=True)
    return Table.by_column(columns, layers, title="Layers", notes=notes)


def _last_full(intervals: Sequence[OverlapOfSteps]) -> OverlapOfSteps:
    """The last interval between snapshots that is no mere rest: over the few steps at the end next to nothing changes."""
    lengths = [interval.to - interval.from_step for interval in intervals]
    return next(i for i, n in zip(reversed(intervals), reversed(lengths), strict=True) if 2 * n >= max(lengths))


def _experts(served: Sequence[ServedByExpert], layer: int) -> Table:
    experts = sorted(served, key=lambda e: (-e.load, e.expert))
    rows = []
    for expert in experts[:_MAX_EXPERTS]:
        named = "  ".join(f"{t.text} {formats.lift(t.lift)}" for t in expert.tokens[:_MAX_TOKENS])
        rows.append((str(expert.expert), formats.percent(expert.load), named))
    notes = ["lift: how many times as frequent a token is among the expert's as in the text; ␣ is a space"]
    if len(experts) > len(rows):
        notes.append(f"the {len(rows)} most used of {len(experts)}; all of them, in every layer, are in analysis.json")
    return Table.of(("expert", "selections", "tokens"), rows, n_words=3, title=f"Tokens by expert, layer {layer}", notes=notes)
