"""Counts what a call launches on a GPU: PyTorch's operations but for views and allocations, and kernels of Triton."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch.utils._python_dispatch import TorchDispatchMode

from sparseffn.ops.triton import (
    balancing_operations,
    cvmm_operations,
    expert_operations,
    launch,
    operations,
    router_operations,
    statistics_operations,
)

# Places that launch.
_STARTERS = (
    launch,
    operations,
    balancing_operations,
    cvmm_operations,
    expert_operations,
    router_operations,
    statistics_operations,
)
# They make tensors without touching them, or say something about one.
_IDLE = (
    "empty",
    "new_empty",
    "detach",
    "_has_",
    "alias",
    "lift_fresh",
    "_unsafe_view",
    "is_",
    "set_",
    "_reshape_alias",
    "promote_types",
    # Views that autograd does not know of.
    "unsafe_split",
)


class LaunchCount(TorchDispatchMode):
    """Names of what was launched while it was active, in order."""

    _pauses = 0

    @classmethod
    @contextmanager
    def paused(cls) -> Iterator[None]:
        """What is done meanwhile is not counted."""
        LaunchCount._pauses += 1
        try:
            yield
        finally:
            LaunchCount._pauses -= 1

    def __enter__(self) -> LaunchCount:
        self.found: list[str] = []
        self._patches = [mock.patch.object(module, "start", self._started(module.start)) for module in _STARTERS]
        for patch in self._patches:
            patch.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        for patch in self._patches:
            patch.stop()
        super().__exit__(*error)

    def _started(self, start: Any) -> Any:
        def counted(kernel: Any, *arguments: Any, **options: Any) -> None:
            self.found.append(kernel.fn.__name__)
            # What the interpreter does to compute is no launch.
            with self.paused():
                start(kernel, *arguments, **options)

        return counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view and not LaunchCount._pauses and not name.startswith(_IDLE):
            self.found.append(name)
        return result
