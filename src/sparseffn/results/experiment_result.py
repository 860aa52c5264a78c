"""What `sparseffn reproduce evidence` writes of an experiment by rules: every run's losses, every contrast's verdict."""

from __future__ import annotations

from typing import Any

import msgspec

from sparseffn.results.table_result import Load
from sparseffn.stats import Verdict


class PairNumbers(msgspec.Struct, frozen=True, kw_only=True):
    """How richly the experts of a layer are combined; see `analysis.pairs`."""

    effective: float
    """Pairs that tokens select: the exponential of their entropy."""
    independent: float
    """Of an independent choice with the same loads."""
    possible: int


class LayerLoads(msgspec.Struct, frozen=True, kw_only=True):
    """A layer's load while a run trained, on the same tokens of validation at each step."""

    steps: list[int]
    entropy: list[float]
    """Of the experts' shares of the selections over its maximum, log N_E."""
    dead: list[float]
    """Share of the experts with under 1% of the mean load."""


class ExperimentRun(msgspec.Struct, frozen=True, kw_only=True):
    """A finished run."""

    candidate: str
    seed: int
    test: float
    """Nats, of the whole split."""
    valid: float
    train_s: float
    wall_s: float
    curve: list[tuple[int, float]] = []
    """Step and nats of each point of the validation curve."""
    load: Load | None = None
    pairs: PairNumbers | None = None
    """Of experts in the middle layer, on the beginning of validation; None where a token selects one or none."""
    loads: list[LayerLoads] = []
    """By layer, of experiments about collapse."""
    digest: str
    """Of model, training settings and corpus."""
    version: str
    sources: str
    """Digest of the code that made it."""


class PlannedCandidate(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    params: int
    flops: float | None = None
    """Of training one token, the whole model: 2 for each multiply-add."""
    steps: int
    ffn: dict[str, Any]


class DecidedContrast(msgspec.Struct, frozen=True, kw_only=True):
    """A contrast at a look, negative being better; nothing but its name and words before the first look."""

    name: str
    words: str
    claimed: str | None
    published_percent: float | None
    """Of the loss, on the paper's column."""
    n_finished: int
    """Of the rule's first seeds, those that all candidates of the contrast have."""
    values: list[float]
    """Of those seeds, in nats."""
    n_seeds: int = 0
    """Of the look."""
    bound: float | None = None
    """Of |t| at the look."""
    nats: float | None = None
    low: float | None = None
    high: float | None = None
    percent: float | None = None
    """Of the reference's loss."""
    low_percent: float | None = None
    high_percent: float | None = None
    valid_percent: float | None = None
    """The same on validation, which decides nothing."""
    verdict: Verdict | None = None
    reason: str | None = None


class DecidedCollapse(msgspec.Struct, frozen=True, kw_only=True):
    """Of a candidate: how many of its runs collapsed; see `paper.collapse`."""

    candidate: str
    claimed: bool
    """Whether the paper shows that it does."""
    n_finished: int
    n_collapsed: int
    verdict: Verdict | None = None
    """Of what is claimed, once all seeds are finished."""


class ExperimentResult(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="paper-experiment"):
    version: int = 1
    name: str
    claims: str
    question: str
    reference: str
    """Candidate whose loss percentages are of."""
    seeds: list[int]
    looks: list[int]
    bounds: list[float]
    alpha: float
    candidates: list[PlannedCandidate]
    corpus: dict[str, Any]
    runs: list[ExperimentRun]
    contrasts: list[DecidedContrast]
    collapses: list[DecidedCollapse] = []
