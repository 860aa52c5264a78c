"""Bytes that one layer keeps for its backward, measured on the tensors that autograd really keeps.

Apart from the hidden units stand what every block has, its input and its output, and what only sparse blocks have, the
selection: indices, and a mixture's logits and scores, a handful of numbers a token. Totals count everything.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from torch import Tensor

from sparseffn.accounting import kept_tensors
from sparseffn.bench.candidates import (
    DENSE,
    DTYPES,
    Candidate,
    Setting,
    Shape,
    backend_restored,
    build_layer,
    check_backends,
    draw_tokens,
    use_backend,
)
from sparseffn.bench.layer import runnable_candidates
from sparseffn.bench.machine import head
from sparseffn.devices import find_device
from sparseffn.ffn import FFNConfig
from sparseffn.ffn.mixture import MixtureConfig
from sparseffn.results.bench_result import LayerSettings, MemoryResult, MemoryRow


def bench_memory(shapes: Sequence[Shape], settings: LayerSettings) -> MemoryResult:
    """Bytes kept for backward by every method of every shape at every number of tokens.

    Raises:
        UserError: a backend or the device is not there.
    """
    device = find_device(settings.device)
    check_backends(settings.backends, device, DTYPES[settings.dtype])
    rows, left_out = [], []
    for shape in shapes:
        for n_tokens in settings.tokens:
            setting = Setting.of(settings, n_tokens)
            found, absent = runnable_candidates(shape, settings, setting)
            kept = {c.label: kept_by(c, setting) for c in found}
            rows += [_row(shape.name, c, setting, kept[c.label], kept[DENSE]) for c in found]
            left_out += absent
    return MemoryResult(
        **head(device),
        settings=msgspec.structs.replace(settings, device=device.type),
        rows=tuple(rows),
        left_out=tuple(left_out),
    )


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


def is_selection(tensor: Tensor, config: FFNConfig, n_tokens: int) -> bool:
    """Whether a kept tensor says who is selected: indices, or at most one number for each token and expert."""
    if not tensor.is_floating_point():
        return True
    # Where experts are so small that hidden units would pass for scores, all of it counts as hidden units.
    if not isinstance(config, MixtureConfig) or config.active_channels <= config.n_experts:
        return False
    return tensor.numel() <= n_tokens * config.n_experts


def _row(shape: str, candidate: Candidate, setting: Setting, kept: dict[str, int], dense: dict[str, int]) -> MemoryRow:
    share = candidate.config.active_channels / candidate.config.n_channels
    total, over_dense = sum(kept.values()), kept["saved_bytes"] / dense["saved_bytes"]
    return MemoryRow(
        shape=shape,
        tokens=setting.n_tokens,
        label=candidate.label,
        backend=candidate.backend_on(setting),
        share=share,
        **kept,
        total_bytes=total,
        over_dense=over_dense,
        over_dense_over_share=over_dense / share,
        total_over_dense=total / sum(dense.values()),
    )
