"""Which backend the operations of a candidate use, chosen as a user would: by `SPARSEFFN_BACKEND`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from sparseffn.errors import UserError, unknown_name
from sparseffn.ops import explain_backend, list_backends
from sparseffn.ops.backends import ENVIRONMENT_VARIABLE


@contextmanager
def backend_restored() -> Iterator[None]:
    """Put the variable back at the end, whatever `use_backend` set meanwhile."""
    before = os.environ.get(ENVIRONMENT_VARIABLE)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(ENVIRONMENT_VARIABLE, None)
        else:
            os.environ[ENVIRONMENT_VARIABLE] = before


def use_backend(name: str) -> None:
    """Set the variable for what runs next; only inside `backend_restored`."""
    os.environ[ENVIRONMENT_VARIABLE] = name


def check_backends(names: Sequence[str], device: torch.device, dtype: torch.dtype) -> None:
    """Refuse a backend that does not exist or cannot run.

    Raises:
        UserError: with the reason.
    """
    known = {backend.name: backend for backend in list_backends()}
    for name in names:
        if name == "auto":
            continue
        if name not in known:
            raise unknown_name("backend", name, ["auto", *known])
        reason = known[name].unavailable(device, dtype)
        if reason is not None:
            raise UserError(
                f"`--backends` must be able to run on {device.type}; got {name!r}: {reason}; fix: leave it out, or use auto"
            )


def why_not(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a backend cannot run there, or None."""
    return next(backend for backend in list_backends() if backend.name == name).unavailable(device, dtype)


def resolved(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The first backend that `auto` stands for; any other name is itself."""
    if name != "auto":
        return name
    with backend_restored():
        use_backend("auto")
        return explain_backend(device, dtype=dtype)[0]
