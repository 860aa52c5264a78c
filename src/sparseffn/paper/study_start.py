"""Initialisation over depth, N_E, G and K: each scheme beside the dense block, and beside what the framework predicts.

One point at a time changes one size of a base point. Schemes: three initialisations of the experts times two of the selector.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from sparseffn.data import ContiguousStreams, Corpus
from sparseffn.ffn.dense import DenseConfig
from sparseffn.ffn.sigma_moe import SigmaMoEConfig
from sparseffn.models import TransformerXLConfig
from sparseffn.paper.initialisation import (
    Inputs,
    Load,
    Start,
    gaussian_inputs,
    measure_block,
    measure_start,
    start_load,
    text_inputs,
)
from sparseffn.paper.predictions import (
    gate_square,
    largest_over_mean,
    load_norm_correlation,
    load_variation,
    load_variation_of_pairs,
    mean_excess,
    ratios,
)
from sparseffn.results.study_result import StartRow

INITS = ("shared", "standard", "switch")
SELECTORS = ("equal-norm", "free")
INPUTS = ("gaussian", "text")
Numbers = dict[str, float | None]
Spread = tuple[float, float, float] | None
"""Median, least and greatest; None where a quantity has no meaning."""
LOAD = tuple(field.name for field in dataclasses.fields(Load))

# Tokens whose pairs are compared for a prediction; pairs grow with the square.
_PAIRED = 1024
_D_HEAD, _CONTEXT = 32, 128
# What the untrained model's own blocks hold; the last one only has to be asked for its input.
_MODEL_WIDTHS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """Sizes at which initialisation is measured."""

    d_model: int = 128
    n_layers: tuple[int, ...] = (1, 2, 4, 8, 16)
    n_experts: tuple[int, ...] = (8, 16, 32, 64, 128, 256)
    expert_size: tuple[int, ...] = (32, 64, 128, 256, 512)
    k: tuple[int, ...] = (1, 2, 4, 8, 16, 24)
    base: tuple[int, int, int, int] = (4, 32, 64, 4)
    """n_layers, n_experts, expert_size and k where they do not vary."""
    n_tokens: int = 8192
    n_gradients: int = 1024

    @property
    def points(self) -> list[Point]:
        base = Point(*self.base)
        varied = [dataclasses.replace(base, **{name: value}) for name in AXES for value in getattr(self, name)]
        return list(dict.fromkeys(varied))


@dataclass(frozen=True, slots=True)
class Point:
    n_layers: int
    n_experts: int
    expert_size: int
    k: int

    @property
    def name(self) -> str:
        return f"L{self.n_layers}-E{self.n_experts}-G{self.expert_size}-K{self.k}"


AXES = ("n_layers", "n_experts", "expert_size", "k")


def measure_point(
    point: Point, grid: Grid, corpus: Corpus, seeds: Sequence[int], device: torch.device, load_seeds: Sequence[int] = ()
) -> list[StartRow]:
    """Every scheme on both inputs at one size: median, least and greatest over seeds, beside the prediction.

    The load, which needs no gradient, is that of `load_seeds` where there are any.
    """
    rows = []
    dense_config = DenseConfig(d_model=grid.d_model, d_ff=point.n_experts * point.expert_size, n_layers=point.n_layers)
    for source in INPUTS:
        found: dict[tuple[str, str], list[tuple[Start, Numbers]]] = {}
        for seed in seeds:
            inputs = _inputs(source, point.n_layers, grid, corpus, seed).to(device)
            dense = measure_block(dense_config, inputs, seed=seed)
            for config in schemes(point, grid.d_model):
                start = measure_start(config, dense, inputs, seed=seed)
                found.setdefault((config.init, config.selector_init), []).append((start, _predicted(config, inputs, source)))
        loads = _loads(point, grid, corpus, load_seeds, device, source)
        for (init, selector), pairs in found.items():
            measured, wanted = _summary([_flat(start) for start, _ in pairs], [prediction for _, prediction in pairs])
            # The order of logits, hence the load, does not depend on how the experts start: it stands with the first scheme.
            if init != INITS[0]:
                measured = {key: value for key, value in measured.items() if key not in LOAD}
                wanted = {key: value for key, value in wanted.items() if key not in LOAD}
            elif load_seeds:
                of_loads, wanted_loads = loads[selector]
                measured, wanted = measured | of_loads, wanted | wanted_loads
            rows.append(
                StartRow(
                    **dataclasses.asdict(point),
                    input=source,
                    init=init,
                    selector=selector,
                    load_seeds=len(load_seeds) or len(seeds),
                    measured=measured,
                    predicted=wanted,
                )
            )
    return rows


def _summary(found: Sequence[Numbers], wanted: Sequence[Numbers]) -> tuple[dict[str, Spread], Numbers]:
    """Of several seeds: median, least and greatest of what was measured, the median of what was predicted of it."""
    measured = {key: _spread([one[key] for one in found]) for key in found[0]}
    return measured, {key: _middle([one[key] for one in wanted]) for key in measured if key in wanted[0]}


def _loads(
    point: Point, grid: Grid, corpus: Corpus, seeds: Sequence[int], device: torch.device, source: str
) -> dict[str, tuple[dict[str, Spread], Numbers]]:
    """The load of each kind of selector rows, measured and predicted."""
    found: dict[str, list[tuple[Numbers, Numbers]]] = {}
    configs = [config for config in schemes(point, grid.d_model) if config.init == INITS[0]]
    for seed in seeds:
        inputs = _inputs(source, point.n_layers, grid, corpus, seed).to(device)
        for config, wanted in zip(configs, _predicted_loads(configs, inputs, source), strict=True):
            load = dataclasses.asdict(start_load(config, inputs, seed=seed))
            found.setdefault(config.selector_init, []).append((load, wanted))
    return {rows: _summary([load for load, _ in pairs], [wanted for _, wanted in pairs]) for rows, pairs in found.items()}


def schemes(point: Point, d_model: int) -> Iterator[SigmaMoEConfig]:
    """The six ways to begin."""
    for init, selector in itertools.product(INITS, SELECTORS):
        yield SigmaMoEConfig(d_model=d_model, **dataclasses.asdict(point), init=init, selector_init=selector)


@functools.lru_cache(maxsize=256)
def _inputs(source: str, n_layers: int, grid: Grid, corpus: Corpus, seed: int) -> Inputs:
    """Kept, as most points share a depth and a model on text takes longer than all that is measured of its last block."""
    if source == "gaussian":
        return gaussian_inputs(d_model=grid.d_model, n_tokens=grid.n_tokens, n_gradients=grid.n_gradients, seed=seed)
    streams = ContiguousStreams(corpus.train, batch=max(1, grid.n_tokens // _CONTEXT), context=_CONTEXT)
    tokens, targets = streams.window(seed % streams.n_windows)
    block = DenseConfig(d_model=grid.d_model, d_ff=_MODEL_WIDTHS * grid.d_model, n_layers=n_layers)
    model = TransformerXLConfig(
        vocab_size=corpus.tokenizer.vocab_size,
        d_model=grid.d_model,
        n_layers=n_layers,
        n_heads=max(1, grid.d_model // _D_HEAD),
        d_head=_D_HEAD,
        ffn=block,
    )
    return text_inputs(model, tokens, targets, n_gradients=min(grid.n_gradients, tokens.numel()), seed=seed)


def _predicted(config: SigmaMoEConfig, inputs: Inputs, source: str) -> Numbers:
    scale = {**dataclasses.asdict(ratios(config)), "gate_square": gate_square(config)}
    return {**scale, **_predicted_loads([config], inputs, source)[0]}


def _predicted_loads(configs: Sequence[SigmaMoEConfig], inputs: Inputs, source: str) -> list[Numbers]:
    """Of configs that differ in initialisation alone."""
    n_tokens, first = inputs.x_TD.shape[0], configs[0]
    pairs = None
    if source == "text":
        sample = inputs.x_TD[:: max(1, n_tokens // _PAIRED)].double().cpu().numpy()
        pairs = mean_excess(sample, first.k / first.n_experts)
    found = []
    for config in configs:
        variation, correlation = load_variation(config, n_tokens), load_norm_correlation(config, n_tokens)
        if pairs is not None:
            isotropic, variation = variation, load_variation_of_pairs(pairs, config, n_tokens)
            # The norms' part of a variation that the text makes for the most part.
            correlation = None if correlation is None else correlation * min(1.0, isotropic / variation)
        largest = largest_over_mean(variation, config.n_experts)
        found.append({"variation": variation, "largest_over_mean": largest, "norm_correlation": correlation})
    return found


def _flat(start: Start) -> Numbers:
    return {**dataclasses.asdict(start.ratios), "gate_square": start.gate_square, **dataclasses.asdict(start.load)}


def _spread(values: Sequence[float | None]) -> Spread:
    """Median, least and greatest; None where the quantity has no meaning."""
    numbers = [v for v in values if v is not None]
    return (_middle(numbers) or 0.0, rounded(min(numbers)), rounded(max(numbers))) if numbers else None


def _middle(values: Sequence[float | None]) -> float | None:
    numbers = [v for v in values if v is not None]
    return rounded(statistics.median(numbers)) if numbers else None


def rounded(value: float) -> float:
    """Four significant digits, which is more than the spread between seeds leaves."""
    return float(f"{value:.4g}")
