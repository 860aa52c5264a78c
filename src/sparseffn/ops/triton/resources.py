"""What each kernel uses of a GPU: registers, spills and shared memory, from compiling it ahead of time; no GPU needed.

    from sparseffn.ops.triton.resources import resource_report
    rows = resource_report(targets=["sm_90"], kernels=["experts_up_fwd_kernel"])

Types of the arguments follow from their names, as everywhere in these kernels: p_ is a pointer, n_ and stride_ are integers.
Sizes are those of the paper's layers: 412 wide, 16 experts of 128 pairs, 4 to a token.
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
from sparseffn.ops import balance_losses
from sparseffn.ops.triton import (
    balancing,
    balancing_operations,
    choice,
    launch,
    outer,
    products,
    router,
    router_operations,
    sorting,
    statistics_kernels,
    statistics_operations,
    sums,
    tuning,
)
from sparseffn.ops.triton.launch import FUSION, sum_options, tile_options
from sparseffn.ops.triton.tuning import Tile, Vendor, next_power_of_2

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

# Shared memory of a block. gfx942 counts what a kernel needs of the 64 KB of a compute unit.
SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}

DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}

_EXPERTS, _K = 16, 4
# d_model and expert_size of a build: lines that are copied in pieces of 8 bytes, and any.
_WIDTHS = {True: (412, 128), False: (413, 65)}

# Kernel, family of its tiles, and which sides of the layer are its inner and its outer one.
_FAMILIES: dict[str, tuple[Any, str]] = {
    kernel.__name__: (kernel, family)
    for kernel, family in (
        (router.route_logits_kernel, "router"),
        (router.route_fwd_kernel, "router"),
        (router.route_bwd_logits_kernel, "router"),
        (router.route_bwd_x_kernel, "router"),
        (router.route_bwd_selector_kernel, "router"),
        (balancing.sinkhorn_round_kernel, "balancing"),
        (balancing.sinkhorn_fwd_kernel, "balancing"),
        (balancing.over_capacity_kernel, "balancing"),
        (choice.topk_kernel, "choice"),
        (choice.ordered_topk_kernel, "choice"),
        (choice.survivors_kernel, "choice"),
        (choice.spread_kernel, "choice"),
        (sorting.count_kernel, "sort"),
        (sorting.scan_kernel, "sort"),
        (sorting.place_kernel, "sort"),
        (products.experts_up_fwd_kernel, "product"),
        (products.experts_down_fwd_kernel, "product"),
        (products.experts_bwd_hidden_kernel, "hidden"),
        (products.experts_bwd_x_kernel, "product"),
        (outer.experts_bwd_keys_kernel, "outer"),
        (outer.experts_bwd_values_kernel, "outer"),
        (outer.experts_bwd_bias_kernel, "bias"),
        (outer.sum_parts_kernel, "parts"),
        (statistics_kernels.selection_counts_kernel, "statistics"),
        (statistics_kernels.selection_totals_kernel, "statistics"),
        (statistics_kernels.entropy_shares_kernel, "statistics"),
        (statistics_kernels.entropy_fwd_kernel, "statistics"),
        (statistics_kernels.switch_shares_kernel, "statistics"),
        (statistics_kernels.switch_fwd_kernel, "statistics"),
        (statistics_kernels.shares_bwd_kernel, "statistics"),
        (statistics_kernels.load_sums_kernel, "statistics"),
        (statistics_kernels.load_fwd_kernel, "statistics"),
        (statistics_kernels.load_bwd_kernel, "statistics"),
        (sums.token_sum_kernel, "tokens"),
        (sums.weighted_rows_fwd_kernel, "sum"),
        (sums.weighted_rows_bwd_values_kernel, "sum"),
        (sums.weighted_rows_bwd_weights_kernel, "sum"),
    )
}

KERNELS = tuple(_FAMILIES)

FLOAT32_ALONE = ("sort", "statistics", "balancing")
"""Families that see no tokens, so that neither dtype nor widths of a layer matter."""

# Kernels that take gated experts, biases or rows to gather; the most that they can have is compiled as `gated`, in this family.
_GATED = {
    "experts_up_fwd_kernel": "gated",
    "experts_down_fwd_kernel": "hidden",
    "experts_bwd_hidden_kernel": "hidden",
    "experts_bwd_x_kernel": "product",
    "experts_bwd_keys_kernel": "outer",
}
# Their inner side is the model's width.
_FROM_WIDTH = ("experts_up_fwd_kernel", "experts_bwd_hidden_kernel", "experts_bwd_keys_kernel")
_OPTIONAL = ("p_gate_keys", "p_key_bias", "p_gate_bias", "p_value_bias", "p_keep")

_POINTERS = {
    **dict.fromkeys(("p_order", "p_offsets", "p_indices", "p_starts"), "*i64"),
    **dict.fromkeys(("p_active", "p_counted"), "*i64"),
    **dict.fromkeys(("p_counts", "p_totals", "p_positions"), "*i32"),
    **dict.fromkeys(("p_gates", "p_dots", "p_weights", "p_logits", "p_shares", "p_grad_logits"), "*fp32"),
    **dict.fromkeys(("p_grad_gates", "p_grad_scores", "p_parts"), "*fp32"),
    **dict.fromkeys(("p_sums", "p_grad_loss", "p_loss", "p_slopes", "p_grad_weights"), "*fp32"),
    **dict.fromkeys(("p_ranks", "p_spread", "p_noise", "p_grad_spread"), "*fp32"),
    **dict.fromkeys(("p_before", "p_terms", "p_balanced"), "*fp32"),
    **dict.fromkeys(("p_keep", "p_mask", "p_over"), "*i1"),
}


@dataclass(frozen=True, slots=True)
class Build:
    """One compilation: a kernel in a dtype and a default configuration."""

    kernel: str
    dtype: str
    """`float32`, `bfloat16` or `float16`."""
    arithmetic: str
    """`ieee`, `tf32`, `tf32x3` or `half`; empty where the tile does not follow from it."""
    rows: int
    """The configuration serves up to so many rows an expert; 0 where that has no influence."""
    aligned: bool
    """Whether lines of the matrices are copied in pieces of 8 bytes, or may be of any length."""
    gated: bool
    """With gate keys, biases, dropout and the dearest activation, else plain ReLU experts."""
    options: dict[str, Any]
    """Constants of the kernel, absent pointers among them, warps and stages."""


def default_builds(
    kernels: Iterable[str] = KERNELS,
    dtypes: Iterable[str] = tuple(DTYPES),
    aligned: Iterable[bool] = (True, False),
    vendor: Vendor = "cuda",
) -> Iterator[Build]:
    """Every default configuration of these kernels on a vendor's devices."""
    for kernel in kernels:
        if kernel not in _FAMILIES:
            raise unknown_name("kernel", kernel, KERNELS)
        for dtype in dtypes:
            for wide in aligned:
                for gated in (False, True) if kernel in _GATED else (False,):
                    for arithmetic, rows, options in _configurations(kernel, dtype, wide, gated, vendor):
                        yield Build(kernel, dtype, arithmetic, rows, wide, gated, options)


