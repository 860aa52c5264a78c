"""Tables of one run's `analysis.json`, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparseffn.report import formats
from sparseffn.report.sheet import Sheet

# Rows of the table of experts, and tokens named in each.
_MAX_EXPERTS, _MAX_TOKENS = 16, 6


def analysis_sheets(analysis: Mapping[str, Any]) -> list[Sheet]:
    """Layers, and the tokens of the experts of the middle layer."""
    sheets = [_layers(analysis)]
    if analysis["tokens"]:
        sheets.append(_experts(analysis, len(analysis["tokens"]) // 2))
    return sheets


def facts_line(analysis: Mapping[str, Any]) -> str:
    """The run and what was read, in one line."""
    run = analysis["run"]
    return (
        f"{run['method']}, {formats.count(run['params'])} parameters, {run['steps']:,} steps; "
        f"{formats.integer(analysis['n_tokens'])} tokens of {' and '.join(analysis['splits'])} of {run['corpus']}, "
        f"digest {run['digest']}"
    )


def _layers(analysis: Mapping[str, Any]) -> Sheet:
    unit = analysis["unit"]
    head = ["layer", "active channels" if unit == "experts" else f"active {unit}", "std", "of"]
    head += ["dead " + unit, "largest load / mean", "load entropy", "weight entropy"]
    training = analysis["training"]
    kept = _last_full(training["stability"]) if training and training["stability"] else None
    if kept:
        head += ["stability"]
    rows = []
    for i, (active, load) in enumerate(zip(analysis["active"], analysis["load"], strict=True)):
        row = [str(i), f"{active['mean']:.1f}", f"{active['std']:.1f}", formats.integer(active["total"])]
        row += [f"{load['n_dead']} of {load['n_units']}", f"{load['largest_over_mean']:.2f}"]
        row += [f"{load['entropy']:.3f}", f"{load['weight_entropy']:.3f}"]
        if kept:
            row.append(formats.percent(kept["layers"][i]["jaccard"]))
        rows.append(tuple(row))
    notes = ["entropies over their maximum: 1 when all are used alike"]
    if kept:
        notes.append(
            f"stability: experts that a token keeps from step {kept['from']} to {kept['to']} (Jaccard index), "
            f"by chance {formats.percent(training['chance']['jaccard'])}"
        )
    return Sheet(head=tuple(head), rows=rows, n_words=1, title="Layers", notes=tuple(notes))


def _last_full(intervals: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The last interval between snapshots that is no mere rest: over the few steps at the end next to nothing changes."""
    lengths = [interval["to"] - interval["from"] for interval in intervals]
    return next(i for i, n in zip(reversed(intervals), reversed(lengths), strict=True) if 2 * n >= max(lengths))


def _experts(analysis: Mapping[str, Any], layer: int) -> Sheet:
    experts = sorted(analysis["tokens"][layer], key=lambda e: (-e["load"], e["expert"]))
    rows = []
    for expert in experts[:_MAX_EXPERTS]:
        named = "  ".join(f"{t['text']} {formats.lift(t['lift'])}" for t in expert["tokens"][:_MAX_TOKENS])
        rows.append((str(expert["expert"]), formats.percent(expert["load"]), named))
    notes = ["lift: how many times as frequent a token is among the expert's as in the text; ␣ is a space"]
    if len(experts) > len(rows):
        notes.append(f"the {len(rows)} most used of {len(experts)}; all of them, in every layer, are in analysis.json")
    title = f"Tokens by expert, layer {layer}"
    return Sheet(head=("expert", "selections", "tokens"), rows=rows, n_words=3, title=title, notes=tuple(notes))
