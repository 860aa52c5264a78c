"""What several studies that share one baseline say together: verdicts corrected for their number, loads over training."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from sparseffn.report.formats import NOT_MEASURED
from sparseffn.report.table import Table
from sparseffn.results.study_result import StudyResult, StudyRun, Variant
from sparseffn.stats import Difference, difference, holm, p_value

SPLITS = ("valid", "test")
LEVEL = 0.05


def contrast_table(results: Sequence[StudyResult]) -> Table:
    """Every variant against the first of its study, p values corrected over all of them on each split (Holm)."""
    found = [(result.variants[0], variant) for result in results for variant in result.variants[1:]]
    corrected = {split: iter(holm(tested)) if (tested := _tested(found, split)) else iter(()) for split in SPLITS}
    rows = []
    for first, variant in found:
        cells, verdicts = [f"{variant.name} less {first.name}"], []
        for split in SPLITS:
            gap = variant.against_first.get(split)
            p = next(corrected[split]) if gap is not None and gap.covers_seeds else None
            cells += _percent(gap, first, split), NOT_MEASURED if p is None else f"{p:.3f}"
            decided = gap is not None and p is not None and p < LEVEL
            verdicts.append(("better" if gap.difference < 0 else "worse") if gap is not None and decided else "undecided")
        rows.append([*cells, verdicts[0] if len(set(verdicts)) == 1 else "undecided", str(_n_seeds(variant))])
    n_tested = max(len(_tested(found, split)) for split in SPLITS)
    return Table.of(
        ("difference", "validation", "p", "test", "p", "is", "seeds"),
        rows,
        title="Losses, corrected for the number of comparisons",
        notes=(
            "In percent of the baseline's loss, paired by seed, with the 95% interval of Student's t, which is not corrected; "
            f"p is, for {n_tested} comparisons with one baseline (Holm). Better or worse where p is below 5% on both splits. "
            "Seeds are the only thing that varies: the tokens that were evaluated are fixed.",
        ),
    )


def _tested(found: Sequence[tuple[Variant, Variant]], split: str) -> list[float]:
    gaps = [variant.against_first.get(split) for _, variant in found]
    return [p_value(gap, gap.n_seeds - 1) for gap in gaps if gap is not None and gap.covers_seeds]


def _percent(gap: Difference | None, first: Variant, split: str) -> str:
    loss = first.valid if split == "valid" else first.test
    if gap is None or loss is None:
        return NOT_MEASURED
    gap = gap.in_unit(loss.mean / 100)
    return f"{gap.difference:+.2f}%" + (f" ± {gap.half_width:.2f}%" if gap.covers_seeds else "")


def _n_seeds(variant: Variant) -> int:
    return max((gap.n_seeds for gap in variant.against_first.values()), default=0)


def drift_table(results: Sequence[StudyResult]) -> Table:
    """How far each variant's load is from the baseline's as training goes on, and whether that goes with its loss."""
    steps = sorted(
        {probe.step for result in results for variant in result.variants for run in variant.runs for probe in run.probes}
    )
    rows, gaps, losses = [], [], []
    for result in results:
        first, *others = result.variants
        for variant in others:
            rows.append((variant.name, *(_entropy_gap(variant.runs, first.runs, step) for step in steps)))
            pairs = _pairs(variant.runs, first.runs)
            gaps += [_entropy(ours, None) - _entropy(theirs, None) for ours, theirs in pairs]
            losses += [[getattr(ours, split) - getattr(theirs, split) for split in SPLITS] for ours, theirs in pairs]
    notes = ["Load entropy / log N_E less the baseline's, paired by seed, with the 95% interval of Student's t; not corrected."]
    if len(gaps) > 2:
        valid, test = (statistics.correlation(gaps, [loss[i] for loss in losses]) for i in range(len(SPLITS)))
        notes.append(
            f"Over all {len(gaps)} pairs of runs the gap of load at the end and the gap of loss correlate with {valid:+.2f} on "
            f"validation and {test:+.2f} on test."
        )
    head = ("variant", *(f"step {step}" for step in steps))
    return Table.of(head, rows, title="Evenness of the load over training, differences from the baseline", notes=notes)


def _pairs(runs: Sequence[StudyRun], base: Sequence[StudyRun]) -> list[tuple[StudyRun, StudyRun]]:
    by_seed = {run.seed: run for run in base}
    return [(run, by_seed[run.seed]) for run in runs if run.seed in by_seed]


def _entropy(run: StudyRun, step: int | None) -> float:
    """At a step; None for the end."""
    return next(probe.load_entropy for probe in reversed(run.probes) if step is None or probe.step == step)


def _entropy_gap(runs: Sequence[StudyRun], base: Sequence[StudyRun], step: int) -> str:
    if not _pairs(runs, base):
        return NOT_MEASURED
    ours, theirs = ({run.seed: _entropy(run, step) for run in of} for of in (runs, base))
    gap = difference(ours, theirs)
    return f"{gap.difference:+.3f}" + (f" ± {gap.half_width:.3f}" if gap.covers_seeds else "")
