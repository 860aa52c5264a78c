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
from torch import Tensor

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


# (kernel family, arithmetic) to (rows an expert up to, tile for aligned sizes, tile for any), in rising order of rows. Sizes
# that are no multiple of 16 are read element by element, with a pointer and a mask for each, which takes more registers.
# Chosen by the resource report: no spills on sm_80, sm_90 and gfx942. Speed on a device is not measured yet.
_TABLE: dict[tuple[str, str], list[tuple[int, Tile, Tile]]] = {
    ("product", "half"): [
        (16, Tile(16, 128, 64, 4, 3), Tile(16, 128, 32, 4, 3)),
        (32, Tile(32, 128, 64, 4, 3), Tile(32, 128, 32, 8, 3)),
        (128, Tile(64, 128, 32, 4, 3), Tile(64, 128, 32, 8, 3)),
    ],
    ("product", "tf32"): [
        (16, Tile(16, 64, 32, 4, 3), Tile(16, 64, 32, 4, 3)),
        (32, Tile(32, 64, 32, 4, 3), Tile(32, 64, 32, 8, 3)),
        (128, Tile(64, 64, 32, 4, 3), Tile(64, 64, 32, 8, 3)),
    ],
    ("product", "ieee"): [
        (16, Tile(16, 64, 32, 4, 2), Tile(16, 64, 32, 4, 2)),
        (32, Tile(32, 64, 32, 4, 2), Tile(32, 64, 16, 4, 2)),
        (128, Tile(64, 64, 16, 8, 2), Tile(64, 64, 16, 8, 2)),
    ],
    ("outer", "half"): [
        (16, Tile(64, 64, 16, 4, 3), Tile(64, 64, 16, 8, 3)),
        (128, Tile(64, 64, 32, 4, 3), Tile(64, 64, 16, 8, 3)),
    ],
    ("outer", "tf32"): [
        (16, Tile(64, 64, 16, 4, 3), Tile(64, 64, 16, 8, 3)),
        (128, Tile(64, 64, 32, 4, 3), Tile(64, 64, 16, 8, 3)),
    ],
    ("outer", "ieee"): [(128, Tile(64, 64, 16, 8, 2), Tile(64, 64, 16, 8, 2))],
}

# Sums are bound by memory; one tile serves all.
SUM_TILE = Tile(1, 256, 8, 4, 2)

# What was measured in this process; filled on request only.
_MEASURED: dict[Situation, Tile] = {}


def arithmetic(dtype: torch.dtype) -> str:
    """`half`, or for float32 `tf32` where PyTorch is set to use it (`torch.set_float32_matmul_precision`), else `ieee`."""
    if dtype != torch.float32:
        return "half"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def row_bucket(n_rows: int, n_experts: int) -> int:
    """Average rows an expert, rounded up to a power of two, 16 to 128."""
    return min(MAX_BUCKET, max(MIN_BLOCK, next_power_of_2(cdiv(n_rows, max(n_experts, 1)))))


def is_aligned(*tensors: Tensor) -> bool:
    """Whether all starts, widths and strides are multiples of 16, as Triton's wide loads need."""
    sizes = (size for x in tensors for size in (x.data_ptr(), x.shape[-1], *x.stride()) if size != 1)
    return all(size % 16 == 0 for size in sizes)


def default_tiles(family: str, kind: str, aligned: bool) -> list[tuple[int, Tile]]:
    """The shipped tiles of `product` or `outer`, each with the rows an expert up to which it serves."""
    return [(rows, wide if aligned else narrow) for rows, wide, narrow in _TABLE[family, kind]]


def default_tile(family: str, kind: str, bucket: int, aligned: bool) -> Tile:
    """The shipped tile for a bucket of `row_bucket`."""
    return next(tile for rows, tile in default_tiles(family, kind, aligned) if bucket <= rows)


@dataclass(frozen=True, slots=True)
class Situation:
    """What tiles are chosen by: a batch of another length is the same situation, unless its experts get far more rows."""

    kernel: str
    family: str
    """`product` or `outer`."""
    kind: str
    """From `arithmetic`."""
    bucket: int
    """From `row_bucket`."""
    sizes: tuple[int, int]
    """Widths of the two sides, rounded up to powers of two."""
    aligned: bool
    """From `is_aligned`."""
    device: torch.device
    """Of the tensors."""


def pick_tile(situation: Situation, run: Callable[[Tile], object]) -> Tile:
    """The tile to run a kernel with: the shipped one, or where tuning was asked for the fastest of the table.

    Args:
        situation: the key.
        run: launches the kernel with a tile; writes the same result each time.
    """
    family, kind, aligned = situation.family, situation.kind, situation.aligned
    if os.environ.get(ENVIRONMENT_VARIABLE) != "1":
        return default_tile(family, kind, situation.bucket, aligned)
    if situation not in _MEASURED:
        tiles = dict.fromkeys(tile for _, tile in default_tiles(family, kind, aligned))
        _MEASURED[situation] = min(tiles, key=lambda tile: milliseconds(lambda: run(tile)))
    return _MEASURED[situation]


def milliseconds(call: Callable[[], object]) -> float:
    """Median time of a call on the device."""
    from triton.testing import do_bench

    return float(do_bench(call, return_mode="median"))  # pyright: ignore[reportArgumentType] - a number in this mode
