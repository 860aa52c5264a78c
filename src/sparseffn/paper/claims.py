"""The paper's claims held against results: what each says of two rows, of loads or of times, and the verdict.

    decided = decide(tables, bench)

A verdict on two rows follows from the interval of their difference, by the one rule of `stats.verdict`, where the difference
stands against zero after correction for the number of claims (Holm). Claims of "equals or is better" are undecided: their
margin was chosen after the runs, and `rules.toml` tests the main one again. `claims.toml` says what the numbers stand for.
"""

from __future__ import annotations

import functools
import math
import statistics
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

from msgspec import structs

from sparseffn.paper.published import PublishedPair, published_percent
from sparseffn.results.bench_result import LayerResult
from sparseffn.results.evidence_result import ClaimsResult, DecidedClaim, Growth, StatedClaim
from sparseffn.results.table_result import Cell, TableResult
from sparseffn.stats import Claimed, Difference, Verdict, holm, p_value, paired, seed_noise, verdict

# A row: its published label, and whether it is the released form.
Key = tuple[str, bool]

DENSE, SIGMA = ("dense", False), ("sigma-moe", False)
_RENORM, _SBASE, _SWITCH = "softmax after top-k (renorm.)", "s-base, K=4, G=128", "switch, K=1, G=512, no dropout"
_RELU, _SOFTMAX = (f"pkm, parameters, {activation}" for activation in ("relu", "softmax"))

ROOM = 8.0
"""N_E / K, the largest load over the mean that there can be, below which nothing is said of collapse; the paper's is 32."""
LEVEL = 0.05
FLAT, STEEP = 0.25, 0.5
"""Exponents of time over N_E below which it counts as almost flat, and above which it does not; 1 is linear."""


@functools.cache
def stated_claims() -> Sequence[StatedClaim]:
    """All that a run can contradict."""
    text = resources.files("sparseffn.paper").joinpath("claims.toml").read_text(encoding="utf-8")
    return tuple(StatedClaim(**claim) for claim in tomllib.loads(text)["claims"])


@dataclass(frozen=True)
class RowClaim:
    """Two rows whose difference a claim is about."""

    numbers: str
    row: Key
    claimed: Claimed
    """What the first row should be against the other; "different": nothing, only whether they differ is asked."""
    other: Key
    because: str = ""
    """What the claim says of the method, where that is not the two rows themselves."""


_WORDS: Mapping[Claimed, str] = {
    "equal or better": "{row} equals {other} or is better",
    "better": "{row} is better than {other}",
    "worse": "{row} is worse than {other}",
    "different": "{row} differs from the paper's form",
}

ROW_CLAIMS = (
    RowClaim("1, 5, 18", SIGMA, "equal or better", DENSE),
    *(RowClaim("15", (f"Top-K, K={k}", False), "equal or better", DENSE) for k in (64, 128, 256, 512)),
    RowClaim("16", (_RELU, False), "better", (_SOFTMAX, False), because="ReLU helps"),
    RowClaim("16", (_RELU, True), "better", (_SOFTMAX, True), because="ReLU helps"),
    RowClaim("17", (_RELU, False), "worse", DENSE),
    RowClaim("17", (_RELU, True), "worse", DENSE),
    RowClaim("10", ("softmax before top-k (no renorm.)", False), "worse", SIGMA, because="sigmoid helps"),
    RowClaim("10", (_RENORM, False), "worse", SIGMA, because="sigmoid helps"),
    RowClaim("11", ("standard init", False), "worse", SIGMA, because="shared initialisation helps"),
    # The column has no expert dropout, so that the row is without the entropy loss alone.
    RowClaim("12", ("no reg (gamma=0, delta=0)", False), "worse", SIGMA, because="entropy loss helps"),
    RowClaim("20", (_SWITCH, False), "worse", SIGMA),
    RowClaim("20", (_SBASE, False), "worse", SIGMA),
)
RELEASED_FORMS = tuple(
    RowClaim("-", (label, True), "different", (label, False)) for label in (_RENORM, _SBASE, _SWITCH, _SOFTMAX, _RELU)
)
# Those that the paper shows to collapse, in its form and in the released one.
_COLLAPSING = tuple((label, released) for label in (_RENORM, _SWITCH) for released in (False, True))


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A cell with the label of its row."""

    label: str
    cell: Cell
    table: str
    freedom: int
    """Degrees of freedom behind the scatter of seeds that the table's intervals have."""


