"""How fast this machine multiplies matrices and reads memory: the two roofs over every layer.

Matrix products: square ones, by PyTorch and our selector's kernel, and the two products of one expert by the experts' kernel,
with matrices that stay in the caches; the fastest of all counts, as a layer may use any. Bandwidth: reading once through at
least four times the last-level cache, as a matrix-vector product and as a sum. Everywhere the best call counts, not the median:
a low roof would flatter every layer under it. Beside the bandwidth stands what is left of it where a few blocks of the size of
an expert are read from scattered places, which is all that one token asks for: no limit, but what to expect of few tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from sparseffn import ops
from sparseffn.bench.machine import clock_of, last_level_cache_bytes, memory_bytes

# Rows of the square matrices: large enough that a call's fixed cost does not count, and on a CPU also such as fit its caches.
_SIZES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}
# Tokens, width and units of one expert whose matrices fit a second-level cache: the fastest of eight tried, 2 cores with 1 MiB
# each, 2026-11. On a GPU more tokens, so that all of it is busy.
_EXPERTS = {"cpu": ((1024, 1024, 128), (4096, 256, 256)), "cuda": ((32768, 1024, 256),)}
# A smaller product that takes so long says that the larger one would take too long.
_TOO_LONG_S = 0.25
# Each is called until this much time has passed, so that some calls escape a burst of other work, and at least so often.
_SAMPLE_S, _CALLS = 0.3, 5
# Columns of the matrix that is read: its vector stays in the first-level cache.
_COLUMNS = 2048
# Rows of that many columns in a block: 512 KiB, both matrices of an expert of width 512 and 128 units in float32.
_BLOCK_ROWS = 64
# Blocks that a call reads: the K of the paper's models. Rows are summed sixteen by sixteen, so that all threads have some.
_BLOCKS, _BAG = 4, 16


@dataclass(frozen=True, kw_only=True)
class Roof:
    """Speeds of a device with the threads of the process."""

    flops_per_s: float
    """Of matrix products in the timed dtype."""
    bytes_per_s: float
    """Reading memory in one long pass."""
    scattered_bytes_per_s: float
    """Reading a few blocks of an expert's size from scattered places. No part of any limit."""

    @staticmethod
    def measure(dtype: torch.dtype, device: torch.device) -> Roof:
        """All speeds with the threads that are set."""
        reading = bandwidth(device)
        return Roof(
            flops_per_s=product_speed(dtype, device)["flops_per_s"],
            bytes_per_s=reading["bytes_per_s"],
            scattered_bytes_per_s=reading["scattered"]["bytes_per_s"],
        )

    def highest(self, other: Roof) -> Roof:
        """The better of two measurements of one machine: what slowed the other one was not the machine."""
        return Roof(
            flops_per_s=max(self.flops_per_s, other.flops_per_s),
            bytes_per_s=max(self.bytes_per_s, other.bytes_per_s),
            scattered_bytes_per_s=max(self.scattered_bytes_per_s, other.scattered_bytes_per_s),
        )


def product_speed(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """FLOPs a second of the fastest matrix product, its shape, and whose it is."""
    clock = clock_of(device)
    best: dict[str, Any] = {"shape": "", "how": "", "seconds": 0.0, "flops_per_s": 0.0}

    def time_product(shape: str, how: str, flops: int, call: Callable[[], object]) -> float:
        seconds = _best(call, clock)
        if flops / seconds > best["flops_per_s"]:
            best.update(shape=shape, how=how, seconds=seconds, flops_per_s=flops / seconds)
        return seconds

    with torch.inference_mode():
        for n_tokens, d_model, size in _EXPERTS[device.type]:
            call = _expert_product(n_tokens, d_model, size, dtype, device)
            time_product(f"{n_tokens:,} x {d_model:,} x {size}", "expert_mlp", 4 * n_tokens * d_model * size, call)
        for size in _SIZES[device.type]:
            a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
            shape, flops = f"{size:,} x {size:,}", 2 * size**3
            seconds = time_product(shape, "torch.mm", flops, lambda a=a, b=b: torch.mm(a, b))
            if dtype == torch.float32:
                # The selector's product, which the compiled backend computes as it computes the experts'.
                own = time_product(shape, "router_logits", flops, lambda a=a, b=b: ops.router_logits(a, b))
                seconds = min(seconds, own)
            if seconds > _TOO_LONG_S:
                break
    return best


def _expert_product(n_tokens: int, d_model: int, size: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    """Both products of one expert that every token chooses, by the kernel that the layers run."""
    x, keys, values = (
        torch.randn(*sizes, device=device).to(dtype) for sizes in ((n_tokens, d_model), (1, d_model, size), (1, size, d_model))
    )
    gates = torch.ones(n_tokens, 1, device=device)
    chosen = torch.zeros(n_tokens, 1, dtype=torch.int64, device=device)
    return lambda: ops.expert_mlp(x, keys, values, gates, chosen, activation="identity")


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
    scattered = _scattered(matrix, clock)
    return {"bytes": size, "how": how, "seconds": seconds[how], "bytes_per_s": size / seconds[how], "scattered": scattered}


def _scattered(matrix: torch.Tensor, clock: Callable[[], float]) -> dict[str, Any]:
    """Bytes a second where a call reads a few blocks, at random places and each once in a round over all of them.

    The whole round is timed: a single call may find its blocks in the cache.
    """
    n_blocks = len(matrix) // _BLOCK_ROWS
    order = torch.randperm(n_blocks, generator=torch.Generator().manual_seed(0))
    rows = (order[:, None] * _BLOCK_ROWS + torch.arange(_BLOCK_ROWS)).view(-1, _BAG).to(matrix.device)
    calls = rows.split(_BLOCKS * _BLOCK_ROWS // _BAG)

    def read_all() -> None:
        for bags in calls:
            F.embedding_bag(bags, matrix, mode="sum")

    size, seconds = n_blocks * _BLOCK_ROWS * matrix[0].nbytes, _best(read_all, clock)
    return {"block_bytes": _BLOCK_ROWS * matrix[0].nbytes, "blocks": _BLOCKS, "bytes_per_s": size / seconds}


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
