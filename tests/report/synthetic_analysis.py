"""A made-up `analysis.json` with the shape of a real one, for tests that need no training."""

from __future__ import annotations

from typing import Any

import msgspec

from sparseffn.results.analysis_result import AnalysisResult


def analysis(
    method: str = "sigma-moe", *, n_layers: int = 4, n_experts: int = 16, skew: float = 0.3, active: float = 0.05
) -> dict[str, Any]:
    """An analysis of a mixture, or for `dense` of the dense block.

    Args:
        method: its name.
        n_layers: of the model.
        n_experts: of a layer.
        skew: 0 for an even use; a share falls as rank^-skew.
        active: fraction of the channels that is active in the first layer; each further one has a tenth less.
    """
    dense = method == "dense"
    n_units = 2048 if dense else n_experts
    weights = [(rank + 1) ** -skew for rank in range(min(n_units, 512))]
    share = [weight / sum(weights) for weight in weights]
    matrix = [[0.0 if i == j else 1 / (n_experts - 1) for j in range(n_experts)] for i in range(n_experts)]
    mixed = 0.5 / (n_experts - 1)
    matrix[3] = [
        0.0 if j == 3 else 0.5 + mixed if j == 1 else mixed - 0.5 / (n_experts - 1) / (n_experts - 2) for j in range(n_experts)
    ]
    return {
        "format": 1,
        "kind": "analysis",
        "run": {
            "name": method,
            "method": method,
            "config": {"method": method},
            "params": 1_284_098,
            "d_model": 128,
            "n_layers": n_layers,
            "n_channels": 2048,
            "active_channels": 2048 if dense else 256,
            "corpus": "stdlib",
            "digest": "37ebee5dd20d",
            "steps": 150,
            "valid_nats": 2.1,
        },
        "splits": ["valid"],
        "n_tokens": 600_000,
        "unit": "channels" if dense else "experts",
        "usage": [{"layer": i, "share": share, "uniform": 1 / n_units} for i in range(n_layers)],
        "active": [
            {"layer": i, "mean": 2048 * active * 0.9**i, "std": 2048 * active * 0.2, "total": 2048} for i in range(n_layers)
        ],
        "load": [
            {
                "layer": i,
                "n_units": n_units,
                "entropy": 1 - 0.2 * skew,
                "largest_over_mean": share[0] * n_units,
                "weight_entropy": 1 - 0.2 * skew - 0.01 * i,
                "n_dead": int(skew > 2) * i,
            }
            for i in range(n_layers)
        ],
        "cooccurrence": [None if dense else matrix for _ in range(n_layers)],
        "tokens": None if dense else [[_expert(e, share[e]) for e in range(n_experts)] for _ in range(n_layers)],
        "training": None if dense else _training(n_layers),
    }


def typed(found: dict[str, Any]) -> AnalysisResult:
    """As it is read from its file."""
    return msgspec.convert(found, AnalysisResult)


def _expert(expert: int, load: float) -> dict[str, Any]:
    words = ["␣the", "consumption", "\\n", "<b>&", "$x$", "(", "naïve"]
    listed = [
        {"token": i, "text": word, "share": 0.1, "lift": 1.5 * 3**i, "served": 0.9}
        for i, word in enumerate(words[expert % 3 :])
    ]
    return {"expert": expert, "load": load, "tokens": listed}


def _training(n_layers: int) -> dict[str, Any]:
    steps = range(0, 160, 10)
    return {
        "source": "snapshots",
        "n_tokens": 4096,
        "points": [
            {
                "step": step,
                "layers": [
                    {
                        "entropy": 0.95 - 0.4 / (1 + 0.1 * step) - 0.01 * i,
                        "largest_over_mean": 1.5 + 4 / (1 + 0.1 * step) + 0.1 * i,
                    }
                    for i in range(n_layers)
                ],
            }
            for step in steps
        ],
        "stability": [
            {
                "from": step - 10,
                "to": step,
                "layers": [{"jaccard": 0.2 + 0.005 * step + 0.002 * i, "overlap": 0.9} for i in range(n_layers)],
            }
            for step in steps[1:]
        ],
        "chance": {"jaccard": 0.086, "overlap": 0.24},
    }