def cells_by_row(tables: Sequence[TableResult]) -> dict[Key, Measured]:
    """Cells of the first column of tables; of a row that several have, that of the table with most rows.

    Intervals pool the scatter of seeds over the rows of a table.
    """
    cells: dict[Key, Measured] = {}
    for table in sorted(tables, key=lambda table: -len(table.rows)):
        noise = seed_noise(
            {cell.row: dict(zip(cell.seeds, cell.values, strict=True)) for cell in table.cells if not cell.column}
        )
        for cell in table.cells:
            row = table.rows[cell.row]
            key = row.published_label or row.label, row.settings == "released"
            if cell.column == 0:
                freedom = 1 if noise is None else noise.freedom
                cells.setdefault(key, Measured(label=row.label, cell=cell, table=table.table, freedom=freedom))
    return cells


def decide(tables: Sequence[TableResult], bench: LayerResult | None) -> ClaimsResult:
    """Every claim that tables of the evidence decide; released forms, which no claim of the paper is about, come last.

    Without `bench`, times over N_E, claims on times are left undecided.
    """
    cells = cells_by_row(tables)
    return ClaimsResult(
        unit=tables[0].difference_unit,
        room=ROOM,
        flat=FLAT,
        steep=STEEP,
        stated=list(stated_claims()),
        claims=[
            *_corrected([_row_claim(cells, claim) for claim in ROW_CLAIMS]),
            *_balance_claims(cells),
            *_speed_claims(bench),
            *_corrected([_row_claim(cells, claim) for claim in RELEASED_FORMS]),
        ],
    )


def _corrected(claims: Sequence[DecidedClaim]) -> list[DecidedClaim]:
    """With verdicts that hold after correction for the number of claims that are tested."""
    tested = [claim.p for claim in claims if claim.p is not None]
    corrected = iter(holm(tested))
    found = []
    for claim in claims:
        if claim.p is not None:
            p = next(corrected)
            stands = "undecided" if p >= LEVEL and claim.verdict != "bounded" else claim.verdict
            claim = structs.replace(claim, p_corrected=p, verdict=stands)
        found.append(claim)
    return found


def _row_claim(cells: Mapping[Key, Measured], claim: RowClaim) -> DecidedClaim:
    row, other = cells[claim.row], cells[claim.other]
    words = _WORDS[claim.claimed].format(row=row.label, other=other.label)
    found, through_dense = difference(cells, claim.row, claim.other)
    decided = DecidedClaim(
        numbers=claim.numbers,
        topic="loss",
        words=f"{claim.because}: {words}" if claim.because else words,
        claimed=claim.claimed,
        published_percent=_published_percent(claim, row.table),
        seeds=[0 if found is None else found.n_seeds],
        difference=found,
        through_dense=through_dense,
    )
    if found is None:
        return decided
    assert other.cell.mean is not None, "what has a difference is measured"
    losses = [dict(zip(measured.cell.seeds, measured.cell.values, strict=True)) for measured in (row, other)]
    # Where the difference is from other runs of the other row, the seeds of these say nothing of it.
    values = paired(*losses)
    if values and not math.isclose(statistics.fmean(values), found.difference, abs_tol=1e-4):
        values = []
    decided = structs.replace(decided, percent=found.in_unit(other.cell.mean / 100), values=values)
    if not found.covers_seeds:
        return structs.replace(decided, verdict="undecided", reason="one seed")
    if claim.claimed == "equal or better":
        return structs.replace(decided, verdict="undecided", reason="no margin stood before the runs")
    return structs.replace(decided, verdict=verdict(claim.claimed, found), p=p_value(found, min(row.freedom, other.freedom)))


def _published_percent(claim: RowClaim, table: str) -> float | None:
    """Table 3 gives sigma-MoE another figure than table 10, and is what decides its claim; forms have none of their own."""
    if claim.row[0] == claim.other[0]:
        return None
    if (claim.row, claim.other) == (SIGMA, DENSE):
        table = "table3"
    return published_percent(PublishedPair(table=table, row=claim.row[0], other=claim.other[0]))


def difference(cells: Mapping[Key, Measured], row: Key, other: Key) -> tuple[Difference | None, bool]:
    """One row less another with an interval, and whether it goes through dense; None without a run of both.

    Tables compare rows with dense, with sigma-MoE and a released form with the paper's.
    """
    cell, direct = cells[row].cell, None
    if other == DENSE:
        direct = cell.against_dense
    elif other == SIGMA:
        direct = cell.against_sigma_moe
    elif other == (row[0], False):
        direct = cell.against_paper_form
    if direct is not None:
        return direct, False
    ours, theirs = cell.against_dense, cells[other].cell.against_dense
    if ours is None or theirs is None:
        return None, False
    return ours.less(theirs), True


