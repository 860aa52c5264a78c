"""Backends that are wrong in one way each, for tests of the correctness check."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sparseffn.ops.backends import Backend, Kernel, list_backends, register_backend, unregister_backend


def without_last_row(kernel: Kernel) -> Kernel:
    """A kernel that forgets the last row of its output, as a wrong tile edge does."""

    def run(*args, **options):
        y, *kept = kernel(*args, **options)
        y = y.clone()
        y[-1] = 0
        return y, *kept

    return run


def one_per_cent_off(kernel: Kernel) -> Kernel:
    """A backward that is right but for its last gradient, that of the scores."""
    return lambda *args: (*(found := kernel(*args))[:-1], 1.01 * found[-1])


@contextmanager
def wrong_backends() -> Iterator[None]:
    """Registers `last-row`, which is wrong in the experts' output, and `scores`, which is wrong in its backward."""
    kernels = next(b for b in list_backends() if b.name == "torch").kernels
    changes = {"last-row": ("expert_mlp", without_last_row), "scores": ("expert_mlp_backward", one_per_cent_off)}
    for name, (operation, change) in changes.items():
        changed = {**kernels, operation: change(kernels[operation])}
        register_backend(Backend(name=name, kernels=changed, unavailable=lambda device, dtype: None, automatic=False))
    try:
        yield
    finally:
        for name in changes:
            unregister_backend(name)
