"""What a measurement depends on beside the code: device, cache, memory, threads, libraries, date; and its clock."""

from __future__ import annotations

import datetime
import os
import re
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import torch

from sparseffn.devices import device_name, synchronize
from sparseffn.ops.cpu import build
from sparseffn.results.bench_result import FORMAT, Environment
from sparseffn.storage import environment

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
# Where the system does not say: as much as the largest cache of most desktop and server chips that a thread sees.
FALLBACK_CACHE_BYTES = 32 * 2**20

# Of what other packages' kernels a speed may be.
PACKAGES = ("transformers", "scattermoe", "triton")

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "": 1}


def last_level_cache_bytes(device: torch.device | None = None, folder: Path = CACHES) -> tuple[int, str]:
    """Bytes of the largest cache before memory, and where the number comes from; on the CPU Linux's files in `folder`."""
    if device is not None and device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size, "the device's L2 cache"
    sizes = []
    for path in sorted(folder.glob("index*/size")):
        found = re.fullmatch(r"(\d+)([KMG]?)", path.read_text().strip())
        if found:
            sizes.append(int(found[1]) * _UNITS[found[2]])
    if sizes:
        return max(sizes), str(folder)
    return FALLBACK_CACHE_BYTES, "assumed, as the system does not say"


def memory_bytes(device: torch.device | None = None) -> int:
    """Memory of the machine, or of the device."""
    if device is not None and device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def version_of(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpp_compiler() -> str:
    """The compiler of the CPU kernels with its version, or why there is none."""
    try:
        words = build.find_compiler()
    except build.CompilerError as error:
        return f"none: {error}"
    try:
        done = subprocess.run([*words, "--version"], capture_output=True, text=True, check=False)
    except OSError as error:
        return f"{' '.join(words)}, which does not run: {error.strerror}"
    return next(iter(done.stdout.splitlines()), f"{' '.join(words)} of unknown version")


def measured_on(device: torch.device) -> Environment:
    """Machine, threads, libraries, caches and date of a measurement."""
    cache, source = last_level_cache_bytes(device)
    facts = {
        **environment(str(device)),
        "device": device_name(device),
        "last_level_cache_bytes": cache,
        "last_level_cache_source": source,
        "memory_bytes": memory_bytes(device),
        "packages": {name: version for name in PACKAGES if (version := version_of(name)) is not None},
        "compiler": cpp_compiler(),
        "instruction_sets": build.instruction_sets(),
        "cpus": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    if device.type == "cuda":
        facts |= {"cuda": torch.version.cuda, "driver": gpu_driver()}
    return msgspec.convert(facts, Environment)


def head(device: torch.device) -> dict[str, Any]:
    """The fields that every result has, as keyword arguments."""
    return {"format": FORMAT, "environment": measured_on(device)}


def gpu_driver() -> str | None:
    """The version of NVIDIA's driver, None where its tool is not installed."""
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return next(iter(done.stdout.split()), None) if done.returncode == 0 else None


def clock_of(device: torch.device) -> Callable[[], float]:
    """A clock that first waits until the device has done what was asked of it."""
    if device.type == "cpu":
        return time.perf_counter

    def clock() -> float:
        synchronize(device)
        return time.perf_counter()

    return clock
