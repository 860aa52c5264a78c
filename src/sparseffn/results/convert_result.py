"""`convert.json`: what a model's feedforward blocks were replaced by, and what that cost and saved; format 1."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from msgspec import Struct

from sparseffn.errors import UserError
from sparseffn.stats import Difference
from sparseffn.storage import Count, Positive, PositiveInt, read

FORMAT = 1


class ReplacedBlock(Struct, frozen=True, kw_only=True):
    """One block before and after."""

    name: str
    """Of the module in its model."""
    kind: str
    """Class of the dense block."""
    method: str
    n_pairs: PositiveInt
    """Key-value pairs that the new block holds."""
    n_active: PositiveInt
    """Of those, how many a token uses."""
    params_before: PositiveInt
    params_after: PositiveInt
    active_params: PositiveInt
    """Parameters that one token's output depends on, router included."""
    flops_before: Count
    """FLOPs a token of a forward pass."""
    flops_after: Count


class ConvertedBlock(ReplacedBlock, frozen=True, kw_only=True):
    """Mean over tokens of the squared deviation from the dense output over its square, on the dense model's held-out inputs."""

    filled_error: float
    """Before any training."""
    error: float
    """At the end."""


class TextFacts(Struct, frozen=True, kw_only=True):
    name: str
    digest: str
    """Of the token ids."""
    tokens: PositiveInt


class Loss(Struct, frozen=True, kw_only=True):
    """Mean cross-entropy on the held-out text."""

    nats: float
    difference: Difference | None = None
    """To the dense model's, with the interval that the choice of the text gives; None for the dense model."""

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats)

    @property
    def change(self) -> float | None:
        """Of the perplexity, as a fraction of the dense model's."""
        return None if self.difference is None else math.expm1(self.difference.difference)


Pass = Literal["prompt", "decoding"]


class Speed(Struct, frozen=True, kw_only=True):
    """Tokens per second of one sequence, both ways in turns."""

    what: Pass
    tokens: PositiveInt
    before: Positive
    after: Positive
    times_faster: Positive
    """The median of the ratios within each round."""


class ConvertFacts(Struct, frozen=True, kw_only=True):
    """What was asked for."""

    method: str
    options: dict[str, Any]
    fill: str
    fill_options: dict[str, Any]
    distill: Count
    """Steps for each layer."""
    end_to_end: Count
    """Steps of the whole model."""
    batch_tokens: PositiveInt
    lr: Positive
    end_to_end_lr: Positive
    seed: int
    context: PositiveInt
    dtype: str


class ConvertResult(Struct, frozen=True, kw_only=True):
    """One conversion; every number is of the same machine."""

    format: int = FORMAT
    kind: Literal["convert"] = "convert"
    environment: dict[str, Any]
    model: str
    """Name of the folder, or the model's on the hub."""
    family: str
    facts: ConvertFacts
    calibration: TextFacts
    held_out: TextFacts
    params_before: PositiveInt
    params_after: PositiveInt
    blocks: list[ConvertedBlock]
    dense: Loss
    filled: Loss
    """Before any training."""
    converted: Loss
    speeds: list[Speed]

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise UserError(f"`format` of the conversion must be {FORMAT}; got {self.format}; fix: convert again")

    @property
    def active_share(self) -> float:
        """Of the new blocks' pairs, those that a token uses."""
        return sum(b.n_active for b in self.blocks) / sum(b.n_pairs for b in self.blocks)

    @property
    def flops_share(self) -> float:
        """FLOPs of the new blocks over those of the dense ones."""
        return sum(b.flops_after for b in self.blocks) / sum(b.flops_before for b in self.blocks)


def read_conversion(path: Path) -> ConvertResult:
    """Read a `convert.json`.

    Raises:
        UserError: it is absent or damaged.
    """
    return read(path, ConvertResult, fix="convert again")


def read_conversions(folder: Path) -> list[ConvertResult]:
    """Every result of a folder, one file each, in the order of their names.

    Raises:
        UserError: one is damaged.
    """
    return [read_conversion(path) for path in sorted(folder.glob("*.json"))]
