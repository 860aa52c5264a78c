"""Bytes that one layer keeps for its backward, measured on the tensors that autograd really keeps.

Apart from the hidden units stand what every block has, its input and its output, and what only sparse blocks have, the
selection: indices, and a mixture's logits and scores, a handful of numbers a token. Totals count everything.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sparseffn.accounting import kept_tensors
from sparseffn.bench.backends import backend_restored, check_backends, use_backend
from sparseffn.bench.candidates import Candidate, Setting, build_layer, draw_tokens
from sparseffn.bench.head import result
from sparseffn.bench.layer import DENSE, DTYPES, LayerSettings, Shape, entrants
from sparseffn.bench.machine import find_device
from sparseffn.ffn import FFNConfig
from sparseffn.ffn.mixture import MixtureConfig


def bench_memory(shapes: Sequence[Shape], settings: LayerSettings) -> dict[str, Any]:
    """Bytes kept for backward by every method of every shape at every number of tokens.

    Returns:
        The JSON-able result.

    Raises:
        UserError: a backend or the device is not there.
    """
    device = find_device(settings.device)
    check_backends(settings.backends, device, DTYPES[settings.dtype])
    rows, left_out = [], []
    for shape in shapes:
        for n_tokens in settings.tokens:
            found, absent = entrants(shape, settings, settings.setting(n_tokens))
            size = {"shape": shape.name, "tokens": n_tokens}
            measured = [_measure(candidate, settings.setting(n_tokens)) for candidate in found]
            rows += [{**size, **row} for row in _against_dense(measured)]
            left_out += [{**size, **dataclasses.asdict(left)} for left in absent]
    return result("memory", device, dataclasses.asdict(settings), rows=rows, left_out=left_out)


def kept_by(candidate: Candidate, setting: Setting) -> dict[str, int]:
    """Bytes of a training call by what they are for; parameters do not matter, but who is selected does."""
    config = candidate.config
    layer = build_layer(config, setting, seed=0).train()
    x = draw_tokens(config, setting, seed=1)
    with backend_restored():
        use_backend(candidate.backend)
        kept = kept_tensors(candidate.module(layer), x)
    selection = sum(t.untyped_storage().nbytes() for t in kept if is_selection(t, config, setting.n_tokens))
    return {
        "saved_bytes": sum(t.untyped_storage().nbytes() for t in kept) - selection,
        "selection_bytes": selection,
        "input_bytes": x.nbytes,
        "output_bytes": x.nbytes,
    }


def _measure(candidate: Candidate, setting: Setting) -> dict[str, Any]:
    """One row."""
    kept = kept_by(candidate, setting)
    return {
        "label": candidate.label,
        "backend": candidate.backend_on(setting),
        "share": candidate.config.active_channels / candidate.config.n_channels,
        **kept,
        "total_bytes": sum(kept.values()),
    }


def is_selection(tensor: Tensor, config: FFNConfig, n_tokens: int) -> bool:
    """Whether a kept tensor says who is selected: indices, or at most one number for each token and expert."""
    if not tensor.is_floating_point():
        return True
    # Where experts are so small that hidden units would pass for scores, all of it counts as hidden units.
    if not isinstance(config, MixtureConfig) or config.active_channels <= config.n_experts:
        return False
    return tensor.numel() <= n_tokens * config.n_experts


def _against_dense(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    dense = next(row for row in rows if row["label"] == DENSE)
    for row in rows:
        row["over_dense"] = row["saved_bytes"] / dense["saved_bytes"]
        row["over_dense_over_share"] = row["over_dense"] / row["share"]
        row["total_over_dense"] = row["total_bytes"] / dense["total_bytes"]
    return rows
