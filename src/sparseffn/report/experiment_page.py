"""Blocks of the pages about experiments by rules, from their records alone: what is planned, verdicts, every seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from sparseffn.report import formats
from sparseffn.report.markdown import markdown_table
from sparseffn.report.table import Table
from sparseffn.results.experiment_result import DecidedCollapse, DecidedContrast, ExperimentResult, PairNumbers
from sparseffn.stats import difference

SIGMA = "sigma-MoE"


def experiment_blocks(result: ExperimentResult) -> dict[str, str]:
    """Text of every block by name."""
    return {
        "plan": _plan(result),
        "verdicts": _verdicts(result),
        "seeds": _seeds(result),
        "pairs": _pairs(result),
        "collapse": _collapse(result),
        "time": _time(result),
    }


def _plan(result: ExperimentResult) -> str:
    rows = [
        (one.name, formats.count(one.params), f"{one.steps:,}", _block(one.ffn), _count(result, one.name))
        for one in result.candidates
    ]
    looks = ", ".join(f"{n} seeds with {bound:.2f}" for n, bound in zip(result.looks, result.bounds, strict=True))
    note = f"Seeds {result.seeds[0]} to {result.seeds[-1]}."
    # Where nothing is compared, the seeds decide by themselves.
    if result.contrasts:
        error = f"together they decide {100 * result.alpha:.2g}% of comparisons without a difference"
        note += f" Looks and bounds of |t|: {looks}; {error}."
    notes = (note,)
    head = ("candidate", "parameters", "steps", "block", "finished")
    return markdown_table(Table.of(head, rows, title=result.question, notes=notes))


def _block(ffn: Mapping[str, object]) -> str:
    if ffn["method"] == "dense":
        return f"d_ff {ffn['d_ff']}"
    return f"{ffn['n_experts']} x {ffn['expert_size']}, K {ffn['k']}"


def _count(result: ExperimentResult, name: str) -> str:
    return f"{sum(run.candidate == name for run in result.runs)} of {len(result.seeds)}"


def _verdicts(result: ExperimentResult) -> str:
    rows = [
        (
            one.words,
            _verdict(one),
            formats.signed_percent(one.published_percent),
            *_measured(one),
            f"{one.n_seeds or one.n_finished} of {len(result.seeds)}",
        )
        for one in result.contrasts
    ]
    head = ("in words", "verdict", "published", "measured", "interval", "validation", "seeds")
    notes = (
        f"In percent of the loss of '{result.reference}' in nats, whole test split, paired by seed; negative is better. "
        "Published: logarithms of perplexities, column WT-S where the rule names no other. The interval is the mean and as "
        f"many standard errors as the bound of the look; seeds of the looks: {', '.join(map(str, result.looks))}.",
    )
    return markdown_table(Table.of(head, rows, n_words=2, notes=notes))


def _measured(one: DecidedContrast) -> tuple[str, str, str]:
    if one.percent is None:
        return formats.NOT_MEASURED, formats.NOT_MEASURED, formats.NOT_MEASURED
    low, high = map(formats.signed_percent, (one.low_percent, one.high_percent))
    return formats.signed_percent(one.percent), f"[{low}, {high}]", formats.signed_percent(one.valid_percent)


def _verdict(one: DecidedContrast) -> str:
    """With its reason, but for a contrast before its first look, whose seeds say it."""
    if not one.n_seeds:
        return "none yet" if one.claimed else formats.NOT_MEASURED
    return ": ".join(filter(None, (one.verdict, one.reason)))


def _seeds(result: ExperimentResult) -> str:
    """Bits of every run."""
    names = [one.name for one in result.candidates]
    losses = {(run.candidate, run.seed): run.test for run in result.runs}
    seeds = sorted({run.seed for run in result.runs})
    rows = [(str(seed), *(_bits(losses.get((name, seed))) for name in names)) for seed in seeds]
    return markdown_table(Table.of(("seed", *names), rows, notes=(f"Bits per {result.corpus['unit']}, test.",)))


def _pairs(result: ExperimentResult) -> str:
    """Claim 28: how many pairs of experts there are in effect, run by run, and the share of an independent choice."""
    found = [(run.candidate, run.seed, run.pairs) for run in result.runs if run.pairs is not None]
    rows = [
        (name, str(seed), f"{one.effective:.1f}", f"{one.independent:.1f}", str(one.possible), f"{_richness(one):.1%}")
        for name, seed, one in found
    ]
    notes = ["Exponential of the entropy of pairs selected for one token, middle layer, beginning of validation."]
    shares = {seed: _richness(one) for name, seed, one in found if name == SIGMA}
    if len(shares) > 1:
        share = difference(shares, dict.fromkeys(shares, 0.0))
        notes.append(
            f"{SIGMA}: {share.difference:.1%} of an independent choice, 95% interval of Student's t over {share.n_seeds} seeds "
            f"[{share.low:.1%}, {share.high:.1%}]."
        )
    head = ("candidate", "seed", "pairs in effect", "independent, same loads", "possible", "share of independent")
    return markdown_table(Table.of(head, rows, notes=notes))


def _collapse(result: ExperimentResult) -> str:
    """Claims 34 and 35: how many runs of each candidate collapsed, and their worst layers at the last step."""
    rows = []
    for one in result.collapses:
        runs = [run for run in result.runs if run.candidate == one.candidate and run.loads]
        entropies = [min(layer.entropy[-1] for layer in run.loads) for run in runs]
        dead = [max(layer.dead[-1] for layer in run.loads) for run in runs]
        rows.append(
            (
                one.candidate,
                _collapsed(one),
                f"{one.n_collapsed} of {one.n_finished}" if runs else formats.NOT_MEASURED,
                ", ".join(f"{value:.3f}" for value in entropies) or formats.NOT_MEASURED,
                ", ".join(f"{value:.0%}" for value in dead) or formats.NOT_MEASURED,
                f"{one.n_finished} of {len(result.seeds)}",
            )
        )
    head = ("candidate", "collapses", "runs that collapsed", "entropy / log N_E", "dead experts", "seeds")
    notes = (
        "Each run's worst layer at the last step, 4,096 tokens of validation; even is 1, dead is under 1% of the mean load.",
    )
    return markdown_table(Table.of(head, rows, n_words=2, notes=notes))


def _collapsed(one: DecidedCollapse) -> str:
    if not one.claimed:
        return "not claimed"
    return one.verdict or "none yet"


def _richness(one: PairNumbers) -> float:
    return one.effective / one.independent


def _bits(nats: float | None) -> str:
    return formats.NOT_MEASURED if nats is None else f"{nats / math.log(2):.4f}"


def _time(result: ExperimentResult) -> str:
    hours = sum(run.wall_s for run in result.runs) / 3600
    made = makers([run.sources for run in result.runs])
    planned = len(result.seeds) * len(result.candidates)
    return f"{len(result.runs)} of {planned} runs, {hours:.1f} hours of one thread beside other work{made}.\n"


def makers(sources: Sequence[str]) -> str:
    """Digests of the code that made some runs."""
    found = sorted(set(sources))
    return f", made by sources {', '.join(digest[:12] for digest in found)}" if found else ""
