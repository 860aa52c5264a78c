"""How fast this machine multiplies matrices and reads memory: the two roofs over every layer.

Matrix products: square, of two sizes, by PyTorch and by our own kernels, as the layers use either. Bandwidth: reading once
through at least four times the last-level cache, as a matrix-vector product and as a sum. Everywhere the best call counts, not
the median: a low roof would flatter every layer under it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from sparseffn import ops
from sparseffn.bench.machine import clock_of, last_level_cache_bytes, memory_bytes

# Rows of the square matrices: large enough that a call's fixed cost does not count.
_SIZES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}
# A smaller product that takes so long says that the larger one would take too long.
_TOO_LONG_S = 0.25
# Each is called until this much time has passed, so that some calls escape a burst of other work, and at least so often.
_SAMPLE_S, _CALLS = 0.3, 5
# Columns of the matrix that is read: its vector stays in the first-level cache.
_COLUMNS = 2048


@dataclass(frozen=True, kw_only=True)
class Roof:
    """Speeds of a device with the threads of the process."""

    flops_per_s: float
    """Of matrix products in the timed dtype."""
    bytes_per_s: float
    """Reading memory."""

    @staticmethod
    def measure(dtype: torch.dtype, device: torch.device) -> Roof:
        """Both speeds with the threads that are set."""
        return Roof(flops_per_s=product_speed(dtype, device)["flops_per_s"], bytes_per_s=bandwidth(device)["bytes_per_s"])

    def highest(self, other: Roof) -> Roof:
        """The better of two measurements of one machine: what slowed the other one was not the machine."""
        return Roof(flops_per_s=max(self.flops_per_s, other.flops_per_s), bytes_per_s=max(self.bytes_per_s, other.bytes_per_s))


def product_speed(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """FLOPs a second of the fastest square matrix product, its size, and whose it is."""
    clock = clock_of(device)
    best = {"size": 0, "how": "", "seconds": 0.0, "flops_per_s": 0.0}
    for size in _SIZES[device.type]:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        calls: dict[str, Callable[[], object]] = {"torch.mm": lambda a=a, b=b: torch.mm(a, b)}
        if dtype == torch.float32:
            # The selector's product, which the compiled backend computes as it computes the experts'.
            calls["router_logits"] = lambda a=a, b=b: ops.router_logits(a, b)
        seconds = {how: _best(call, clock) for how, call in calls.items()}
        how = min(seconds, key=lambda name: seconds[name])
        if 2 * size**3 / seconds[how] > best["flops_per_s"]:
            best = {"size": size, "how": how, "seconds": seconds[how], "flops_per_s": 2 * size**3 / seconds[how]}
        if seconds[how] > _TOO_LONG_S:
            break
    return best


def bandwidth(device: torch.device) -> dict[str, Any]:
    """Bytes a second of reading a working set of four times the last-level cache or more."""
    cache, _ = last_level_cache_bytes(device)
    wanted = min(max(4 * cache, 2**28), memory_bytes(device) // 4)
    matrix = torch.ones(max(1, wanted // (4 * _COLUMNS)), _COLUMNS, device=device)
    vector = torch.ones(_COLUMNS, device=device)
    clock = clock_of(device)
    seconds = {
        "matrix times vector": _best(lambda: torch.mv(matrix, vector), clock),
        "sum": _best(lambda: matrix.sum(), clock),
    }
    how = min(seconds, key=lambda name: seconds[name])
    size = matrix.nbytes
    return {"bytes": size, "how": how, "seconds": seconds[how], "bytes_per_s": size / seconds[how]}


def measure_all(dtypes: list[torch.dtype], device: torch.device) -> list[dict[str, Any]]:
    """Speeds with one thread and with all, for each dtype."""
    rows = []
    counts = [torch.get_num_threads()] if device.type == "cuda" else sorted({1, torch.get_num_threads()})
    for n_threads in counts:
        with using_threads(n_threads):
            reading = bandwidth(device)
            for dtype in dtypes:
                product = product_speed(dtype, device)
                name = str(dtype).removeprefix("torch.")
                rows.append({"threads": n_threads, "dtype": name, "product": product, "reading": reading})
    return rows


@contextmanager
def using_threads(number: int) -> Iterator[None]:
    """So many CPU threads inside PyTorch's operations."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _best(call: Callable[[], object], clock: Callable[[], float]) -> float:
    """Seconds of the fastest of some calls after one that is not counted."""
    call()
    times: list[float] = []
    while len(times) < _CALLS or sum(times) < _SAMPLE_S:
        start = clock()
        call()
        times.append(clock() - start)
    return min(times)
