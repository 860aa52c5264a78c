"""Initialisation over depth, N_E, G and K: each scheme beside the dense block, and beside what the framework predicts.

One point at a time changes one size of a base point. Schemes: three initialisations of the experts times two of the selector.
"""

from __future__ import annotations

import dataclasses
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
    text_inputs,
)
from sparseffn.paper.predictions import (
    gate_square,
    largest_over_mean,
    load_norm_correlation,
    load_variation,
    load_variation_on,
    ratios,
)
from sparseffn.results.study_result import StartRow

INITS = ("shared", "standard", "switch")
SELECTORS = ("equal-norm", "free")
INPUTS = ("gaussian", "text")
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


def measure_point(point: Point, grid: Grid, corpus: Corpus, seeds: Sequence[int], device: torch.device) -> list[StartRow]:
    """Every scheme on both inputs at one size: median, least and greatest over seeds, beside the prediction."""
    rows = []
    dense_config = DenseConfig(d_model=grid.d_model, d_ff=point.n_experts * point.expert_size, n_layers=point.n_layers)
    for source in INPUTS:
        found: dict[tuple[str, str], list[tuple[Start, dict[str, float | None]]]] = {}
        for seed in seeds:
            inputs = _inputs(source, point, grid, corpus, seed).to(device)
            dense = measure_block(dense_config, inputs, seed=seed)
            for config in schemes(point, grid.d_model):
                start = measure_start(config, dense, inputs, seed=seed)
                found.setdefault((config.init, config.selector_init), []).append((start, _predicted(config, inputs, source)))
        for (init, selector), pairs in found.items():
            measured, wanted = [_flat(start) for start, _ in pairs], [prediction for _, prediction in pairs]
            # The order of logits, hence the load, does not depend on how the experts start: it stands with the first scheme.
            shown = [key for key in measured[0] if init == INITS[0] or key not in LOAD]
            rows.append(
                StartRow(
                    **dataclasses.asdict(point),
                    input=source,
                    init=init,
                    selector=selector,
                    measured={key: _spread([m[key] for m in measured]) for key in shown},
                    predicted={key: _middle([w[key] for w in wanted]) for key in shown if key in wanted[0]},
                )
            )
    return rows


def schemes(point: Point, d_model: int) -> Iterator[SigmaMoEConfig]:
    """The six ways to begin."""
    for init, selector in itertools.product(INITS, SELECTORS):
        yield SigmaMoEConfig(d_model=d_model, **dataclasses.asdict(point), init=init, selector_init=selector)


def _inputs(source: str, point: Point, grid: Grid, corpus: Corpus, seed: int) -> Inputs:
    if source == "gaussian":
        return gaussian_inputs(d_model=grid.d_model, n_tokens=grid.n_tokens, n_gradients=grid.n_gradients, seed=seed)
    streams = ContiguousStreams(corpus.train, batch=max(1, grid.n_tokens // _CONTEXT), context=_CONTEXT)
    tokens, targets = streams.window(seed % streams.n_windows)
    block = DenseConfig(d_model=grid.d_model, d_ff=_MODEL_WIDTHS * grid.d_model, n_layers=point.n_layers)
    model = TransformerXLConfig(
        vocab_size=corpus.tokenizer.vocab_size,
        d_model=grid.d_model,
        n_layers=point.n_layers,
        n_heads=max(1, grid.d_model // _D_HEAD),
        d_head=_D_HEAD,
        ffn=block,
    )
    return text_inputs(model, tokens, targets, n_gradients=min(grid.n_gradients, tokens.numel()), seed=seed)


def _predicted(config: SigmaMoEConfig, inputs: Inputs, source: str) -> dict[str, float | None]:
    n_tokens = inputs.x_TD.shape[0]
    variation, correlation = load_variation(config, n_tokens), load_norm_correlation(config, n_tokens)
    if source == "text":
        isotropic, step = variation, max(1, n_tokens // _PAIRED)
        variation = load_variation_on(inputs.x_TD[::step].double().cpu().numpy(), config, n_tokens)
        # The norms' part of a variation that the text makes for the most part.
        correlation = None if correlation is None else correlation * min(1.0, isotropic / variation)
    return {
        **dataclasses.asdict(ratios(config)),
        "gate_square": gate_square(config),
        "variation": variation,
        "largest_over_mean": largest_over_mean(variation, config.n_experts),
        "norm_correlation": correlation,
    }


def _flat(start: Start) -> dict[str, float | None]:
    return {**dataclasses.asdict(start.ratios), "gate_square": start.gate_square, **dataclasses.asdict(start.load)}


def _spread(values: Sequence[float | None]) -> tuple[float, float, float] | None:
    """Median, least and greatest; None where the quantity has no meaning."""
    numbers = [v for v in values if v is not None]
    return (_middle(numbers) or 0.0, rounded(min(numbers)), rounded(max(numbers))) if numbers else None


def _middle(values: Sequence[float | None]) -> float | None:
    numbers = [v for v in values if v is not None]
    return rounded(statistics.median(numbers)) if numbers else None


def rounded(value: float) -> float:
    """Four significant digits, which is more than the spread between seeds leaves."""
    return float(f"{value:.4g}")
