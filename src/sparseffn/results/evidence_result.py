"""What `sparseffn reproduce evidence` writes: the list of its runs (`evidence.json`), verdicts on claims (`claims.json`)."""

from __future__ import annotations

from typing import Literal

import msgspec

from sparseffn.stats import Claimed, Difference, Verdict


class EvidenceRun(msgspec.Struct, frozen=True, kw_only=True):
    position: int
    table: str
    label: str
    seed: int
    why: str
    status: Literal["finished", "recorded", "missing", "failed", "settled"]
    """`recorded` is finished by the record of an experiment, while the pool does not have the run; `settled` is not run and not
    missing either, as a look at fewer seeds has decided what it is for."""
    reason: str | None = None
    wall_s: float | None = None
    digest: str


class EvidenceResult(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="paper-evidence"):
    version: Literal[1] = 1
    column: str
    runs: list[EvidenceRun]


class Growth(msgspec.Struct, frozen=True, kw_only=True):
    """How many times as long the layer takes with `many` experts as with `few`."""

    few: int
    many: int
    forward: float
    training: float


class DecidedClaim(msgspec.Struct, frozen=True, kw_only=True):
    """A claim with its verdict and the numbers that this rests on: one of difference, loads, growth and times."""

    numbers: str
    """Of `StatedClaim`; "-" for a released form, which no claim is about."""
    topic: Literal["loss", "load", "speed"]
    words: str
    claimed: Claimed | None = None
    """Of a difference."""
    verdict: Verdict | None = None
    """None where nothing was run."""
    reason: str | None = None
    """Why it is undecided, where no interval says so."""
    published_percent: float | None = None
    """Difference of losses in percent of the second row's, on WT-S."""
    values: list[float] = []
    """The difference of each common seed."""
    percent: Difference | None = None
    """`difference` in percent of the second row's mean loss."""
    p: float | None = None
    """Of a difference that is tested against zero."""
    p_corrected: float | None = None
    """For the number of claims that are."""
    seeds: list[int] = []
    """Number of seeds of each measurement."""
    difference: Difference | None = None
    """First row less second; negative is better."""
    through_dense: bool = False
    """Whether it is the difference of two differences from dense, with the widths of both intervals."""
    loads: list[float] = []
    """Largest over mean load on validation, in the worst layer."""
    largest_possible_load: float | None = None
    growth: Growth | None = None
    times_over_dense: tuple[float, float] | None = None
    """Least and greatest."""


class StatedClaim(msgspec.Struct, frozen=True, kw_only=True):
    """A claim of the paper in our own words, and the result that decides it."""

    numbers: str
    claim: str
    decided_by: str


class ClaimsResult(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="paper-claims"):
    version: Literal[1] = 1
    unit: str
    """Of differences."""
    room: float
    """N_E / K below which nothing is said of collapse."""
    flat: float
    """Exponent of time over N_E below which it counts as almost flat."""
    steep: float
    """And above which it does not."""
    stated: list[StatedClaim]
    """All that a run can contradict, decided here or not."""
    claims: list[DecidedClaim]