def family_of(kernel: str) -> str:
    """Which kernels it shares its configurations with."""
    return _FAMILIES[kernel][1]


def _configurations(
    kernel: str, dtype: str, aligned: bool, gated: bool, vendor: Vendor
) -> Iterator[tuple[str, int, dict[str, Any]]]:
    family, (width, size) = _FAMILIES[kernel][1], _WIDTHS[aligned]
    if family in ("product", "hidden", "outer"):
        tiles = _GATED[kernel] if gated else family
        kinds = ("half",) if dtype != "float32" else ("ieee",) if vendor == "hip" else ("ieee", "tf32", "tf32x3")
        for kind in kinds:
            for rows, tile in tuning.default_tiles(tiles, kind, aligned, vendor):
                yield kind, rows, _expert_options(kernel, tile, kind, width, size, gated)
    elif family not in FLOAT32_ALONE or (dtype == "float32" and aligned):
        options = _small_options(kernel, family, dtype, width)
        for less in _variants(kernel):
            yield "", 0, options | less
        yield "", 0, options


def _variants(kernel: str) -> list[dict[str, Any]]:
    """What a kernel around the products is launched with beside the most that it can have."""
    # The shortest row, and several stretches.
    rows = [{"N": n, "SIZE": n, "K": 1, **launch.row_blocks(n)} for n in (1, 5000)]
    match kernel:
        case "topk_kernel" | "spread_kernel":
            return rows
        case "ordered_topk_kernel":
            return rows[:1]
        case "survivors_kernel":
            # In evaluation.
            return [row | {"p_hidden": None, "p_keep": None} for row in rows]
        case "sum_parts_kernel":
            return [{"p_second": None}]
        case "route_fwd_kernel":
            # As `route` launches it without dropout of experts, and with it another gate than a softmax over all of them.
            logits = {"p_ranks": None, "p_spread": None, "p_noise": None}
            return [{"p_keep": None, **logits}, {"GATE": "renormalised"}]
        case "route_bwd_logits_kernel":
            return [{"p_spread": None, "p_noise": None, "p_grad_spread": None}]
        case "sinkhorn_round_kernel":
            return [{"p_before": None, "p_mask": None}]
        case _:
            return []


