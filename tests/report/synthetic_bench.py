"""Made-up results of `sparseffn bench`, one of each kind."""

from __future__ import annotations

from typing import Any

import msgspec

from sparseffn.results.bench_result import BenchResult

ENVIRONMENT = {
    "sparseffn": "0.1.0",
    "python": "3.11.7",
    "torch": "2.13.0+cpu",
    "numpy": "2.4.6",
    "threads": 2,
    "cpu": "A processor",
    "platform": "Linux x86_64",
    "device": "cpu",
    "blas": "mkl, oneDNN on",
    "cpu_capability": "AVX512",
    "last_level_cache_bytes": 2**25,
    "last_level_cache_source": "/sys",
    "memory_bytes": 2**34,
    "cpus": 2,
    "load_average": 2.0,
    "date": "2026-11-24T08:00:00+00:00",
}


def typed(found: dict[str, Any]) -> BenchResult:
    """As it is read from its file."""
    return msgspec.convert(found, BenchResult)


def result(kind: str, **content: Any) -> dict[str, Any]:
    """A result with its head."""
    settings: dict[str, Any] = {"tokens": [64], "dtype": "float32", "device": "cpu", "rounds": 5, "backends": ["auto"]}
    return {"format": 1, "kind": kind, "environment": dict(ENVIRONMENT), "settings": settings, **content}


def _timing(seconds: float, dense_s: float, share: float, limit_s: float) -> dict[str, Any]:
    over = seconds / dense_s
    spread = {"median_s": seconds, "q1_s": 0.9 * seconds, "q3_s": 1.2 * seconds, "n": 7}
    limits = {"limit_s": limit_s, "limit_arithmetic_s": limit_s, "limit_bytes_s": limit_s / 2, "gradient_s": 0.0}
    return {**spread, "over_dense": over, "over_dense_over_share": over / share, **limits, "over_limit": seconds / limit_s}


def _layer_row(shape: str, tokens: int, label: str, factor: float) -> dict[str, Any]:
    peer, share = label.startswith("hf "), 1.0 if label == "dense" else 0.25
    forward = {**_timing(1e-5 * tokens * factor, 1e-5 * tokens, share, 8e-6 * tokens * share), "over_fastest_hf": None}
    if label == "sigma-moe":
        forward["over_fastest_hf"] = {"fastest": "hf eager", "over": 0.4, "times_faster": 2.5}
    row = {"shape": shape, "tokens": tokens, "label": label, "peer": peer, "backend": None if peer else "torch"}
    row |= {"method": "dense", "n_layers": 4, "params": 10, "touched_bytes": 1.0, "gradient_bytes": 40}
    row |= {"gate": {"tokens": 8, "largest_deviation": {"y": 1e-6}}}
    row |= {"share": share, "forward": forward, "training": forward, "cache": "cold" if tokens <= 64 else "repeated"}
    return row | ({"warm": {"forward": forward, "training": forward}} if tokens <= 64 else {})


def layer_result(label: str = "sigma-moe k=2") -> dict[str, Any]:
    """Two shapes, three sizes, four candidates, one of which has a label of choice."""
    factors = {"dense": 1.0, "sigma-moe": 0.3, label: 0.2, "hf eager": 0.7}
    rows = [
        _layer_row(shape, tokens, name, factor)
        for shape in ("wt-s", "wt-b")
        for tokens in (1, 64, 1024)
        for name, factor in factors.items()
    ]
    absent = {"shape": "wt-s", "tokens": 1024, "label": "hf batched_mm", "reason": "it would copy 3.2 GiB"}
    return result(
        "layer",
        rows=rows,
        left_out=[absent],
        roof={"flops_per_s": 1e11, "bytes_per_s": 1e10, "scattered_bytes_per_s": 5e9},
        shapes=[],
    )


