"""Usage of experts (channels, values) over a split: load, dead units, active units a token, co-occurrence.

Section 5 of the paper: share of the total selection weight that an expert receives, sorted, per layer, where collapse shows
as a cliff; active channels per layer, mean and standard deviation over tokens; experts selected together, row-normalised.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from sparseffn.data import EvalWindow
from sparseffn.ffn import RoutingStats

# A unit is dead when it serves less than this share of the mean load.
DEAD_SHARE = 0.01
# Longer curves are thinned out for drawing.
MAX_POINTS = 512
# Wider matrices of co-occurrence say little on a page and cost much.
MAX_COOCCURRENCE = 128


def load_of(counts: Tensor) -> dict[str, float]:
    """Evenness of a load, tokens by unit.

    Returns:
        `entropy`: of the units' shares of the selections, over its maximum log n_units; 1 when all are used alike, 0 when one
        alone is (and where there is only one). `largest_over_mean`: the most used unit against the mean, 1 to n_units.
    """
    mean = float(counts.sum()) / len(counts)
    return {"entropy": _evenness(counts), "largest_over_mean": float(counts.max()) / mean if mean > 0 else 1.0}


def _evenness(amounts: Tensor) -> float:
    """Entropy of the shares over its maximum."""
    if len(amounts) < 2 or float(amounts.sum()) == 0:
        return 0.0
    share = amounts.double() / amounts.double().sum()
    return float(torch.special.entr(share).sum()) / math.log(len(amounts))


@final
class Moments:
    """Running sums of numbers and their squares."""

    def __init__(self) -> None:
        self.n, self.sum, self.square_sum = 0, 0.0, 0.0

    def add(self, values: Tensor, *, n: int) -> None:
        """Add values that belong to `n` tokens."""
        numbers = values.double()
        self.n += n
        self.sum += float(numbers.sum())
        self.square_sum += float(numbers.square().sum())

    def mean_and_std(self) -> tuple[float, float]:
        """Mean and standard deviation over the tokens."""
        mean = self.sum / max(self.n, 1)
        return mean, max(0.0, self.square_sum / max(self.n, 1) - mean**2) ** 0.5


@final
class LayerUsage:
    """Running sums of one layer."""

    def __init__(self, n_units: int) -> None:
        self.counts = torch.zeros(n_units, dtype=torch.int64)
        self.weights = torch.zeros(n_units, dtype=torch.float64)
        self.active_units = Moments()
        self.together: Tensor | None = None

    def add(self, stats: RoutingStats) -> None:
        """Add one call's statistics."""
        self.counts += stats.counts.cpu()
        self.weights += stats.weights.double().cpu()
        # A padded token has no active unit and does not count.
        self.active_units.add(stats.active, n=int(stats.n_tokens))
        selection = stats.selection
        if selection is not None and selection.k is not None and selection.k > 1 and len(self.counts) <= MAX_COOCCURRENCE:
            chosen = torch.zeros(selection.n_tokens, len(self.counts))
            chosen.scatter_(1, selection.indices.view(-1, selection.k), (selection.weights != 0).float().view(-1, selection.k))
            pairs = (chosen.t() @ chosen).double()
            self.together = pairs if self.together is None else self.together + pairs

    @property
    def n_dead(self) -> int:
        """Units with under 1% of the mean load."""
        mean = float(self.counts.sum()) / len(self.counts)
        return int((self.counts < DEAD_SHARE * mean).sum())

    def load(self) -> dict[str, float | int]:
        """How evenly the units are used."""
        return {**load_of(self.counts), "weight_entropy": _evenness(self.weights), "n_dead": self.n_dead}

    def shares(self) -> list[float]:
        """Share of the total selection weight of each unit, descending, thinned out to at most 512 points."""
        share = (self.weights / self.weights.sum().clamp_min(1e-30)).sort(descending=True).values
        if len(share) > MAX_POINTS:
            share = share[torch.linspace(0, len(share) - 1, MAX_POINTS).round().long()]
        return [round(float(s), 8) for s in share]

    def active(self) -> tuple[float, float]:
        """Mean and standard deviation over tokens of the units that a token uses."""
        return self.active_units.mean_and_std()

    def cooccurrence(self) -> list[list[float]] | None:
        """Of the times that row's expert was selected with another, the share that was with column's; diagonal 0."""
        if self.together is None:
            return None
        pairs = self.together.numpy().copy()
        np.fill_diagonal(pairs, 0.0)
        rows = pairs / np.maximum(pairs.sum(axis=1, keepdims=True), 1.0)
        return [[round(float(v), 5) for v in row] for row in rows]


@final
class UsageCounter:
    """Usage of all blocks of a model, over all layers that share one; pass `observe` to `evaluate`."""

    def __init__(self) -> None:
        self.layers: dict[str, LayerUsage] = {}

    def observe(self, stats: Mapping[str, Sequence[RoutingStats]], window: EvalWindow | None = None) -> None:
        """Add the statistics of one window, which itself is of no matter here."""
        for name, calls in stats.items():
            for call in calls:
                self.layers.setdefault(name, LayerUsage(len(call.counts))).add(call)

    def to_json(self) -> dict[str, Any]:
        """What the report draws: usage, active units, co-occurrence of the middle layer, share of dead units."""
        layers = list(self.layers.values())
        middle = len(layers) // 2
        matrix = layers[middle].cooccurrence() if layers else None
        active = [layer.active() for layer in layers]
        n_units = sum(len(layer.counts) for layer in layers)
        return {
            "usage": [
                {"layer": i, "share": layer.shares(), "uniform": 1.0 / len(layer.counts)} for i, layer in enumerate(layers)
            ],
            "active": [
                {"layer": i, "mean": mean, "std": std, "total": len(layer.counts)}
                for i, (layer, (mean, std)) in enumerate(zip(layers, active, strict=True))
            ],
            "cooccurrence": None if matrix is None else {"layer": middle, "matrix": matrix},
            "dead_share": sum(layer.n_dead for layer in layers) / max(n_units, 1),
        }
