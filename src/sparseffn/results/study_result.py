"""`study-NAME.json` of `sparseffn study`: measurements at initialisation, short trainings, and what they say.

Losses are in nats, of the first tokens of each split.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from sparseffn.stats import Difference
from sparseffn.storage import Count

Verdict = Literal["better", "worse", "undecided"]


class GridSizes(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes at which initialisation is measured: one varies, the others stand at the base."""

    d_model: int
    n_layers: list[int]
    n_experts: list[int]
    expert_size: list[int]
    k: list[int]
    base: tuple[int, int, int, int]
    """n_layers, n_experts, expert_size and k where they do not vary."""
    n_tokens: int
    n_gradients: int


class StudySizes(msgspec.Struct, frozen=True, kw_only=True):
    study: str
    n_seeds: int
    grid: GridSizes
    preset: dict[str, Any]
    eval_tokens: int
    """First tokens of validation and test that the losses are of."""
    start_seeds: int
    """Seeds of the measurements at initialisation."""


class StartRow(msgspec.Struct, frozen=True, kw_only=True):
    """A scheme of initialisation at one size on one kind of input, over the dense block; see `paper.initialisation`."""

    n_layers: int
    n_experts: int
    expert_size: int
    k: int
    input: str
    """gaussian or text."""
    init: str
    selector: str
    measured: dict[str, tuple[float, float, float] | None]
    """Median, least and greatest over seeds; None where a quantity has no meaning."""
    predicted: dict[str, float | None]


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """What the framework says of a variant's gates before the first step."""

    gate_square: float
    interference: tuple[float, float]
    """Bounds at equal logits: independent contributions, and equal ones."""


class SelectorProbe(msgspec.Struct, frozen=True, kw_only=True):
    """State of the selectors after some steps; see `paper.competition.Probe`."""

    step: Count
    load_entropy: float
    dead: float
    largest_over_mean: float
    norm: float
    norm_spread: float
    gate_square: float
    interference: float


class StudyRun(msgspec.Struct, frozen=True, kw_only=True):
    seed: Count
    valid: float
    test: float
    probes: list[SelectorProbe]
    """At the start, at every checkpoint, at the end."""


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """A variant less the first one, paired by seed."""

    valid: Difference
    test: Difference
    valid_verdict: Verdict
    test_verdict: Verdict
    selectors: dict[str, Difference]
    """Of the last probe, by quantity."""


class Variant(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    method: str
    predicted: Prediction
    runs: list[StudyRun]
    against_first: Comparison | None = None
    """None for the first variant, and without a common seed."""


class MissingRun(msgspec.Struct, frozen=True, kw_only=True):
    label: str
    seed: int
    reason: str


class StudyResult(msgspec.Struct, frozen=True, kw_only=True):
    format: Literal[1] = 1
    kind: Literal["study-init", "study-competition", "study-balance"]
    environment: dict[str, Any]
    """Of the runs."""
    settings: StudySizes
    variants: list[Variant]
    missing: list[MissingRun]
    corpus: dict[str, Any]
    start: list[StartRow] = []
    """Of study init."""
    missing_sizes: list[str] = []
    """Sizes whose initialisation is not measured yet."""
