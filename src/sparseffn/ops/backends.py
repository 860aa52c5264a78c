"""Where the implementation of an operation is chosen: by argument, by `SPARSEFFN_BACKEND`, or by what can run.

A backend is a name, a table of kernels and a function that says why it cannot run on a device. `auto` takes the
first registered backend that can run and has the kernel; a backend asked for by name runs or raises.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sparseffn.errors import UserError, unknown_name

# Kernels differ in signature; each operation documents its own.
Kernel = Callable[..., Any]

ENVIRONMENT_VARIABLE = "SPARSEFFN_BACKEND"


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One way to compute the operations."""

    name: str
    """What `backend=` and the environment variable call it."""
    kernels: Mapping[str, Kernel]
    """Operation name to function."""
    unavailable: Callable[[torch.device], str | None]
    """Why it cannot run on a device, or None when it can."""
    automatic: bool = True
    """Whether `auto` may take it; the reference is only for comparison."""
    direct: bool = False
    """Whether its kernels are differentiable PyTorch code, called as they are instead of through `torch.library`."""


_BACKENDS: dict[str, Backend] = {}


def register_backend(backend: Backend, *, first: bool = False) -> None:
    """Make a backend known; `first` puts it before the others that `auto` tries."""
    if backend.name in _BACKENDS:
        raise UserError(f"`name` must be a new backend; got {backend.name!r}, which is registered; fix: rename it")
    others = dict(_BACKENDS)
    if first:
        _BACKENDS.clear()
        _BACKENDS[backend.name] = backend
        _BACKENDS.update(others)
    else:
        _BACKENDS[backend.name] = backend


def list_backends() -> list[Backend]:
    """Every registered backend, in the order in which `auto` tries them."""
    return list(_BACKENDS.values())


def requested_backend(backend: str = "auto") -> str:
    """The name that applies: the argument, else the environment variable, else `auto`."""
    return backend if backend != "auto" else os.environ.get(ENVIRONMENT_VARIABLE, "auto") or "auto"


def explain_backend(device: torch.device, backend: str = "auto") -> tuple[str, str]:
    """The backend that operations on `device` use, and the reason, for `sparseffn doctor`."""
    name = requested_backend(backend)
    if name != "auto":
        return name, f"asked for by {ENVIRONMENT_VARIABLE}" if backend == "auto" else "asked for by argument"
    for candidate in _BACKENDS.values():
        if candidate.automatic and candidate.unavailable(device) is None:
            return candidate.name, f"first backend that runs on {device.type}"
    raise UserError(f"no backend runs on {device.type}; fix: move the tensors to one of: cpu, cuda")


def direct_kernel(operation: str, backend: str = "auto") -> Kernel | None:
    """The kernel of a backend that is asked for and whose kernels differentiate themselves, else None."""
    chosen = _BACKENDS.get(requested_backend(backend))
    return chosen.kernels.get(operation) if chosen is not None and chosen.direct else None


def kernel(operation: str, device: torch.device, backend: str = "auto") -> Kernel:
    """The function that computes `operation` on `device`.

    Raises:
        UserError: the backend asked for by name is unknown, cannot run here, or lacks the operation.
    """
    name = requested_backend(backend)
    if name == "auto":
        for candidate in _BACKENDS.values():
            if candidate.automatic and operation in candidate.kernels and candidate.unavailable(device) is None:
                return candidate.kernels[operation]
        raise UserError(f"no backend computes {operation!r} on {device.type}; fix: move the tensors to the CPU")
    if name not in _BACKENDS:
        raise unknown_name("backend", name, ["auto", *_BACKENDS])
    chosen = _BACKENDS[name]
    reason = chosen.unavailable(device)
    if reason is not None:
        raise UserError(f"backend {name!r} cannot run on {device.type}: {reason}; fix: use backend 'auto'")
    if operation not in chosen.kernels:
        raise UserError(f"backend {name!r} has no {operation!r}; fix: use backend 'auto'")
    return chosen.kernels[operation]
