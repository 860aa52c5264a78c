"""`study-NAME.json` of `sparseffn study`: measurements at initialisation, short trainings, and what they say.

Losses are in nats, of the first tokens of each split.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from sparseffn.results.bench_result import Environment
from sparseffn.stats import Difference, MeanStd
from sparseffn.storage import Count


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
    """Seeds of the measurements at initialisation but for the load."""
    load_seeds: int = 0
    """Of the load; 0: the same."""


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
    load_seeds: int = 0
    """Seeds of the load; 0: as many as of all else."""
    measured: dict[str, tuple[float, float, float] | None]
    """Median, least and greatest over seeds; None where a quantity has no meaning."""
    predicted: dict[str, float | None]


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """What the framework says of a variant's gates before the first step."""

    gate_square: float
    interference: tuple[float, float]
    """Bounds at equal logits: independent contributions, and equal ones."""


class SelectorProbe(msgspec.Struct, frozen=True, kw_only=True):
    """State of the selectors after some steps, as means over layers."""

    step: Count = 0
    load_entropy: float
    """Entropy of the experts' shares of the selections over its maximum, log N_E."""
    dead: float
    """Share of the experts with under 1% of the mean load."""
    largest_over_mean: float
    """Largest load over the mean."""
    norm: float
    """Mean norm of the selector's rows."""
    norm_spread: float
    """Standard deviation of the rows' norms over their mean."""
    gate_square: float
    """Mean of `s^2` over selections."""
    interference: float
    """Share of the squared gradient of the logits that comes from other experts."""


SELECTOR_QUANTITIES = ("load_entropy", "largest_over_mean", "dead", "norm", "norm_spread")
"""Quantities of a probe that variants are compared by."""


class StudyRun(msgspec.Struct, frozen=True, kw_only=True):
    seed: Count
    valid: float
    test: float
    probes: list[SelectorProbe]
    """At the start, at every checkpoint, at the end."""


class Variant(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    method: str
    predicted: Prediction
    runs: list[StudyRun]
    valid: MeanStd | None = None
    test: MeanStd | None = None
    start: dict[str, float] = {}
    """Quantities of the first probe, means over runs."""
    end: dict[str, float] = {}
    against_first: dict[str, Difference] = {}
    """This variant less the first one, paired by seed: of `valid`, `test` and the last probe's `SELECTOR_QUANTITIES`."""


class MissingRun(msgspec.Struct, frozen=True, kw_only=True):
    label: str
    seed: int
    reason: str


class StudyResult(msgspec.Struct, frozen=True, kw_only=True):
    format: Literal[1] = 1
    kind: Literal["study-init", "study-competition", "study-balance"]
    environment: Environment
    """Of the runs."""
    settings: StudySizes
    variants: list[Variant]
    missing: list[MissingRun]
    corpus: dict[str, Any]
    start: list[StartRow] = []
    """Of study init."""
    start_environment: Environment | None = None
    """Of `start`."""
    missing_sizes: list[str] = []
    """Sizes whose initialisation is not measured yet."""
