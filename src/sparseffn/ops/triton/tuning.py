"""Tile sizes of the kernels: a table that ships, and measuring instead of it for whoever asks.

The table and what is measured are keyed by dtype, precision and *bucketed* sizes: rows an expert, rounded up to a power of
two, never the token count, so a batch of another length neither tunes nor compiles again. With SPARSEFFN_TRITON_TUNE=1 the
first call of a bucket times every candidate (seconds, and it waits for the device); without it nothing is ever timed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

ENVIRONMENT_VARIABLE = "SPARSEFFN_TRITON_TUNE"

# tl.dot takes no side under 16.
MIN_BLOCK = 16
# An average of more rows an expert than this fills the largest tiles of the table.
MAX_BUCKET = 128


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n and 1."""
    return 1 << max(n - 1, 0).bit_length()


@dataclass(frozen=True, slots=True)
class Tile:
    """How a kernel cuts its work up; of a sum, `n` is the stretch of columns and `k` the rows added at once."""

    m: int
    n: int
    k: int
    n_warps: int
    n_stages: int

    def fitted(self, *, m: int | None = None, n: int | None = None, k: int | None = None) -> Tile:
        """The tile without the parts that sizes so small leave idle."""

        def fit(block: int, size: int | None) -> int:
            return block if size is None else min(block, max(MIN_BLOCK, next_power_of_2(size)))

        return replace(self, m=fit(self.m, m), n=fit(self.n, n), k=fit(self.k, k))


# (kernel family, arithmetic) to (rows an expert up to, tile), in rising order of rows. Chosen by the resource report: no
# spills on sm_80, sm_90 and gfx942. Speed on a device is not measured yet.
_TABLE: dict[tuple[str, str], list[tuple[int, Tile]]] = {
    ("product", "half"): [(16, Tile(16, 128, 64, 4, 3)), (32, Tile(32, 128, 64, 4, 3)), (128, Tile(64, 128, 32, 4, 3))],
    ("product", "tf32"): [(16, Tile(16, 64, 32, 4, 3)), (32, Tile(32, 64, 32, 4, 3)), (128, Tile(64, 64, 32, 4, 3))],
    ("product", "ieee"): [(16, Tile(16, 64, 32, 4, 2)), (32, Tile(32, 64, 32, 4, 2)), (128, Tile(64, 64, 16, 8, 2))],
    ("outer", "half"): [(16, Tile(64, 64, 16, 4, 3)), (128, Tile(64, 64, 32, 4, 3))],
    ("outer", "tf32"): [(16, Tile(64, 64, 16, 4, 3)), (128, Tile(64, 64, 32, 4, 3))],
    ("outer", "ieee"): [(128, Tile(64, 64, 16, 8, 2))],
}

# Sums are bound by memory; one tile serves all.
SUM_TILE = Tile(1, 256, 8, 4, 2)

# What was measured in this process; filled on request only.
_MEASURED: dict[tuple[object, ...], Tile] = {}


def arithmetic(dtype: torch.dtype) -> str:
    """`half`, or for float32 `tf32` where PyTorch is told to use it (`torch.set_float32_matmul_precision`), else `ieee`."""
    if dtype != torch.float32:
        return "half"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def row_bucket(n_rows: int, n_experts: int) -> int:
    """Average rows an expert, rounded up to a power of two, 16 to 128."""
    return min(MAX_BUCKET, max(MIN_BLOCK, next_power_of_2(cdiv(n_rows, max(n_experts, 1)))))


def candidates(family: str, kind: str) -> list[Tile]:
    """Every tile of the table for this arithmetic, smallest rows first."""
    return [tile for _, tile in _TABLE[family, kind]]


def default_tile(family: str, kind: str, bucket: int) -> Tile:
    """The shipped tile for `product` or `outer`."""
    return next(tile for rows, tile in _TABLE[family, kind] if bucket <= rows)


def pick_tile(name: str, family: str, kind: str, bucket: int, sizes: tuple[int, int], run: Callable[[Tile], object]) -> Tile:
    """The tile to run a kernel with: the shipped one, or where tuning was asked for the fastest candidate.

    Args:
        name: of the kernel.
        family: `product` or `outer`.
        kind: from `arithmetic`.
        bucket: from `row_bucket`.
        sizes: width of the inner and of the outer side; rounded up to powers of two for the key.
        run: launches the kernel with a tile; writes the same result each time.
    """
    if os.environ.get(ENVIRONMENT_VARIABLE) != "1":
        return default_tile(family, kind, bucket)
    device = torch.cuda.current_device() if torch.cuda.is_available() else -1
    key = (name, kind, bucket, *map(next_power_of_2, sizes), device)
    if key not in _MEASURED:
        _MEASURED[key] = min(candidates(family, kind), key=lambda tile: milliseconds(lambda: run(tile)))
    return _MEASURED[key]


def milliseconds(call: Callable[[], object]) -> float:
    """Median time of a call on the device."""
    from triton.testing import do_bench

    return float(do_bench(call, return_mode="median"))  # pyright: ignore[reportArgumentType] - a number in this mode
