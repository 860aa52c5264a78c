"""Made-up tables of the paper: every status of a cell, one seed or several, as many columns as one likes."""

from __future__ import annotations

from typing import Any

import msgspec

from sparseffn.results.table_result import PaperTable

LABELS = ("dense", "sigma-moe", "softmax after top-k (renorm.)", "switch, K=1, G=256", "s-base, K=4, G=64")
COLUMNS = ("WT-S", "E8", "WT-B", "WT-S*", "C4-S", "C4-B", "peS2o-S", "peS2o-B")
ENVIRONMENT = {"sparseffn": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "threads": 2, "cpu": "A processor"}


def typed(result: dict[str, Any]) -> PaperTable:
    """As it is read from its file."""
    return msgspec.convert(result, PaperTable)


def column(name: str) -> dict[str, Any]:
    """A column at a scale of ours."""
    bits = name == "E8"
    return {
        "name": name,
        "published_name": name,
        "corpus": "ptb",
        "metric": "bits per character",
        "published_metric": "bits per character" if bits else "perplexity",
        "digest": "9f2c5ad0e1b7a1b2",
        "sizes": "d_model 96, 16 x 64 experts, K 4",
        "steps": 1000,
        "equal_time_s": 61.23,
    }


def measured(row: int, index: int, seeds: tuple[int, ...] = (0, 1, 2)) -> dict[str, Any]:
    """A finished cell; row 1 is better than dense beyond its interval, row 2 within it, the others worse."""
    mean = 2.31 + 0.01 * index + (0.0, -0.05, -0.002, 0.1, 0.2)[row % 5]
    difference = round(mean - 2.31 - 0.01 * index, 6)
    interval = {"difference": difference, "low": difference - 0.02, "high": difference + 0.02}
    interval |= {"decided": interval["low"] > 0 or interval["high"] < 0, "covers_seeds": True}
    return {
        "row": row,
        "column": index,
        "published": (11.81, 11.71, 11.89, 12.27, 13.01)[row % 5],
        "status": "measured",
        "reason": None,
        "n": len(seeds),
        "mean": mean,
        "spread": 0.012 if len(seeds) > 1 else None,
        "valid_mean": mean - 0.04,
        "seeds": list(seeds),
        "values": [mean for _ in seeds],
        "params": 1.284e6,
        "residual_percent": 0.0 if row == 0 else -0.12,
        "flops_percent": 100.0 if row == 0 else 25.0,
        "counted_flops_percent": 100.0 if row == 0 else 26.14,
        "equal_time": mean + 0.02,
        "against_dense": {**interval, "n_seeds": len(seeds), "n_windows": 400} if row else None,
    }


def unmeasured(cell: dict[str, Any], status: str, reason: str | None) -> dict[str, Any]:
    """The same cell without a result."""
    lost = dict.fromkeys(("mean", "spread", "valid_mean", "equal_time", "against_dense"))
    return {**cell, **lost, "status": status, "reason": reason, "n": 0, "seeds": [], "values": []}


def paper_table(*, n_columns: int = 2, seeds: tuple[int, ...] = (0, 1, 2)) -> dict[str, Any]:
    """Five rows; in the first column the last two have no result, and in the last column one is of an older version."""
    rows = [{"label": label, "published_label": label, "settings": "paper", "marks": []} for label in LABELS]
    rows[3] |= {"published_label": "switch, K=1, G=512", "marks": ["K=1, G=256 stands for K=1, G=512"]}
    rows[4]["settings"] = "released"
    cells = [measured(row, index, seeds) for index in range(n_columns) for row in range(len(rows))]
    cells[3] = unmeasured(cells[3], "failed", "diverged at step 40")
    cells[4] = unmeasured(cells[4], "missing", "not run yet")
    cells[-1] = unmeasured(cells[-1], "missing", "made by version 0.0.9")
    cells[-2] |= {"published": None, "residual_percent": 0.61}
    return {
        "kind": "paper-table",
        "version": 1,
        "table": "table4",
        "title": "Table 4: sigma-MoE against other mixtures",
        "scale": "cpu",
        "settings": "paper",
        "columns": [column(name) for name in COLUMNS[:n_columns]],
        "rows": rows,
        "cells": cells,
        "difference_unit": "bits per character",
        "notes": ["The released runs of the dense model clip gradients at 0.1."],
        "environment": dict(ENVIRONMENT),
    }


def counted_table() -> dict[str, Any]:
    """Table 7: nothing is trained for it."""
    result = paper_table()
    for cell in result["cells"]:
        cell.update(unmeasured(cell, "counted", None) | {"published": cell["flops_percent"], "params": 4.7e7})
    for each in result["columns"]:
        each |= {"metric": "percent of dense", "published_metric": "percent of dense", "corpus": "none", "steps": None}
        each |= {"digest": None, "equal_time_s": None, "sizes": "d_model 412, 16 x 128 experts, K 4"}
    return result | {"table": "table7", "title": "Table 7: cost of the feedforward block", "scale": "paper"}


def settings_table() -> dict[str, Any]:
    """Two rows of hyperparameters, one of which is not the published one."""
    here = {"params_m": 47.26012, "d_model": 412, "dropout": 0.1}
    published = {"name": "WT-S", "tokens": "sentencepiece", "params_m": 47, "d_model": 412, "dropout": 0.1}
    return {
        "kind": "paper-settings",
        "version": 1,
        "table": "table8",
        "title": "Hyperparameters",
        "scale": "paper",
        "settings": "paper",
        "rows": [
            {"name": "WT-S", "here": here, "published": published, "differences": []},
            {"name": "E8", "here": here | {"d_model": 96}, "published": published, "differences": ["d_model"]},
        ],
        "environment": dict(ENVIRONMENT),
    }