def _figure_layer(seconds: float, memory: int) -> dict[str, Any]:
    timing = {"median_s": seconds, "q1_s": seconds, "q3_s": seconds, "n": 5, "over_dense": 0.5, "over_limit": 2.0}
    timing |= {"limit_s": seconds / 2, "limit_arithmetic_s": seconds / 2, "limit_bytes_s": 0.0, "gradient_s": 0.0}
    sizes = {"memory_bytes": memory, "selection_bytes": 1000, "gradient_bytes": 10 * memory}
    sizes |= {"saved_bytes": memory, "input_bytes": 1000, "output_bytes": 1000}
    return {"forward": timing, "training": timing, **sizes}


def figures_result() -> dict[str, Any]:
    """Figures 2 and 9, some points of which are missing."""
    points = [
        {
            "figure": number,
            "value": value,
            "variable": "d_model" if number == 2 else "N_E",
            "blocks": {},
            "layers": {
                "dense": _figure_layer(1e-4 * value, 10**5 * value),
                "sigma-moe": _figure_layer(4e-5 * value, 3 * 10**4 * value),
            },
        }
        for number, values in ((2, (256, 512, 1024)), (9, (8, 16, 32, 64, 128, 256)))
        for value in values
    ]
    left_out = [
        {"figure": 2, "value": 4096, "variable": "d_model", "limit": "half of the memory", "reason": "would need 99 GiB"},
        {"figure": 2, "value": 2048, "variable": "d_model", "limit": "time limit", "reason": "would take 300 s"},
    ]
    sweeps = {
        "2": {"variable": "d_model", "values": [256, 512, 1024, 2048, 4096], "fixed": "d_ff = 4 d_model"},
        "9": {"variable": "N_E", "values": [8, 16, 32, 64, 128, 256], "fixed": "d_model = 512"},
    }
    found = result("figures", figures=[2, 9], points=points, left_out=left_out, sweeps=sweeps)
    found["settings"] = {"tokens": 2048, "dtype": "float32", "device": "cpu", "backend": "auto", "rounds": 5}
    return found


def memory_result() -> dict[str, Any]:
    """One shape."""
    kept = {f"{name}_bytes": 2**20 for name in ("saved", "selection", "input", "output", "total")}
    ratios = {"share": 0.25, "over_dense": 0.25, "over_dense_over_share": 1.0, "total_over_dense": 0.5}
    return result(
        "memory", left_out=[], rows=[{"shape": "e8", "label": "pkm", "backend": "cpu", "tokens": 9, **kept, **ratios}]
    )


def roofline_result() -> dict[str, Any]:
    """One shape."""
    bounds = {"arithmetic_s": 1e-3, "bytes_s": 2e-3, "gradient_s": 0.0, "limit_s": 2e-3}
    row = {"shape": "e8", "label": "dense", "tokens": 64, "touched_bytes": 2**20, "forward": bounds, "training": bounds}
    product = {"shape": "2,048 x 2,048", "how": "torch.mm", "seconds": 0.1, "flops_per_s": 1e11}
    scattered = {"bytes_per_s": 1e10, "block_bytes": 1, "blocks": 1}
    reading = {"bytes": 2**28, "how": "sum", "seconds": 0.1, "bytes_per_s": 2e10, "scattered": scattered}
    speed = {"dtype": "float32", "threads": 2, "product": product, "reading": reading}
    return result("roofline", speeds=[speed], rows=[row])


def step_result() -> dict[str, Any]:
    """Two methods."""
    parts = {"feedforward": 0.4, "attention": 0.3, "output layer": 0.1, "optimiser": 0.1, "rest": 0.1}
    method = {"seconds": 1.0, "over_base": 0.75, "parts": parts, "parts_whole_s": 1.0, "times": [], "params": 47}
    methods = {"dense": method, "sigma-moe": method}
    found = result("step", seconds={"relative": 1.2, "plain": 1.0}, ratio=1.2, times={}, methods=methods)
    found["settings"] = {"batch": 4, "context": 256, "memory": 256, "method": "dense", "params": 47, "preset": "wt-s"}
    found["settings"] |= {"vocab_size": 256, "rounds": 5}
    return found


KINDS = {
    "layer": layer_result,
    "figures": figures_result,
    "memory": memory_result,
    "roofline": roofline_result,
    "step": step_result,
}
