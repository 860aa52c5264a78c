"""`comparison.json`: what `sparseffn compare` found; format 1, as in version 0.1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from msgspec import Struct

from sparseffn.errors import UserError
from sparseffn.stats import MeanStd
from sparseffn.storage import Count, Positive, PositiveInt, read

FORMAT = 1
_FIX = "run `sparseffn compare` again"


class LayerShares(Struct, frozen=True, kw_only=True):
    """How much each unit of a layer is used."""

    layer: Count
    share: list[float]
    """Shares of the selection weight, sorted, the largest first; down-sampled where there are many units."""
    uniform: Positive
    """The share of each unit if all were used alike."""


class ActiveChannels(Struct, frozen=True, kw_only=True):
    """How many channels of a layer have a non-zero coefficient for a token."""

    layer: Count
    mean: float
    std: float | None
    total: PositiveInt


class Cooccurrence(Struct, frozen=True, kw_only=True):
    """How often the column's unit is selected for the same token as the row's; each row sums to 1."""

    layer: Count
    matrix: list[list[float]]


class UsageCounts(Struct, frozen=True, kw_only=True):
    """`usage.json` of a run: the use of its blocks on the beginning of validation."""

    usage: list[LayerShares]
    active: list[ActiveChannels]
    cooccurrence: Cooccurrence | None
    dead_share: float


class ValidPoint(Struct, frozen=True, kw_only=True):
    """A point of the validation curve."""

    step: Count
    time_s: float
    """Steps x the method's median step."""
    valid: float | None = None
    """In the comparison's metric; None where it is too large for a number."""


class TrainPoint(Struct, frozen=True, kw_only=True):
    """Losses of a training step."""

    step: Count
    time_s: float
    loss: float | None = None
    balance_loss: float | None = None
    """In nats, weighted."""


class Curve(Struct, frozen=True, kw_only=True):
    """How one run went."""

    seed: int | None = None
    points: list[ValidPoint] = []
    train: list[TrainPoint] = []


class MethodResult(Struct, frozen=True, kw_only=True):
    """One method: a row of the table. Ratios are to the dense block."""

    label: str
    method: str
    config: dict[str, Any] = {}
    total_params: Count
    active_params: Count
    ffn_params: Count | None = None
    residual_params: int | None = None
    """Parameters of the whole model less the dense model's."""
    residual_percent: float | None = None
    active_channels: float | None = None
    marks: list[str] = []
    """What a reader must know of the row."""
    ffn_flops_vs_dense: float | None = None
    ffn_flops_convention: float | None = None
    """Active channels over all, the paper's way to state the cost."""
    saved_bytes_vs_dense: float | None = None
    layer_time_forward_vs_dense: float | None = None
    layer_time_training_vs_dense: float | None = None
    step_time_s: Positive | None = None
    tokens_per_s: Positive | None = None
    valid: MeanStd | None = None
    """In the comparison's metric; None without a finished run or where it is too large for a number."""
    test: MeanStd | None = None
    valid_at_equal_time: float | None = None
    dead_share: float | None = None
    """Share of units with under 1% of the mean load; None where nothing is routed."""
    unit: str | None = None
    """What is selected: "experts", "values", "channels"."""
    curves: list[Curve] = []
    usage: list[LayerShares] | None = None
    active: list[ActiveChannels] | None = None
    cooccurrence: Cooccurrence | None = None


class MissingRun(Struct, frozen=True, kw_only=True):
    """A run without a result."""

    label: str
    seed: int | None = None
    reason: str | None = None


class ComparisonResult(Struct, frozen=True, kw_only=True):
    """A comparison of methods at equal parameter count."""

    format: int
    title: str
    finished: bool = True
    missing: list[MissingRun] = []
    corpus: dict[str, Any]
    """`name`, `digest`, `tokenizer`, `unit`, sizes of `splits`, and what else identifies it."""
    metric: str
    preset: str | None = None
    backbone: str = "transformer-xl"
    """The model around the feedforward blocks; of "llama" the dense block is gated."""
    seeds: list[int]
    steps: PositiveInt
    tokens_per_step: PositiveInt | None = None
    settings: dict[str, Any] = {}
    """Training settings that all methods share."""
    model: dict[str, Any] = {}
    """`d_model`, `n_layers`, `n_heads`, `d_head`."""
    environment: dict[str, Any] = {}
    curve_tokens: PositiveInt | None = None
    """First tokens of validation that each point of a curve uses."""
    evaluated_tokens: PositiveInt | None = None
    """First tokens of validation and of test that final losses are of; None: whole splits."""
    equal_time_s: Positive | None = None
    """Training time of the fastest method: how far every run is."""
    budget_s: Positive | None = None
    methods: list[MethodResult]


class _Header(Struct, frozen=True):
    format: Any = None


def read_comparison(path: Path | str) -> ComparisonResult:
    """Read a `comparison.json`.

    Raises:
        UserError: it is not there, damaged, or of another format.
    """
    found = read(Path(path), _Header, fix=_FIX).format
    if found != FORMAT:
        raise UserError(
            f"`format` of the comparison must be {FORMAT}; got {found!r}; fix: make the report with the version of "
            f"sparseffn that wrote the file, or {_FIX}"
        )
    return read(Path(path), ComparisonResult, fix=_FIX)
