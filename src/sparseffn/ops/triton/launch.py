"""How a kernel is launched: checks, tile sizes, the sort of selections by expert, sums over a token's rows.

Nothing waits for the device: grids are upper bounds that follow from shapes, and what depends on the routing is computed
where the routing is. Shapes: see ops/README.md.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from sparseffn.errors import UserError
from sparseffn.ops._checks import require_one_device
from sparseffn.ops.triton import DTYPES, outer, sorting, sums, tuning
from sparseffn.ops.triton.tuning import SUM_TILE, Situation, Tile, cdiv, next_power_of_2

Result = TypeVar("Result")

# Selections that one program of the sort places, experts and selections that it looks at at once, and blocks that are
# summed at once.
SORT_ROWS, SORT_EXPERTS, SORT_OTHERS, SORT_BLOCKS = 256, 32, 32, 256
# Rows and columns that one program sums for the gradient of a bias.
BIAS_ROWS, BIAS_COLUMNS = 32, 64
# Elements that one program adds the parts of.
PART_BLOCK = 1024

# Numbers that one program of a row's top-K looks at at once, and its warps: 8 numbers a thread, as 16 spill on sm_80.
CHOICE_BLOCK, CHOICE_WARPS = 2048, 8

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
def start(kernel: Any, n_programs: int, *arguments: object, n_factors: int = 1, **options: object) -> None:
    """Launch a kernel on a grid whose first dimension is the only one that may exceed 65,535."""
    kernel[(n_programs, n_factors)](*arguments, **options)


def tile_options(tile: Tile, kind: str) -> dict[str, Any]:
    """The constants of a product's kernel, for `kind` of `tuning.arithmetic`."""
    return {
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_K": tile.k,
        "PRECISION": "ieee" if kind == "half" else kind,
        "num_warps": tile.n_warps,
        "num_stages": tile.n_stages,
        **FUSION,
    }


def sum_options(n_width: int) -> dict[str, int]:
    """The constants of a sum's kernel, for rows so wide."""
    tile = SUM_TILE.fitted(n=n_width)
    return {"BLOCK_J": tile.k, "BLOCK_D": tile.n, "num_warps": tile.n_warps, "num_stages": tile.n_stages, **FUSION}


