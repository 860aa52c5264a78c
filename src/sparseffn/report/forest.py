"""Forest plots: every difference with its interval, and every seed behind it as a dot, beside the published effect."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from sparseffn.report.evidence_page import short_words
from sparseffn.report.plotting import FONT_SIZE, GREY, INK, PALETTE, TEXT_WIDTH, Plot, drawing, finished
from sparseffn.results.evidence_result import ClaimsResult
from sparseffn.results.experiment_result import ExperimentResult
from sparseffn.results.study_result import StudyResult
from sparseffn.stats import paired

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_HEIGHT, _MARGIN = 0.36, 0.9
# Seeds beside each other in a row, in heights of it.
_SPREAD = 0.16
_LABEL = 44


class ForestRow(msgspec.Struct, frozen=True, kw_only=True):
    """A difference, in percent of the loss."""

    label: str
    values: list[float]
    """Of every seed."""
    mean: float
    low: float
    high: float
    published: float | None = None


def claim_rows(found: ClaimsResult) -> list[ForestRow]:
    """Of the claims on losses that have been measured."""
    rows = []
    for claim in found.claims:
        percent, bits = claim.percent, claim.difference
        if percent is None or bits is None or claim.numbers == "-":
            continue
        unit = percent.half_width / bits.half_width
        rows.append(
            ForestRow(
                label=_less(claim.words),
                values=[value * unit for value in claim.values],
                mean=percent.difference,
                low=percent.low,
                high=percent.high,
                published=claim.published_percent,
            )
        )
    return rows


def _less(words: str) -> str:
    """A claim's two rows as a difference, without what its table has."""
    pair = short_words(words).rpartition(": ")[2].removesuffix(" or is better")
    return re.sub(r" is worse than | is better than | equals ", " less ", pair)


def study_rows(results: Sequence[StudyResult]) -> list[ForestRow]:
    """Test losses of every variant less the first of its study."""
    rows = []
    for result in results:
        first, *others = result.variants
        for variant in others:
            gap = variant.against_first.get("test")
            if gap is None or first.test is None:
                continue
            unit = first.test.mean / 100
            losses = [{run.seed: run.test for run in of.runs} for of in (variant, first)]
            found = gap.in_unit(unit)
            rows.append(
                ForestRow(
                    label=f"{variant.name} less {first.name}",
                    values=[value / unit for value in paired(*losses)],
                    mean=found.difference,
                    low=found.low,
                    high=found.high,
                )
            )
    return rows


def experiment_rows(result: ExperimentResult) -> list[ForestRow]:
    """Contrasts that had a look; seeds beyond it are drawn too."""
    return [
        ForestRow(
            label=one.name,
            values=[value * one.percent / one.nats for value in one.values] if one.nats else [],
            mean=one.percent,
            low=one.low_percent or 0.0,
            high=one.high_percent or 0.0,
            published=one.published_percent,
        )
        for one in result.contrasts
        if one.percent is not None and one.nats is not None
    ]


def forest_plot(rows: Sequence[ForestRow], *, name: str, title: str, mark: str = "") -> Plot:
    """Rows from top to bottom; `mark` is added to the description."""
    n_dots = sum(len(row.values) for row in rows)
    caption = (
        f"{title}. Negative is better; dots are seeds ({n_dots}), lines the intervals of the table, "
        "diamonds what was published."
    )
    with drawing(width=TEXT_WIDTH, height=_MARGIN + _HEIGHT * len(rows)) as (figure, axes):
        for place, row in enumerate(rows):
            _draw(axes, len(rows) - 1 - place, row)
        axes.axvline(0.0, color=GREY, linewidth=0.8, zorder=1)
        axes.set(xlabel="difference of test losses, % (negative: the first is better)", ylim=(-0.6, len(rows) - 0.4))
        axes.set_yticks(range(len(rows)), [_shortened(row.label) for row in reversed(rows)], fontsize=FONT_SIZE - 1)
        axes.grid(visible=False, axis="y")
        return finished(figure, name=name, title=title, caption=caption, description=f"{caption} {mark}", pixels=False)


def _draw(axes: Axes, height: int, row: ForestRow) -> None:
    shifts = [height - 0.12 - _SPREAD * (i % 3) / 2 for i in range(len(row.values))]
    axes.plot(row.values, shifts, "o", color=PALETTE[6], markersize=2.8, markeredgewidth=0, zorder=2)
    axes.plot([row.low, row.high], [height + 0.12] * 2, color=INK, linewidth=1.4, solid_capstyle="butt", zorder=3)
    axes.plot([row.mean], [height + 0.12], "s", color=INK, markersize=4, zorder=4)
    if row.published is not None:
        axes.plot([row.published], [height + 0.12], "D", color=PALETTE[2], markerfacecolor="white", markersize=4.5, zorder=5)


def _shortened(label: str) -> str:
    return label if len(label) <= _LABEL else f"{label[: _LABEL - 1]}\u2026"
