"""Devices: the one that a name means, waiting for it, autocast on it, and the generators that it draws from.

    device = find_device("auto")        # a GPU where there is one

Everything that trains, evaluates, generates or measures is given a `torch.device`; nothing asks for one by itself.
"""

from __future__ import annotations

import os
import re
import resource
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from sparseffn.errors import UserError

Precision = Literal["float32", "bfloat16", "float16"]
PRECISIONS: tuple[str, ...] = get_args(Precision)


def find_device(name: str | torch.device = "auto") -> torch.device:
    """The device of a name, a GPU with its number.

    Args:
        name: `auto` (a GPU where there is one), `cpu`, `cuda` (PyTorch's current GPU) or `cuda:N`; a device is itself.

    Raises:
        UserError: no device goes by that name, or this machine has none of it.
    """
    if isinstance(name, torch.device):
        return name
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    kind, _, number = name.partition(":")
    if name == "cpu" or (name == "auto" and n_gpus == 0):
        return torch.device("cpu")
    if name not in ("auto", "cuda") and not (kind == "cuda" and number.isdecimal()):
        raise UserError(
            f"`--device` must be auto, cpu, cuda or cuda:N; got {name!r}; fix: --device auto takes a GPU if there is one"
        )
    index = int(number) if number else torch.cuda.current_device() if n_gpus else 0
    if index >= n_gpus:
        seen = f"only {n_gpus} GPU{'s are' if n_gpus > 1 else ' is'} visible" if n_gpus else "no GPU is visible"
        raise UserError(f"`--device` must be one that this machine has; got {name!r}, but {seen}; fix: --device auto")
    return torch.device("cuda", index)


def device_name(device: torch.device) -> str:
    """The device as results name it: `cpu`, or the GPU's model."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def memory_there(device: torch.device) -> int:
    """Bytes that this process may use on the device: a GPU's, or on a CPU what is available to it and no limit forbids."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if not sys.platform.startswith("linux"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    mapped, own = (int(n) * os.sysconf("SC_PAGE_SIZE") for n in Path("/proc/self/statm").read_text().split()[:2])
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    limits = _limits_of_groups()
    limits += [1024 * int(found[1]) + own] if found else []
    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    # Libraries map much more than they use.
    limits += [] if most == resource.RLIM_INFINITY else [most - (mapped - own)]
    return min(limits)


def _limits_of_groups() -> list[int]:
    """Limits of the control groups that this process is in, as containers and batch systems set them; version 2 and 1."""
    root, found = Path("/sys/fs/cgroup"), []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, kinds, path = line.split(":", 2)
        top, name = (root / "memory", "memory.limit_in_bytes") if kinds else (root, "memory.max")
        if kinds in ("", "memory"):
            own = top / path.lstrip("/")
            # Inside a container its own group is the top one, whatever its name.
            found += [folder / name for folder in (own, *own.parents, top) if folder.is_relative_to(top)]
    texts = [file.read_text().strip() for file in found if file.is_file()]
    return [int(text) for text in texts if text.isdecimal()]


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was asked of it, so that a clock may be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Autocast to a precision; float32 is the absence of autocast.

    Raises:
        UserError: `precision` is none of `PRECISIONS`.
    """
    if precision not in PRECISIONS:
        raise UserError(f"`precision` must be one of {', '.join(PRECISIONS)}; got {precision!r}; fix: float32 always works")
    return nullcontext() if precision == "float32" else torch.autocast(device.type, dtype=getattr(torch, precision))


def generator_states(device: torch.device) -> dict[str, Tensor]:
    """States of PyTorch's global generators that work on the device draws from, by type of device: uint8 vectors on the CPU."""
    states = {"cpu": torch.get_rng_state()}
    return states | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else states


def restore_generators(states: Mapping[str, Tensor], device: torch.device, *, seed: int) -> None:
    """Put back what `generator_states` returned; a GPU's generator whose state is not among it starts from `seed`."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    elif device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on the device; from a CPU to a GPU by way of pinned memory, so that the copy waits for nothing."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
