"""Usage of experts (channels, values) over a split: load, dead units, active units a token, co-occurrence.

Section 5 of the paper: share of the total selection weight that an expert receives, sorted, per layer, where collapse shows
as a cliff; active channels per layer, mean and standard deviation over tokens; experts selected together, row-normalised.

Running sums stay on the model's device and are read when somebody asks for a result.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, final

import numpy as np
import torch
from msgspec import structs
from torch import Tensor, nn

from sparseffn.data import EvalWindow
from sparseffn.ffn import FeedForward, RoutingStats
from sparseffn.results.analysis_result import LayerLoad, Load
from sparseffn.results.comparison_result import ActiveChannels, Cooccurrence, LayerShares, UsageCounts
from sparseffn.training.snapshots import layer_name

# A unit is dead when it serves less than this share of the mean load.
DEAD_SHARE = 0.01
# Longer curves are thinned out for drawing.
MAX_POINTS = 512
# Wider matrices of co-occurrence say little on a page and cost much.
MAX_COOCCURRENCE = 128


def load_of(counts: Tensor) -> Load:
    """Evenness of a load, tokens by unit; where nothing is selected, entropy 0 and a largest load of 1."""
    mean = float(counts.sum()) / len(counts)
    return Load(entropy=_evenness(counts), largest_over_mean=float(counts.max()) / mean if mean > 0 else 1.0)


def dead_share(counts: Tensor) -> float:
    """Share of the units with under 1% of the mean load."""
    return _n_dead(counts) / len(counts)


def _n_dead(counts: Tensor) -> int:
    return int((counts < DEAD_SHARE * float(counts.sum()) / len(counts)).sum())


def _evenness(amounts: Tensor) -> float:
    """Entropy of the shares over its maximum, log n; 0 where one unit takes everything."""
    if len(amounts) < 2 or float(amounts.sum()) == 0:
        return 0.0
    share = amounts.double() / amounts.double().sum()
    return float(torch.special.entr(share).sum()) / math.log(len(amounts))


@final
class Moments:
    """Running sums of numbers and their squares, of so many tokens."""

    def __init__(self) -> None:
        self.n: Tensor | int = 0
        self.sum: Tensor | float = 0.0
        self.square_sum: Tensor | float = 0.0

    def add(self, values: Tensor, *, n: Tensor | int) -> None:
        numbers = values.double()
        self.n = self.n + n
        self.sum = self.sum + numbers.sum()
        self.square_sum = self.square_sum + numbers.square().sum()

    def mean_and_std(self) -> tuple[float, float]:
        n = max(int(self.n), 1)
        mean = float(self.sum) / n
        return mean, max(0.0, float(self.square_sum) / n - mean**2) ** 0.5


@final
class LayerUsage:
    """Running sums of one layer, on one device."""

    def __init__(self, n_units: int, device: torch.device | str = "cpu") -> None:
        self.counts = torch.zeros(n_units, dtype=torch.int64, device=device)
        self.weights = torch.zeros(n_units, dtype=torch.float64, device=device)
        self.active_units = Moments()
        self.together: Tensor | None = None

    def add(self, stats: RoutingStats) -> None:
        self.counts += stats.counts
        self.weights += stats.weights.double()
        # A padded token has no active unit and does not count.
        self.active_units.add(stats.active, n=stats.n_tokens)
        selection = stats.selection
        if selection is not None and selection.k is not None and selection.k > 1 and len(self.counts) <= MAX_COOCCURRENCE:
            chosen = selection.weights.new_zeros(selection.n_tokens, len(self.counts), dtype=torch.float32)
            chosen.scatter_(1, selection.indices.view(-1, selection.k), (selection.weights != 0).float().view(-1, selection.k))
            pairs = (chosen.t() @ chosen).double()
            self.together = pairs if self.together is None else self.together + pairs

    @property
    def n_dead(self) -> int:
        """Units with under 1% of the mean load."""
        return _n_dead(self.counts)

    def load(self, layer: int) -> LayerLoad:
        return LayerLoad(
            layer=layer,
            n_units=len(self.counts),
            **structs.asdict(load_of(self.counts)),
            weight_entropy=_evenness(self.weights),
            n_dead=self.n_dead,
        )

    def shares(self) -> list[float]:
        """Share of the total selection weight of each unit, descending, thinned out to at most 512 points."""
        weights = self.weights.cpu()
        share = (weights / weights.sum().clamp_min(1e-30)).sort(descending=True).values
        if len(share) > MAX_POINTS:
            share = share[torch.linspace(0, len(share) - 1, MAX_POINTS).round().long()]
        return [round(float(s), 8) for s in share]

    def cooccurrence(self) -> list[list[float]] | None:
        """Of the times that row's expert was selected with another, the share that was with column's; diagonal 0."""
        if self.together is None:
            return None
        pairs = self.together.cpu().numpy().copy()
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
                if name not in self.layers:
                    self.layers[name] = LayerUsage(len(call.counts), call.counts.device)
                self.layers[name].add(call)

    def result(self) -> UsageCounts:
        """Usage, active units, co-occurrence of the middle layer, share of dead units."""
        layers = list(self.layers.values())
        middle = len(layers) // 2
        matrix = layers[middle].cooccurrence() if layers else None
        n_units = sum(len(layer.counts) for layer in layers)
        return UsageCounts(
            usage=[
                LayerShares(layer=i, share=layer.shares(), uniform=1.0 / len(layer.counts)) for i, layer in enumerate(layers)
            ],
            active=[_active(i, layer.active_units, len(layer.counts)) for i, layer in enumerate(layers)],
            cooccurrence=None if matrix is None else Cooccurrence(layer=middle, matrix=matrix),
            dead_share=sum(layer.n_dead for layer in layers) / max(n_units, 1),
        )


@final
class ChannelCounter:
    """Active channels of blocks whose unit is the expert: coefficients that are not zero, which the selection does not show.

    A mixture computes K G channels for a token, and ReLU leaves some of them. Counted from `layer.coefficients(x)`, the
    framework's alpha, so that a mixture and the dense block are counted alike; that computes the first layer a second time.
    """

    def __init__(self) -> None:
        self.layers: dict[str, tuple[int, Moments]] = {}
        # Runs of each block in this window: a shared one runs once for every layer.
        self._runs: Counter[str] = Counter()

    @contextmanager
    def counting(self, model: nn.Module) -> Iterator[None]:
        """Count what runs through the model's blocks while the context is open."""
        blocks = {name: module for name, module in model.named_modules() if isinstance(module, FeedForward)}
        handles = [block.register_forward_pre_hook(self._hook(name)) for name, block in blocks.items()]
        handles.append(model.register_forward_pre_hook(lambda module, args: self._runs.clear()))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Any:
        def before(block: FeedForward, args: tuple[Tensor, ...]) -> None:
            with torch.no_grad():
                active = (block.coefficients(args[0]) != 0).sum(dim=-1)
            layer = layer_name(name, self._runs[name])
            self._runs[name] += 1
            _, moments = self.layers.setdefault(layer, (block.config.n_channels, Moments()))
            moments.add(active, n=active.numel())

        return before

    def result(self) -> list[ActiveChannels]:
        """Mean and standard deviation over tokens, by layer."""
        return [_active(i, moments, total) for i, (total, moments) in enumerate(self.layers.values())]


def _active(layer: int, moments: Moments, total: int) -> ActiveChannels:
    mean, std = moments.mean_and_std()
    return ActiveChannels(layer=layer, mean=mean, std=std, total=total)
