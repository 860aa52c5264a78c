"""How a kernel is launched: checks, the map of tiles, tile sizes, sums over sorted rows.

Nothing waits for the device: grids are upper bounds that follow from shapes, and what depends on the routing is computed
where the routing is. Shapes: see ops/README.md.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor

from sparseffn.errors import UserError
from sparseffn.ops._checks import require_one_device
from sparseffn.ops.triton import DTYPES, products, sums, tuning
from sparseffn.ops.triton.tuning import SUM_TILE, Situation, Tile, cdiv

Result = TypeVar("Result")

# Entries of the tile map that one program handles at once.
MAP_BLOCK = 128

# Products and sums may be fused, as in cuBLAS; Triton 3.10 changes the default.
FUSION = {"enable_fp_fusion": True}


def check_tensors(**tensors: Tensor) -> None:
    """Refuse what the kernels cannot read.

    Raises:
        UserError: a dtype is not float32, bfloat16 or float16, or the tensors are on several devices.
    """
    require_one_device(*tensors.values())
    for name, x in tensors.items():
        if x.is_floating_point() and x.dtype not in DTYPES:
            raise UserError(
                f"`{name}` must be float32, bfloat16 or float16 for backend 'triton'; got {x.dtype}; "
                f"fix: cast it, or use backend 'torch'"
            )


def device_of(x: Tensor) -> AbstractContextManager[object]:
    """Kernels start on the current device, which may be another one than that of the tensors."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


# A compiled kernel's type is that of its Python source, whose arguments are pointers and compile-time constants.
def start(kernel: Any, n_programs: int, *arguments: object, **options: object) -> None:
    """Launch a kernel on a one-dimensional grid, the only dimension that may exceed 65,535."""
    kernel[(n_programs,)](*arguments, **options)


def tile_options(tile: Tile, kind: str) -> dict[str, Any]:
    """The constants of a product's kernel, for `kind` of `tuning.arithmetic`."""
    return {
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_K": tile.k,
        "PRECISION": "tf32" if kind == "tf32" else "ieee",
        "num_warps": tile.n_warps,
        "num_stages": tile.n_stages,
        **FUSION,
    }


def sum_options(n_width: int) -> dict[str, int]:
    """The constants of a sum's kernel, for rows so wide."""
    tile = SUM_TILE.fitted(n=n_width)
    return {"BLOCK_J": tile.k, "BLOCK_D": tile.n, "num_warps": tile.n_warps, "num_stages": tile.n_stages, **FUSION}


def tile_map(offsets: Tensor, n_rows: int, block_m: int) -> Tensor:
    """int64 `[n_tiles, 2]`: expert (-1: none) and first row of each tile, for as many tiles as any routing can need."""
    n_experts = offsets.shape[0] - 1
    tiles = offsets.new_empty(n_rows // block_m + n_experts, 2)
    options = {"BLOCK_M": block_m, "BLOCK_E": MAP_BLOCK, **FUSION}
    start(products.tile_map_kernel, n_experts + 1, offsets, tiles, n_experts, tiles.shape[0], **options)
    return tiles


def run_product(
    name: str,
    rows: Tensor,
    weight: Tensor,
    offsets: Tensor,
    n_rows: int,
    launch: Callable[[int, Tensor, dict[str, Any]], Result],
) -> Result:
    """Choose a tile for `rows @ weight` and call `launch(number of programs, tile map, constants)`."""
    n_inner, n_outer = weight.shape[1:]
    situation = _situation(name, "product", weight.shape, n_rows, rows, weight)

    def run(tile: Tile) -> Result:
        tile = tile.fitted(n=n_outer, k=n_inner)
        tiles = tile_map(offsets, n_rows, tile.m)
        return launch(tiles.shape[0] * cdiv(n_outer, tile.n), tiles, tile_options(tile, situation.kind))

    with device_of(rows):
        return run(tuning.pick_tile(situation, run))


def run_outer(
    name: str, left: Tensor, right: Tensor, out: Tensor, n_rows: int, launch: Callable[[int, dict[str, Any]], object]
) -> None:
    """Choose a tile for the gradient `out` of the matrices and call `launch(number of programs, constants)`."""
    n_experts, n_left, n_right = out.shape
    situation = _situation(name, "outer", out.shape, n_rows, left, right)

    def run(tile: Tile) -> None:
        tile = tile.fitted(m=n_left, n=n_right)
        launch(n_experts * cdiv(n_left, tile.m) * cdiv(n_right, tile.n), tile_options(tile, situation.kind))

    with device_of(out):
        run(tuning.pick_tile(situation, run))


def _situation(name: str, family: str, shape: torch.Size, n_rows: int, *inputs: Tensor) -> Situation:
    """What the tile of a kernel that reads `inputs`, with matrices of `shape`, depends on."""
    n_experts, *sizes = shape
    return Situation(
        kernel=name,
        family=family,
        kind=tuning.arithmetic(inputs[0].dtype),
        bucket=tuning.row_bucket(n_rows, n_experts),
        sizes=(tuning.next_power_of_2(sizes[0]), tuning.next_power_of_2(sizes[1])),
        aligned=tuning.is_aligned(*inputs),
        device=inputs[0].device,
    )


def segments(targets: Tensor, n_targets: int) -> tuple[Tensor, Tensor]:
    """Entries sorted stably by target, and where those of each target start: a fixed order of summation without atomics."""
    # Radix sort takes half as many passes over 32 bits; targets stay far below 2^31.
    ordered, order = targets.int().sort(stable=True)
    edges = torch.arange(n_targets + 1, device=targets.device, dtype=ordered.dtype)
    return order, torch.searchsorted(ordered, edges)


def sum_rows(rows: Tensor, tokens: Tensor, n_tokens: int) -> Tensor:
    """Sum of each token's rows, in float32, rounded once."""
    n_width, options = rows.shape[1], sum_options(rows.shape[1])
    out = rows.new_empty(n_tokens, n_width)
    with device_of(rows):
        order, starts = segments(tokens, n_tokens)
        n_programs = n_tokens * cdiv(n_width, options["BLOCK_D"])
        start(sums.token_sum_fwd_kernel, n_programs, rows, order, starts, out, n_width, **options)
    return out
