"""A made-up comparison with the shape and rough magnitudes of a real one, for tests that need no training."""

from __future__ import annotations

import math
import random
from typing import Any

import msgspec

from sparseffn.results.comparison_result import ComparisonResult

METHODS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("dense", "dense", {"unit": "channels", "n": 2048, "flops": 1.0, "time": 1.0, "end": 2.31, "skew": None}),
    ("topk k=256", "topk", {"unit": "channels", "n": 2048, "flops": 0.56, "time": 1.31, "end": 2.305, "skew": 0.9}),
    ("pkm", "pkm", {"unit": "values", "n": 1024, "flops": 0.31, "time": 0.92, "end": 2.42, "skew": 1.9}),
    ("sigma-moe", "sigma-moe", {"unit": "experts", "n": 16, "flops": 0.258, "time": 0.47, "end": 2.318, "skew": 0.35}),
    ("switch", "switch", {"unit": "experts", "n": 16, "flops": 0.258, "time": 0.44, "end": 2.371, "skew": 1.2}),
)
N_LAYERS = 4
STEPS = 600


def comparison(seeds: tuple[int, ...] = (0,)) -> dict[str, Any]:
    """A complete comparison of five methods, the same for the same seeds.

    Args:
        seeds: one for a table without spread, several for means and deviations.
    """
    return {
        "format": 1,
        "title": "stdlib, preset tiny",
        "finished": True,
        "missing": [],
        "corpus": {
            "name": "stdlib",
            "tokenizer": "bytes",
            "unit": "byte",
            "vocab_size": 256,
            "digest": "9f2c5ad0e1b7443c9a8e6f10d2b3c4a5968778695a4b3c2d1e0f9182736455aa",
            "python_version": "3.11.7",
            "splits": {
                "train": {"files": 912, "bytes": 12_345_678, "tokens": 12_345_678},
                "valid": {"files": 49, "bytes": 680_123, "tokens": 680_123},
                "test": {"files": 51, "bytes": 690_456, "tokens": 690_456},
            },
        },
        "metric": "bits per byte",
        "preset": "tiny",
        "seeds": list(seeds),
        "steps": STEPS,
        "tokens_per_step": 2048,
        "settings": {
            "batch": 16,
            "context": 128,
            "memory": 128,
            "eval_memory": 512,
            "lr": 0.001,
            "warmup_steps": 50,
            "clip": 0.25,
            "optimizer": "adam",
            "dropout": 0.0,
        },
        "model": {"d_model": 128, "n_layers": N_LAYERS, "n_heads": 4, "d_head": 32},
        "environment": {"python": "3.11.7", "torch": "2.13.0", "threads": 2, "cpu": "AMD EPYC", "platform": "Linux"},
        "curve_tokens": 16384,
        "equal_time_s": 61.2,
        "budget_s": 480,
        "methods": [_method(index, seeds) for index in range(len(METHODS))],
    }


def typed(result: dict[str, Any]) -> ComparisonResult:
    """As it is read from its file."""
    return msgspec.convert(result, ComparisonResult)


def _method(index: int, seeds: tuple[int, ...]) -> dict[str, Any]:
    label, name, traits = METHODS[index]
    draw = random.Random(index)
    step_time = 61.2 / STEPS * (0.35 + 0.65 * traits["time"]) / (0.35 + 0.65 * METHODS[-1][2]["time"])
    many = len(seeds) > 1
    return {
        "label": label,
        "method": name,
        "config": {"d_model": 128, "d_ff": 2048} if name == "dense" else {"d_model": 128, "n": traits["n"], "k": 4},
        "total_params": 2_400_000 + 812 * index,
        "active_params": round(2_400_000 - 2_100_000 * (1 - traits["flops"])),
        "ffn_params": 526_000 + 203 * index,
        "residual_params": 812 * index,
        "residual_percent": 0.0338 * index,
        "active_channels": 2048 if name == "dense" else 512,
        "marks": ["K x G deviates by 12% from the preset"] if name == "pkm" else [],
        "ffn_flops_vs_dense": traits["flops"],
        "ffn_flops_convention": 1.0 if name == "dense" else 0.25,
        "saved_bytes_vs_dense": 0.3 + 0.7 * traits["flops"],
        "layer_time_forward_vs_dense": traits["time"],
        "layer_time_training_vs_dense": None if name == "topk" else traits["time"] ** 1.1,
        "step_time_s": step_time,
        "tokens_per_s": 2048 / step_time,
        "valid": {"mean": traits["end"], "std": 0.012 if many else None, "n": len(seeds)},
        "test": {"mean": traits["end"] + 0.04, "std": 0.0094 if many else None, "n": len(seeds)},
        "valid_at_equal_time": traits["end"] + 0.06 * traits["time"],
        "dead_share": None if name == "dense" else round(0.02 * traits["skew"], 4),
        "unit": traits["unit"],
        "curves": [_curve(seed, step_time, traits["end"], draw) for seed in seeds],
        "usage": None if name == "dense" else [_usage(layer, traits, draw) for layer in range(N_LAYERS)],
        "active": [_active(layer) for layer in range(N_LAYERS)] if name == "dense" else None,
        "cooccurrence": {"layer": 1, "matrix": _matrix(traits["n"], draw)} if traits["unit"] == "experts" else None,
    }


def _curve(seed: int, step_time: float, end: float, draw: random.Random) -> dict[str, Any]:
    offset = draw.gauss(0, 0.01)
    points, train = [], []
    for step in range(0, STEPS + 1, 25):
        height = end + 0.03 + offset + 5.6 * math.exp(-step / 45) + 0.55 * math.exp(-step / 220) - 0.036
        points.append({"step": step, "time_s": step * step_time, "valid": height + draw.gauss(0, 0.008)})
        train.append({"step": step, "time_s": step * step_time, "loss": height - 0.1, "balance_loss": -0.002})
    return {"seed": seed, "points": points, "train": train}


def _usage(layer: int, traits: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    n = traits["n"]
    weights = sorted((math.exp(draw.gauss(0, traits["skew"] * (1 + 0.3 * layer))) for _ in range(n)), reverse=True)
    if layer == N_LAYERS - 1 and traits["skew"] > 1.5:
        weights = [weight if rank < 0.8 * n else 0.0 for rank, weight in enumerate(weights)]
    shares = [weight / sum(weights) for weight in weights]
    n_points = min(n, 512)
    kept = [shares[round(i * (n - 1) / (n_points - 1))] for i in range(n_points)]
    return {"layer": layer, "share": kept, "uniform": 1 / n}


def _active(layer: int) -> dict[str, Any]:
    return {
        "layer": layer,
        "mean": (412.0, 231.4, 180.2, 305.9)[layer],
        "std": (95.0, 60.2, 40.1, 88.0)[layer],
        "total": 2048,
    }


def _matrix(n: int, draw: random.Random) -> list[list[float]]:
    rows = [[0.0 if i == j else math.exp(draw.gauss(0, 0.9)) for j in range(n)] for i in range(n)]
    return [[value / sum(row) for value in row] for row in rows]