def _balance_claims(cells: Mapping[Key, Measured]) -> list[DecidedClaim]:
    alike = DecidedClaim(
        numbers="21, 34, 35", topic="load", words="sigma-moe balances as S-BASE does, without Sinkhorn", seeds=[0]
    )
    if pair := _measured(cells, SIGMA, (_SBASE, False)):
        # Tables hold means of loads alone, without what their seeds differ by.
        alike = structs.replace(
            alike,
            verdict="undecided",
            reason="no interval",
            seeds=[cell.n for cell in pair],
            loads=[_load(cell) for cell in pair],
        )
    words = "softmax after top-k and Switch, in both forms each, collapse"
    collapses = DecidedClaim(numbers="21, 34, 35", topic="load", words=words, seeds=[0])
    if poor := _measured(cells, *_COLLAPSING):
        loads = [(_load(cell), 100.0 / (cell.flops_percent or 100.0)) for cell in poor]
        room = max(most for _, most in loads)
        collapses = structs.replace(
            collapses,
            verdict=collapse(loads),
            reason=None if room >= ROOM else f"N_E / K of {room:g} leaves no room for it",
            seeds=[cell.n for cell in poor],
            loads=[load for load, _ in loads],
            largest_possible_load=room,
        )
    return [alike, collapses]


def _measured(cells: Mapping[Key, Measured], *keys: Key) -> list[Cell]:
    """The rows' cells if all are measured, else none."""
    found = [cells[key].cell for key in keys]
    return found if all(cell.status == "measured" for cell in found) else []


def _load(cell: Cell) -> float:
    assert cell.load is not None, "what is routed has a load"
    return cell.load.valid


def collapse(loads: Sequence[tuple[float, float]]) -> Verdict:
    """Of pairs of the largest over the mean load and the most that this can be, N_E / K: nearer to the most than to even?

    Undecided where all have too little room.
    """
    if all(most < ROOM for _, most in loads):
        return "undecided"
    fallen = [load > (1 + most) / 2 for load, most in loads]
    return _all_or_none(fallen, [not item for item in fallen])


def _all_or_none(for_it: Sequence[bool], against_it: Sequence[bool]) -> Verdict:
    if all(for_it):
        return "confirmed"
    return "contradicted" if all(against_it) else "undecided"


def _speed_claims(bench: LayerResult | None) -> list[DecidedClaim]:
    counts = None if bench is None else bench.expert_counts
    if bench is None or counts is None:
        return [
            DecidedClaim(numbers="29-32", topic="speed", words="time is almost flat in N_E"),
            DecidedClaim(
                numbers="4, 24", topic="speed", words="sigma-MoE is faster than the dense layer, forward and backward"
            ),
        ]
    (few, first), *_, (many, last) = counts.layers.items()
    growth = Growth(
        few=int(few.removeprefix("N_E ")),
        many=int(many.removeprefix("N_E ")),
        forward=last.forward.median_s / first.forward.median_s,
        training=last.training.median_s / first.training.median_s,
    )
    exponents = [math.log(times) / math.log(growth.many / growth.few) for times in (growth.forward, growth.training)]
    ratios = [row.training.over_dense for row in bench.rows if row.label == "sigma-moe"]
    tokens = sorted({row.tokens for row in bench.rows})
    sizes = f"{', '.join(shape.name for shape in bench.shapes)}; {tokens[0]} to {tokens[-1]:,} tokens"
    return [
        DecidedClaim(
            numbers="29-32",
            topic="speed",
            words=f"time is almost flat in N_E ({counts.fixed}; {counts.tokens:,} tokens)",
            verdict=_all_or_none([e < FLAT for e in exponents], [e > STEEP for e in exponents]),
            growth=growth,
        ),
        DecidedClaim(
            numbers="4, 24",
            topic="speed",
            words=f"sigma-MoE is faster than the dense layer, forward and backward ({sizes})",
            verdict=_all_or_none([ratio < 1 for ratio in ratios], [ratio > 1 for ratio in ratios]),
            times_over_dense=(min(ratios), max(ratios)),
        ),
    ]
