"""Backends that are wrong in one way each, for tests of the correctness check."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sparseffn.ops.backends import Backend, Kernel, list_backends, register_backend, unregister_backend


def without_last_row(experts: Kernel) -> Kernel:
    """Forgets the last row of its output, as a wrong tile edge does."""

    def run(*args: Any) -> Tensor:
        y = experts(*args)
        return torch.cat([y[:-1], y[-1:] * 0])

    return run


def one_per_cent_off(experts: Kernel) -> Kernel:
    """Right but for the gradient of the scores."""

    def run(x: Tensor, keys: Tensor, values: Tensor, gates: Tensor, *rest: Any) -> Tensor:
        return experts(x, keys, values, gates + 0.01 * (gates - gates.detach()), *rest)

    return run


@contextmanager
def wrong_backends() -> Iterator[None]:
    """Registers `last-row`, which is wrong in the experts' output, and `scores`, which is wrong in its backward."""
    functions = next(b for b in list_backends() if b.name == "torch").functions
    changes = {"last-row": without_last_row, "scores": one_per_cent_off}
    for name, change in changes.items():
        changed = {**functions, "experts": change(functions["experts"])}
        register_backend(Backend(name=name, functions=changed, unavailable=lambda device, dtype: None, automatic=False))
    try:
        yield
    finally:
        for name in changes:
            unregister_backend(name)
