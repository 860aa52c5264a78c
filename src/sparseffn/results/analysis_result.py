"""`analysis.json`: what the feedforward blocks of a trained model do; format 1, as in version 0.1."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct, field

from sparseffn.errors import UserError
from sparseffn.results.comparison_result import ActiveChannels, LayerShares
from sparseffn.storage import Count, PositiveInt

FORMAT = 1


class RunFacts(Struct, frozen=True, kw_only=True):
    """The run; no path, since the file may travel."""

    name: str
    method: str
    config: dict[str, Any] = {}
    params: PositiveInt
    d_model: PositiveInt
    n_layers: PositiveInt
    n_channels: PositiveInt
    """Key-value pairs of a block."""
    active_channels: PositiveInt
    """Of those, how many a token may use."""
    corpus: str
    digest: str
    steps: Count
    valid_nats: float


class Load(Struct, frozen=True, kw_only=True):
    """How evenly a layer's units are used."""

    entropy: float
    """Of the units' shares of the selections, over its maximum: 1 when all are used alike."""
    largest_over_mean: float
    """The most used unit against the mean."""


class LayerLoad(Load, frozen=True, kw_only=True):
    layer: Count
    n_units: PositiveInt
    weight_entropy: float
    """As `entropy`, of the shares of the selection weight."""
    n_dead: Count
    """Units with under 1% of the mean load."""


class ServedToken(Struct, frozen=True, kw_only=True):
    """A token that an expert is selected for."""

    token: Count
    text: str
    """Spaces as ␣, control characters and bytes that are no text by their escape."""
    share: float
    """Of the expert's selections."""
    lift: float
    """How many times as frequent as in the text."""


class ServedByExpert(Struct, frozen=True, kw_only=True):
    """The tokens that set what an expert is selected for apart from the text, the most telling first."""

    expert: Count
    load: float
    """Share of all selections."""
    tokens: list[ServedToken]


class LoadAtStep(Struct, frozen=True, kw_only=True):
    step: Count
    layers: list[Load]


class Overlap(Struct, frozen=True, kw_only=True):
    """Agreement of two sets of experts a token, mean over tokens: |A and B| / |A or B|."""

    jaccard: float


class OverlapOfSteps(Struct, frozen=True, kw_only=True):
    from_step: Count = field(name="from")
    to: Count
    layers: list[Overlap]


class RoutingOverTraining(Struct, frozen=True, kw_only=True):
    """The selections of the same validation tokens at several steps."""

    source: Literal["snapshots", "checkpoints"]
    n_tokens: PositiveInt
    points: list[LoadAtStep]
    stability: list[OverlapOfSteps]
    """Each step against the one before."""
    chance: Overlap
    """Of two sets drawn evenly at random."""


class AnalysisResult(Struct, frozen=True, kw_only=True):
    """One run's model on one or more splits; lists are by layer."""

    format: int = FORMAT
    kind: Literal["analysis"] = "analysis"
    run: RunFacts
    splits: list[str]
    n_tokens: PositiveInt
    unit: str
    """What is selected: "experts", "values", "channels"."""
    usage: list[LayerShares]
    active: list[ActiveChannels]
    load: list[LayerLoad]
    cooccurrence: list[list[list[float]] | None]
    """Of the times that the row's expert was selected with another, the share that was with the column's."""
    tokens: list[list[ServedByExpert]] | None = None
    training: RoutingOverTraining | None = None

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise UserError(f"`format` of the analysis must be {FORMAT}; got {self.format}; fix: analyse the run again")