def _expert_options(kernel: str, tile: Tile, kind: str, width: int, size: int, gated: bool) -> dict[str, Any]:
    """Constants of an expert's product or outer product, whose matrices are contiguous."""
    inner, outward = (width, size) if kernel in _FROM_WIDTH else (size, width)
    sides = {"M": inner, "N": outward} if kernel in ("experts_bwd_keys_kernel", "experts_bwd_values_kernel") else {}
    tile = tile.fitted(m=inner, n=outward) if sides else tile.fitted(n=outward, k=inner)
    back = kernel in ("experts_bwd_hidden_kernel", "experts_bwd_x_kernel")
    found: dict[str, Any] = {"N_IN": inner, "N_OUT": outward, **sides, "N_EXPERTS": _EXPERTS, "K": _K, "GATED": gated}
    found |= {
        "X_ROW": width,
        "GRAD_ROW": width,
        "ROW": inner,
        "GATHERED": gated,
        "BLOCK_E": next_power_of_2(_EXPERTS + 1),
        **tile_options(tile, kind),
    }
    for name in ("KEYS", "GATES", "VALUES"):
        # Gradients of rows read the matrices transposed.
        lines = {"IN": 1, "OUT": inner} if back else {"IN": outward, "OUT": 1}
        lines |= {"EXPERT": width * size, "ROW": outward, "COLUMN": 1}
        found |= {f"{name}_{side}": stride for side, stride in lines.items()}
    found |= {"ACTIVATION": "gelu_tanh" if gated else "relu", "ALPHA": 1.702, "LIMIT": 7.0, "KEEP_SCALE": 1.25}
    found["UNSORTED"] = gated
    return found if gated else found | dict.fromkeys(_OPTIONAL)


