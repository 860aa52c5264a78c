"""What each kernel uses of a GPU: registers, spills and shared memory, from compiling it ahead of time; no GPU needed.

    from sparseffn.ops.triton.resources import resource_report
    rows = resource_report(targets=["sm_90"], kernels=["expert_up_fwd_kernel"])

Types of the arguments follow from their names, as everywhere in these kernels: p_ is a pointer, n_ and stride_ are integers.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparseffn.errors import UserError, unknown_name
from sparseffn.ops.triton import outer, products, sums, tuning
from sparseffn.ops.triton.launch import FUSION, MAP_BLOCK, sum_options, tile_options

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}

# Strides that are 1 where tensors are contiguous; gradients of rows read the matrices transposed.
_BY_OUTER = ("stride_row_inner", "stride_weight_outer")
_BY_INNER = ("stride_row_inner", "stride_weight_inner", "stride_a_inner")
_BY_COLUMN = ("stride_x_inner", "stride_a_inner", "stride_grad_inner", "stride_inner")

# Kernel, family of its tiles, its unit strides.
_KERNELS = {
    kernel.__name__: (kernel, family, units)
    for kernel, family, units in (
        (products.tile_map_kernel, "map", ()),
        (products.expert_up_fwd_kernel, "product", _BY_OUTER),
        (products.expert_up_bwd_x_kernel, "product", _BY_INNER),
        (products.expert_down_fwd_kernel, "product", _BY_OUTER),
        (products.expert_down_bwd_a_gates_kernel, "product", _BY_INNER),
        (outer.expert_up_bwd_weight_kernel, "outer", _BY_COLUMN),
        (outer.expert_down_bwd_weight_kernel, "outer", _BY_COLUMN),
        (sums.token_sum_fwd_kernel, "sum", _BY_COLUMN),
        (sums.weighted_rows_fwd_kernel, "sum", _BY_COLUMN),
        (sums.weighted_rows_bwd_values_kernel, "sum", _BY_COLUMN),
        (sums.weighted_rows_bwd_weights_kernel, "sum", _BY_COLUMN),
    )
}

KERNELS = tuple(_KERNELS)

_INDEX_POINTERS = ("p_tokens", "p_offsets", "p_tiles", "p_order", "p_starts", "p_indices")
_FLOAT32_POINTERS = ("p_gates", "p_dots", "p_weights")


@dataclass(frozen=True, slots=True)
class Build:
    """One compilation: a kernel in a dtype and a default configuration."""

    kernel: str
    dtype: str
    """`float32`, `bfloat16` or `float16`."""
    arithmetic: str
    """`ieee`, `tf32` or `half`; empty where nothing is multiplied."""
    rows: int
    """The configuration serves up to so many rows an expert; 0 where that has no influence."""
    aligned: bool
    """Whether widths and strides are multiples of 16, which widens loads, or may be anything."""
    options: dict[str, Any]
    """Constants of the kernel, warps and stages."""


def default_builds(
    kernels: Iterable[str] = KERNELS, dtypes: Iterable[str] = tuple(DTYPES), aligned: Iterable[bool] = (True, False)
) -> Iterator[Build]:
    """Every default configuration of these kernels."""
    for kernel in kernels:
        if kernel not in _KERNELS:
            raise unknown_name("kernel", kernel, KERNELS)
        for dtype in dtypes:
            for wide in aligned:
                for arithmetic, rows, options in _configurations(_KERNELS[kernel][1], dtype, wide):
                    yield Build(kernel, dtype, arithmetic, rows, wide, options)


def _configurations(family: str, dtype: str, aligned: bool) -> Iterator[tuple[str, int, dict[str, Any]]]:
    if family == "map":
        if dtype == "float32":
            yield "", 0, {"BLOCK_M": tuning.MIN_BLOCK, "BLOCK_E": MAP_BLOCK, "num_warps": 4, "num_stages": 3, **FUSION}
    elif family == "sum":
        yield "", 0, sum_options(tuning.SUM_TILE.n)
    else:
        for kind in ("ieee", "tf32") if dtype == "float32" else ("half",):
            for rows, tile in tuning.default_tiles(family, kind, aligned):
                yield kind, rows, tile_options(tile, kind)


def resource_report(
    *,
    targets: Iterable[str] = tuple(TARGETS),
    kernels: Iterable[str] = KERNELS,
    dtypes: Iterable[str] = tuple(DTYPES),
    aligned: Iterable[bool] = (True, False),
) -> list[dict[str, str | int | bool]]:
    """Compile default configurations and report what they use; one second each.

    Args:
        targets: of `TARGETS`.
        kernels: of `KERNELS`.
        dtypes: of `DTYPES`.
        aligned: True for sizes that are multiples of 16, False for any size.

    Returns:
        A dict for each compilation: `kernel`, `target`, `dtype`, `arithmetic`, `rows` (an expert, at most), `aligned`,
        `tile`, `warps`, `stages`, `registers` (of a thread), `spills` (bytes of a thread; registers on gfx942), `shared`
        (bytes of a block).

    Raises:
        UserError: a name is unknown, or the process interprets Triton's kernels instead of compiling them.
    """
    if knobs.runtime.interpret:
        raise UserError("kernels that are interpreted cannot be compiled; fix: unset TRITON_INTERPRET")
    return [report_build(build, target) for target in targets for build in default_builds(kernels, dtypes, aligned)]


def report_build(build: Build, target: str) -> dict[str, str | int | bool]:
    """One row of `resource_report`."""
    if target not in TARGETS:
        raise unknown_name("target", target, TARGETS)
    compiled = compile_build(build, target)
    blocks = [str(value) for name, value in build.options.items() if name.startswith("BLOCK_")]
    used = _from_amdgcn(compiled.asm["amdgcn"]) if target.startswith("gfx") else _from_cubin(compiled.asm["cubin"])
    return {
        "kernel": build.kernel,
        "target": target,
        "dtype": build.dtype,
        "arithmetic": build.arithmetic,
        "rows": build.rows,
        "aligned": build.aligned,
        "tile": "x".join(blocks),
        "warps": build.options["num_warps"],
        "stages": build.options["num_stages"],
        **used,
        "shared": compiled.metadata.shared,
    }


# A CompiledKernel, whose fields Triton sets when it runs.
def compile_build(build: Build, target: str) -> Any:
    """The compiled kernel, with the types and the alignment that a launch would give it."""
    kernel, _, units = _KERNELS[build.kernel]
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}
    for position, name in enumerate(kernel.arg_names):
        if name in build.options or name in units:
            signature[name], constants[name] = "constexpr", build.options.get(name, 1)
            continue
        signature[name] = _argument_type(name, DTYPES[build.dtype])
        if name.startswith("p_") or (build.aligned and name not in products.BATCH_SIZES):
            attributes[(position,)] = [["tt.divisibility", 16]]
    options = {name: value for name, value in build.options.items() if name not in kernel.arg_names}
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=TARGETS[target], options=options)


def _argument_type(name: str, element: str) -> str:
    if not name.startswith("p_"):
        return "i32"
    return "*i64" if name in _INDEX_POINTERS else "*fp32" if name in _FLOAT32_POINTERS else f"*{element}"


def _from_cubin(cubin: bytes) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    # What does not fit into registers lies on the thread's stack, in local memory.
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": found["REG"], "spills": found["STACK"] + found["LOCAL"]}


def _from_amdgcn(text: str) -> dict[str, int]:
    found = {name: int(value) for name, value in re.findall(r"\.(vgpr_count|sgpr_spill_count|vgpr_spill_count):\s+(\d+)", text)}
    return {"registers": found["vgpr_count"], "spills": found["sgpr_spill_count"] + found["vgpr_spill_count"]}
