"""Where the implementation of an operation is chosen: by argument, by `SPARSEFFN_BACKEND`, or by what can run.

A backend is a name, what it computes and a function that says why it cannot run on a device in a dtype. With `auto` PyTorch's
dispatcher finds the kernels of the tensors' device. One asked for by argument runs or raises. One asked for by the environment
variable runs or raises too, except that operations which it does not have at all are left to `auto`, which is logged once.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor

from sparseffn.errors import UserError, unknown_name
from sparseffn.ops.library import Operation, has_kernel, load

logger = logging.getLogger(__name__)

# Kernels differ in signature; each operation documents its own.
Kernel = Callable[..., Any]

ENVIRONMENT_VARIABLE = "SPARSEFFN_BACKEND"


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One way to compute the operations."""

    name: str
    """What `backend=` and the environment variable call it."""
    unavailable: Callable[[torch.device, torch.dtype], str | None]
    """Why it cannot run on a device in a dtype, or None when it can."""
    functions: Mapping[str, Kernel] | None = None
    """Operation name to a function that differentiates itself; None: PyTorch's dispatcher finds the kernels."""
    automatic: bool = True
    """Whether `auto` may take it; the reference is only for comparison."""


def functions_of(module: ModuleType) -> dict[str, Kernel]:
    """The functions that a module defines, which bear their operations' names."""
    found = {name: f for name, f in vars(module).items() if isinstance(f, FunctionType) and not name.startswith("_")}
    return {name: f for name, f in found.items() if f.__module__ == module.__name__}


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


def unregister_backend(name: str) -> None:
    """Forget a backend.

    Raises:
        UserError: there is none of that name.
    """
    if name not in _BACKENDS:
        raise unknown_name("backend", name, _BACKENDS)
    del _BACKENDS[name]


def list_backends() -> list[Backend]:
    """Every registered backend, in the order in which `auto` tries them."""
    return list(_BACKENDS.values())


# What `os.environ.get` looks up in CPython, after five calls that take 0.7 us of one token's 36.
_ENVIRONMENT = getattr(os.environ, "_data", None)
_KEY = os.environ.encodekey(ENVIRONMENT_VARIABLE)


def requested_backend(backend: str = "auto") -> str:
    """The name that applies: the argument, else the environment variable, else `auto`."""
    if backend != "auto":
        return backend
    if _ENVIRONMENT is None:
        return os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    name = _ENVIRONMENT.get(_KEY)
    return os.environ.decodevalue(name) if name else "auto"


def explain_backend(device: torch.device, backend: str = "auto", dtype: torch.dtype = torch.float32) -> tuple[str, str]:
    """The backend that operations on `device` use first, and the reason, for `sparseffn doctor`.

    Raises:
        UserError: the backend asked for is unknown or cannot run there.
    """
    name = requested_backend(backend)
    if name != "auto":
        _runnable(name, device, dtype)
        return name, f"asked for by {ENVIRONMENT_VARIABLE}" if backend == "auto" else "asked for by argument"
    refused = []
    for candidate in _BACKENDS.values():
        if not candidate.automatic:
            continue
        reason = candidate.unavailable(device, dtype)
        if reason is None:
            return candidate.name, "; ".join([f"first backend that runs on {device.type}", *refused])
        refused.append(f"not {candidate.name}: {reason}")
    raise UserError(f"no backend runs on {device.type}; fix: move the tensors to one of: cpu, cuda")


def implementation(operation: str, tensor: Tensor, backend: str = "auto") -> Kernel | None:
    """The function of a backend that is asked for, or None: PyTorch's dispatcher finds the kernel.

    Raises:
        UserError: the backend asked for is unknown, cannot run here, or (asked for by argument) lacks the operation.
    """
    name = requested_backend(backend)
    if name == "auto":
        load()
        return None
    # Indices that come first say nothing of the dtype that is computed in; what does is checked with the operation.
    dtype = tensor.dtype if tensor.is_floating_point() else torch.float32
    chosen = _runnable(name, tensor.device, dtype)
    if chosen.functions is None:
        load()
        if has_kernel(operation, tensor.device.type):
            return None
    elif operation in chosen.functions:
        return chosen.functions[operation]
    if backend != "auto":
        raise UserError(f"backend {name!r} has no {operation!r}; fix: use backend 'auto'")
    _say_once(name, operation)
    return None


def call(operation: Operation, arguments: tuple[Any, ...], backend: str = "auto") -> Any:
    """An operation, by the dispatcher or by the function of a backend that is asked for.

    Its check takes longer than a token does: it is made where a call fails, and before functions that would compute whatever
    comes.

    Raises:
        UserError: the arguments do not fit together, or what `implementation` raises.
    """
    try:
        function = implementation(operation.name, arguments[0], backend)
        if function is not None:
            return operation.checked(function)(*arguments)
        return operation.overload(*arguments)
    except (RuntimeError, IndexError, KeyError, TypeError, AttributeError):
        operation.check_kinds(arguments)
        operation.check_cast(arguments)
        raise


@functools.cache
def _say_once(name: str, operation: str) -> None:
    logger.warning("backend %r has no %s: the first backend that has it computes it", name, operation)


def _runnable(name: str, device: torch.device, dtype: torch.dtype) -> Backend:
    if name not in _BACKENDS:
        raise unknown_name("backend", name, ["auto", *_BACKENDS])
    reason = _BACKENDS[name].unavailable(device, dtype)
    if reason is not None:
        raise UserError(f"backend {name!r} cannot run on {device.type}: {reason}; fix: use backend 'auto'")
    return _BACKENDS[name]
