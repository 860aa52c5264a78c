"""Tile sizes of the kernels: tables that ship, and measuring instead of them for whoever asks.

The tables and what is measured are keyed by vendor, dtype, precision and *bucketed* sizes: rows an expert, rounded up to a
power of two, never the token count, so a batch of another length neither tunes nor compiles again. With
SPARSEFFN_TRITON_TUNE=1 the first call of a bucket times every candidate (seconds, and it waits for the device); without it
nothing is ever timed. SPARSEFFN_TRITON_FLOAT32 says how float32 is multiplied; see `arithmetic`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from sparseffn.errors import unknown_name

ENVIRONMENT_VARIABLE = "SPARSEFFN_TRITON_TUNE"
FLOAT32_VARIABLE = "SPARSEFFN_TRITON_FLOAT32"

Vendor = Literal["cuda", "hip"]

# tl.dot takes no side under 16.
MIN_BLOCK = 16
# An average of more than half as many rows an expert fills the largest tiles of the table.
MAX_BUCKET = 256


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

    def within(self, n_bytes: int, itemsize: int) -> Tile:
        """With as many stages as a block's shared memory holds, one at least."""
        stage = (self.m + self.n) * self.k * itemsize
        return replace(self, n_stages=max(1, min(self.n_stages, n_bytes // stage)))


_Table = dict[tuple[str, str], list[tuple[int, Tile, Tile]]]

# (kernel family, arithmetic) to (rows an expert up to, tile for sizes that are copied in pieces of 8 bytes, tile for any), in
# rising order of rows. `gated` has two products at once, `hidden` more around its product: gradients of units, a bias of the
# values, rows that are gathered and scattered.
# Chosen by the resource report: no spills on sm_80, sm_90 (cuda) and gfx942 (hip), within 163 KB and 64 KB of shared memory.
# Speed is not measured yet. Gathered rows of a weight's gradient are loaded asynchronously from five stages on: an index is
# loaded two ahead of its row.
_CUDA: _Table = {
    ("product", "half"): [
        (16, Tile(16, 128, 64, 4, 4), Tile(16, 128, 32, 4, 3)),
        (32, Tile(32, 128, 64, 4, 4), Tile(32, 128, 32, 8, 3)),
        (128, Tile(64, 128, 64, 4, 4), Tile(64, 128, 32, 8, 3)),
        (256, Tile(128, 128, 32, 8, 4), Tile(64, 128, 32, 8, 3)),
    ],
    ("product", "tf32"): [
        (16, Tile(16, 64, 32, 4, 4), Tile(16, 64, 32, 4, 3)),
        (32, Tile(32, 64, 32, 8, 3), Tile(32, 64, 32, 8, 3)),
        (128, Tile(64, 64, 32, 4, 3), Tile(32, 64, 32, 8, 3)),
        (256, Tile(128, 64, 32, 8, 3), Tile(32, 64, 32, 8, 3)),
    ],
    ("product", "ieee"): [
        (16, Tile(16, 64, 32, 4, 2), Tile(16, 64, 16, 4, 2)),
        (32, Tile(32, 64, 32, 4, 2), Tile(32, 64, 16, 8, 2)),
        (256, Tile(64, 64, 32, 8, 2), Tile(32, 64, 16, 8, 2)),
    ],
    ("gated", "half"): [
        (16, Tile(16, 64, 64, 4, 4), Tile(16, 64, 32, 4, 3)),
        (32, Tile(32, 64, 64, 4, 4), Tile(32, 64, 32, 8, 3)),
        (128, Tile(64, 64, 64, 4, 3), Tile(32, 64, 32, 8, 3)),
        (256, Tile(128, 64, 64, 8, 3), Tile(32, 64, 32, 8, 3)),
    ],
    ("gated", "tf32"): [
        (16, Tile(16, 64, 32, 4, 3), Tile(16, 64, 32, 8, 3)),
        (256, Tile(32, 64, 32, 8, 3), Tile(32, 64, 32, 8, 2)),
    ],
    ("gated", "ieee"): [
        (16, Tile(16, 64, 16, 4, 2), Tile(16, 64, 16, 4, 2)),
        (256, Tile(32, 64, 16, 8, 2), Tile(32, 64, 16, 8, 2)),
    ],
    ("hidden", "half"): [
        (16, Tile(16, 64, 64, 4, 4), Tile(16, 64, 32, 4, 3)),
        (32, Tile(32, 64, 64, 4, 4), Tile(32, 64, 32, 8, 3)),
        (256, Tile(64, 64, 64, 8, 4), Tile(32, 64, 32, 8, 3)),
    ],
    ("hidden", "tf32"): [
        (16, Tile(16, 64, 32, 4, 3), Tile(16, 64, 32, 8, 3)),
        (256, Tile(32, 64, 32, 8, 3), Tile(32, 64, 32, 8, 2)),
    ],
    ("hidden", "ieee"): [
        (16, Tile(16, 64, 16, 4, 2), Tile(16, 64, 16, 4, 2)),
        (256, Tile(32, 64, 16, 8, 2), Tile(32, 64, 16, 8, 2)),
    ],
    ("outer", "half"): [
        (16, Tile(64, 64, 16, 4, 5), Tile(64, 64, 16, 8, 3)),
        (64, Tile(64, 64, 32, 4, 5), Tile(64, 64, 16, 8, 3)),
        (128, Tile(64, 128, 32, 4, 5), Tile(64, 64, 16, 8, 3)),
        (256, Tile(128, 128, 64, 8, 5), Tile(64, 64, 16, 8, 3)),
    ],
    ("outer", "tf32"): [
        (16, Tile(64, 64, 16, 4, 5), Tile(64, 64, 16, 8, 3)),
        (256, Tile(64, 64, 32, 4, 5), Tile(64, 64, 16, 8, 3)),
    ],
    ("outer", "ieee"): [(256, Tile(64, 64, 16, 8, 5), Tile(64, 64, 16, 8, 2))],
}
_HIP: _Table = {
    ("product", "half"): [
        (16, Tile(16, 128, 64, 4, 2), Tile(16, 128, 32, 4, 2)),
        (32, Tile(32, 128, 64, 4, 2), Tile(32, 128, 32, 8, 2)),
        (128, Tile(64, 128, 64, 4, 2), Tile(64, 128, 32, 8, 2)),
        (256, Tile(128, 128, 32, 8, 2), Tile(64, 128, 32, 8, 2)),
    ],
    ("product", "ieee"): _CUDA["product", "ieee"],
    ("gated", "half"): [
        (16, Tile(16, 64, 64, 4, 2), Tile(16, 64, 32, 4, 2)),
        (32, Tile(32, 64, 64, 4, 2), Tile(32, 32, 32, 8, 2)),
        (256, Tile(64, 64, 32, 4, 2), Tile(64, 64, 32, 8, 2)),
    ],
    ("gated", "ieee"): [
        (16, Tile(16, 64, 16, 4, 2), Tile(16, 64, 16, 4, 2)),
        (256, Tile(32, 64, 16, 8, 2), Tile(32, 32, 16, 8, 2)),
    ],
    ("hidden", "half"): [
        (16, Tile(16, 64, 64, 4, 2), Tile(16, 64, 32, 4, 2)),
        (32, Tile(32, 64, 64, 4, 2), Tile(32, 32, 32, 8, 2)),
        (256, Tile(64, 64, 32, 8, 2), Tile(64, 64, 32, 8, 2)),
    ],
    ("hidden", "ieee"): _CUDA["hidden", "ieee"],
    ("outer", "half"): [
        (16, Tile(64, 64, 16, 4, 2), Tile(64, 64, 16, 8, 2)),
        (256, Tile(64, 64, 32, 4, 2), Tile(64, 64, 16, 8, 2)),
    ],
    ("outer", "ieee"): [(256, Tile(64, 64, 16, 8, 2), Tile(64, 64, 16, 8, 2))],
}
_TABLES: dict[Vendor, _Table] = {"cuda": _CUDA, "hip": _HIP}

# Sums are bound by memory; one tile serves all.
SUM_TILE = Tile(4, 256, 8, 4, 2)

# What was measured in this process; filled on request only.
_MEASURED: dict[Situation, Tile] = {}


def vendor() -> Vendor:
    """Whose devices PyTorch was built for."""
    return "hip" if torch.version.hip else "cuda"


def arithmetic(dtype: torch.dtype) -> str:
    """`half`, or for float32 how it is multiplied: `ieee`, `tf32` or `tf32x3`.

    SPARSEFFN_TRITON_FLOAT32 names one of the three; unset, it is `tf32` where PyTorch is set to use it
    (`torch.set_float32_matmul_precision`), else `ieee`. `tf32x3` sums three TF32 products, which keeps float32's precision at
    the speed of tensor cores; AMD's GPUs have none of the two, and compute `ieee`.

    Raises:
        UserError: the variable names something else.
    """
    if dtype != torch.float32:
        return "half"
    asked = os.environ.get(FLOAT32_VARIABLE)
    if asked and asked not in ("ieee", "tf32", "tf32x3"):
        raise unknown_name(FLOAT32_VARIABLE, asked, ["ieee", "tf32", "tf32x3"])
    if vendor() == "hip":
        return "ieee"
    return asked or ("tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee")


def row_bucket(n_rows: int, n_experts: int) -> int:
    """Average rows an expert, rounded up to a power of two, 16 to 256."""
    return min(MAX_BUCKET, max(MIN_BLOCK, next_power_of_2(cdiv(n_rows, max(n_experts, 1)))))


def is_aligned(*tensors: Tensor) -> bool:
    """Whether lines of all tensors, of rows or of columns, can be copied in pieces of 8 bytes, the fewest worth while."""
    return all(_has_even_lines(x) for x in tensors)


def _has_even_lines(x: Tensor) -> bool:
    inner = [size for size, stride in zip(x.shape[-2:], x.stride()[-2:], strict=True) if stride == 1]
    jumps = [stride for stride in x.stride() if stride != 1]
    return bool(inner) and all(size * x.element_size() % 8 == 0 for size in (*inner, *jumps)) and x.data_ptr() % 8 == 0


def default_tiles(family: str, kind: str, aligned: bool, of: Vendor = "cuda") -> list[tuple[int, Tile]]:
    """The shipped tiles of `product`, `gated`, `hidden` or `outer`, each with the rows an expert up to which it serves."""
    # Three products of halves take no more memory than one, and few more registers.
    rows = _TABLES[of][family, "tf32" if kind == "tf32x3" else kind]
    return [(rows, wide if aligned else narrow) for rows, wide, narrow in rows]


def default_tile(family: str, kind: str, bucket: int, aligned: bool, of: Vendor = "cuda") -> Tile:
    """The shipped tile for a bucket of `row_bucket`."""
    return next(tile for rows, tile in default_tiles(family, kind, aligned, of) if bucket <= rows)


@functools.cache
def shared_bytes(device: torch.device) -> int:
    """Shared memory of a block; without a GPU whatever the tables ask for."""
    if device.type != "cuda":
        return 1 << 20
    found = torch.cuda.get_device_properties(device)
    return int(getattr(found, "shared_memory_per_block_optin", None) or 64 * 1024)


@dataclass(frozen=True, slots=True)
class Situation:
    """What tiles are chosen by: a batch of another length is the same situation, unless its experts get far more rows."""

    kernel: str
    family: str
    """`product`, `gated`, `hidden` or `outer`."""
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
        return default_tile(family, kind, situation.bucket, aligned, vendor())
    if situation not in _MEASURED:
        tiles = dict.fromkeys(tile for _, tile in default_tiles(family, kind, aligned, vendor()))
        _MEASURED[situation] = min(tiles, key=lambda tile: milliseconds(lambda: run(tile)))
    return _MEASURED[situation]


def milliseconds(call: Callable[[], object]) -> float:
    """Median time of a call on the device."""
    from triton.testing import do_bench

    return float(do_bench(call, return_mode="median"))  # pyright: ignore[reportArgumentType] - a number in this mode