def row_blocks(n: int) -> dict[str, int]:
    """Constants of a program of a top-K among n numbers: rows and columns that it looks at at once, warps."""
    block_n = min(CHOICE_BLOCK, next_power_of_2(n))
    return {"BLOCK_R": CHOICE_BLOCK // block_n, "BLOCK_N": block_n, "num_warps": CHOICE_WARPS, **FUSION}


class Rows(NamedTuple):
    """Selections in order of their expert."""

    order: Tensor
    """int64 `[R]`: the selection of each row; those of no expert come last."""
    offsets: Tensor
    """int64 `[E + 1]`: where each expert's rows begin."""

    @property
    def n_experts(self) -> int:
        return self.offsets.shape[0] - 1

    @property
    def n_rows(self) -> int:
        return self.order.shape[0]


def sort_rows(indices: Tensor, n_experts: int) -> Rows:
    """Sort selections `[T, K]` stably by expert, in three launches."""
    n_rows = indices.numel()
    n_blocks = max(1, cdiv(n_rows, SORT_ROWS))
    counts = indices.new_empty((n_experts + 1) * n_blocks + n_experts + 1, dtype=torch.int32)
    counts, totals = counts.split(((n_experts + 1) * n_blocks, n_experts + 1))
    rows = Rows(indices.new_empty(n_rows), indices.new_empty(n_experts + 1))
    block_e = min(SORT_EXPERTS, next_power_of_2(n_experts + 1))
    sizes = {"N_EXPERTS": n_experts, "BLOCK_R": SORT_ROWS, "BLOCK_E": block_e, **FUSION}
    start(sorting.count_kernel, n_blocks, indices, counts, n_rows, n_blocks, **sizes)
    start(sorting.scan_kernel, n_experts + 1, counts, totals, n_blocks, BLOCK_B=SORT_BLOCKS, **FUSION)
    arguments = (indices, counts, totals, *rows, n_rows, n_blocks)
    start(sorting.place_kernel, n_blocks, *arguments, BLOCK_J=SORT_OTHERS, **sizes)
    return rows


def run_product(
    name: str,
    rows: Rows,
    widths: tuple[int, int],
    tensors: tuple[Tensor, ...],
    launch: Callable[[int, dict[str, Any]], Result],
    *,
    family: str = "product",
) -> Result:
    """Choose a tile for sorted rows of `widths[0]` times matrices that make `widths[1]` of it, and call
    `launch(number of programs, constants)`. `tensors` are what is read, of which the first says where and in which dtype.
    """
    (n_in, n_out), n_experts = widths, rows.n_experts
    situation = _situation(name, family, rows, widths, *tensors)

    def run(tile: Tile) -> Result:
        tile = tile.fitted(n=n_out, k=n_in).within(*_memory(situation, tensors, 2 if family == "gated" else 1))
        n_tiles = rows.n_rows // tile.m + n_experts + 1
        # The experts, and whoever has none.
        block_e = next_power_of_2(n_experts + 1)
        options = {**tile_options(tile, situation.kind), "N_EXPERTS": n_experts, "BLOCK_E": block_e}
        return launch(n_tiles * cdiv(n_out, tile.n), options)

    return run(tuning.pick_tile(situation, run))


def run_outer(
    name: str,
    rows: Rows,
    out: tuple[Tensor, ...],
    tensors: tuple[Tensor, ...],
    launch: Callable[[int, tuple[Tensor, ...], int, dict[str, Any]], object],
) -> None:
    """Choose a tile for the gradients `out` of matrices, all of one shape, and call
    `launch(number of programs, where to write, parts, constants)`; parts are added up afterwards.
    """
    n_experts, n_left, n_right = out[0].shape
    situation = _situation(name, "outer", rows, (n_left, n_right), *tensors)

    def run(tile: Tile) -> None:
        tile = tile.fitted(m=n_left, n=n_right).within(*_memory(situation, tensors, 1))
        n_programs = n_experts * cdiv(n_left, tile.m) * cdiv(n_right, tile.n)
        n_parts = parts_of(rows.n_rows, n_experts, n_programs * len(out))
        parts = out[0].new_empty(0 if n_parts == 1 else len(out) * n_parts * out[0].numel(), dtype=torch.float32)
        targets = out if n_parts == 1 else parts.chunk(len(out))
        options = {**tile_options(tile, situation.kind), "N_EXPERTS": n_experts}
        launch(n_parts * n_programs, targets, n_parts, options)
        if n_parts > 1:
            sum_parts(parts, out, n_parts)

    run(tuning.pick_tile(situation, run))


# Programs that keep the largest GPUs busy (132 or 304 processors), and the fewest rows worth a part of its own.
_BUSY, PART_ROWS, _MOST_PARTS = 256, 512, 8


def parts_of(n_rows: int, n_groups: int, n_programs: int) -> int:
    """Stretches of an expert's rows that are summed apart: few matrices would leave most of a GPU idle. Shapes alone decide."""
    fill, length = _BUSY // max(1, n_programs), n_rows // max(1, n_groups) // PART_ROWS
    return max(1, min(fill, length, _MOST_PARTS))


def sum_parts(parts: Tensor, out: tuple[Tensor, ...], n_parts: int) -> None:
    """Add up `n_parts` float32 copies of one matrix, or of two of one size; parts lie one behind the other, each as its sum."""
    n = out[0].numel()
    arguments = (parts, out[0], out[1] if len(out) > 1 else None, n, n_parts)
    start(outer.sum_parts_kernel, cdiv(n, PART_BLOCK), *arguments, n_factors=len(out), BLOCK=PART_BLOCK, **FUSION)


def _memory(situation: Situation, tensors: tuple[Tensor, ...], n_factors: int) -> tuple[int, int]:
    return tuning.shared_bytes(situation.device) // n_factors, tensors[0].element_size()


def _situation(name: str, family: str, rows: Rows, sizes: tuple[int, int], *inputs: Tensor) -> Situation:
    """What the tile of a kernel that reads `inputs`, with matrices of `sizes`, depends on."""
    return Situation(
        kernel=name,
        family=family,
        kind=tuning.arithmetic(inputs[0].dtype),
        bucket=tuning.row_bucket(rows.n_rows, rows.n_experts),
        sizes=(next_power_of_2(sizes[0]), next_power_of_2(sizes[1])),
        aligned=tuning.is_aligned(*inputs),
        device=inputs[0].device,
    )


def with_lines(rows: Tensor) -> Tensor:
    """A matrix whose rows are contiguous, wherever they begin."""
    return rows if rows.stride(1) == 1 and (rows.shape[0] < 2 or rows.stride(0) >= rows.shape[1]) else rows.contiguous()


def whole(tensor: Tensor | None) -> Tensor | None:
    """Contiguous, where there is one."""
    return None if tensor is None else tensor.contiguous()


def segments(targets: Tensor, n_targets: int) -> tuple[Tensor, Tensor]:
    """Entries sorted stably by target, and where those of each target start: a fixed order of summation without atomics.

    Those of no target lie before the first start or behind the last.
    """
    # Radix sort takes half as many passes over 32 bits; a bad index must not become another one by losing its high bits.
    ordered, order = targets.clamp(-1, n_targets).int().sort(stable=True)
    edges = torch.arange(n_targets + 1, device=targets.device, dtype=ordered.dtype)
    return order, torch.searchsorted(ordered, edges)


def sum_tokens(rows: Tensor, n_tokens: int) -> Tensor:
    """`[T, D]` from the K rows of each token, `[T K, D]`, in float32, rounded once."""
    n_rows, n_width = rows.shape
    if n_rows == n_tokens:
        return rows
    tile, out = SUM_TILE.fitted(n=n_width), rows.new_empty(n_tokens, n_width)
    sizes = {"K": n_rows // max(1, n_tokens), "D": n_width, "BLOCK_T": tile.m, "BLOCK_D": tile.n, **FUSION}
    start(sums.token_sum_kernel, cdiv(n_tokens, tile.m) * cdiv(n_width, tile.n), rows, out, n_tokens, **sizes)
    return out