def _small_options(kernel: str, family: str, dtype: str, width: int) -> dict[str, Any]:
    """Constants of the kernels around the products."""
    match family:
        case "router":
            wide = dtype == "float32"
            sizes = {
                "D": width,
                "X_ROW": width,
                "SELECTOR_ROW": width,
                "LOGITS_ROW": 2 * _EXPERTS,
                "WIDE": wide,
                "GATE": "softmax",
            }
            blocks = {
                "BLOCK_T": router_operations.TOKENS,
                "BLOCK_E": _EXPERTS,
                "BLOCK_D": router_operations.WIDTH,
                "BLOCK_K": _K,
            }
            n_warps = router_operations.SELECTOR_WARPS if kernel == "route_bwd_selector_kernel" else 4
            return {**sizes, **blocks, "N_EXPERTS": _EXPERTS, "K": _K, "num_warps": n_warps, "num_stages": 3, **FUSION}
        case "sort":
            blocks = {"BLOCK_R": launch.SORT_ROWS, "BLOCK_E": launch.SORT_EXPERTS, "BLOCK_J": launch.SORT_OTHERS}
            return {**blocks, "BLOCK_B": launch.SORT_BLOCKS, "N_EXPERTS": _EXPERTS, "num_warps": 4, "num_stages": 3, **FUSION}
        case "statistics":
            blocks = {"BLOCK_T": statistics_operations.TOKENS, "BLOCK_E": statistics_operations.UNITS, "BLOCK_K": _K}
            blocks |= {"BLOCK_B": statistics_operations.BLOCKS, "BLOCK_M": statistics_operations.HELD, "p_mask": None}
            blocks |= {"BLOCK_R": statistics_operations.ROWS, "LEAST": balance_losses.LEAST_SQUARE}
            return {**blocks, "N_UNITS": _EXPERTS, "N_EXPERTS": _EXPERTS, "K": _K, "num_warps": 4, "num_stages": 3, **FUSION}
        case "balancing":
            blocks = {"BLOCK_T": balancing_operations.TOKENS, "BLOCK_E": 2 * _EXPERTS, "BLOCK_B": balancing_operations.TERMS}
            blocks |= {"BLOCK_R": balancing_operations.QUEUE, "SIGN": 1.0, "FACTOR": 1.25}
            return {**blocks, "N_EXPERTS": _EXPERTS, "num_warps": 4, "num_stages": 3, **FUSION}
        case "choice":
            # Two products of a unit, and every second one survives.
            n = _K * _WIDTHS[True][1]
            sizes = {"N": n, "K": n // 2, "SIZE": n // _K, "PARTS": 2, "BITS": (n // 2).bit_length(), "UNSORTED": True}
            return {**sizes, **launch.row_blocks(n), "num_stages": 3}
        case "bias":
            blocks = {"BLOCK_K": launch.BIAS_ROWS, "BLOCK_N": launch.BIAS_COLUMNS}
            return {**blocks, "N": width, "K": _K, "ROW": width, "num_warps": 4, "num_stages": 3, **FUSION}
        case "parts":
            return {"BLOCK": launch.PART_BLOCK, "num_warps": 4, "num_stages": 3, **FUSION}
        case "tokens":
            tile = tuning.SUM_TILE
            blocks = {"BLOCK_T": tile.m, "BLOCK_D": tile.n, "num_warps": tile.n_warps, "num_stages": tile.n_stages}
            return {"K": _K, "D": width, **blocks, **FUSION}
        case _:
            return {"stride_inner": 1, "stride_grad_inner": 1, **sum_options(tuning.SUM_TILE.n)}


def resource_report(
    *,
    targets: Iterable[str] = tuple(TARGETS),
    kernels: Iterable[str] = KERNELS,
    dtypes: Iterable[str] = tuple(DTYPES),
    aligned: Iterable[bool] = (True, False),
) -> list[dict[str, str | int | bool]]:
    """Compile default configurations and report what they use; one second each.

    Args:
        targets: names from `TARGETS`.
        kernels: names from `KERNELS`.
        dtypes: names from `DTYPES`.
        aligned: True for lines that are copied in pieces of 8 bytes, False for any size.

    Returns:
        A dict for each compilation: `kernel`, `target`, `dtype`, `arithmetic`, `rows` (an expert, at most), `aligned`,
        `gated`, `tile`, `warps`, `stages`, `registers` (of a thread), `spills` (bytes of a thread; registers on gfx942),
        `shared` (bytes of a block), `copies` (asynchronous copies into shared memory; 0 on gfx942).

    Raises:
        UserError: a name is unknown, or the process interprets Triton's kernels instead of compiling them.
    """
    if knobs.runtime.interpret:
        raise UserError("kernels that are interpreted cannot be compiled; fix: unset TRITON_INTERPRET")
    found = []
    for target in targets:
        vendor = vendor_of(target)
        found += [report_build(build, target) for build in default_builds(kernels, dtypes, aligned, vendor)]
    return found


def vendor_of(target: str) -> Vendor:
    """Whose table of tiles a target takes."""
    if target not in TARGETS:
        raise unknown_name("target", target, TARGETS)
    return "hip" if target.startswith("gfx") else "cuda"


def report_build(build: Build, target: str) -> dict[str, str | int | bool]:
    """One row of `resource_report`."""
    is_hip = vendor_of(target) == "hip"
    compiled = compile_build(build, target)
    arguments = _FAMILIES[build.kernel][0].arg_names
    blocks = [str(value) for name, value in build.options.items() if name.startswith("BLOCK") and name in arguments]
    used = _from_amdgcn(compiled.asm["amdgcn"]) if is_hip else _from_cubin(compiled.asm["cubin"])
    return {
        "kernel": build.kernel,
        "target": target,
        "dtype": build.dtype,
        "arithmetic": build.arithmetic,
        "rows": build.rows,
        "aligned": build.aligned,
        "gated": build.gated,
        "tile": "x".join(blocks),
        "warps": build.options["num_warps"],
        "stages": build.options["num_stages"],
        **used,
        "shared": compiled.metadata.shared,
        "copies": 0 if is_hip else compiled.asm["ptx"].count("cp.async.c"),
    }


# A CompiledKernel, whose fields Triton sets when it runs.
def compile_build(build: Build, target: str) -> Any:
    """The compiled kernel, with the types and the alignment that a launch would give it."""
    kernel, _ = _FAMILIES[build.kernel]
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}
    for position, name in enumerate(kernel.arg_names):
        if name in build.options:
            signature[name], constants[name] = "constexpr", build.options[name]
            continue
        # What is ranked is float32.
        wide = name == "p_a" and build.options.get("UNSORTED")
        signature[name] = _argument_type(name, "fp32" if wide else DTYPES[build.dtype])
        if name.startswith("p_"):
            attributes[(position,)] = [["tt.divisibility", 16]]
    options = {name: value for name, value in build.options.items() if name in ("num_warps", "num_stages", *FUSION)}
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=TARGETS[target], options=options)


def _argument_type(name: str, element: str) -> str:
    if name == "scale":
        return "fp32"
    return _POINTERS.get(name, f"*{element}") if name.startswith("p_") else "i32"


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
