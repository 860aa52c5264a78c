"""Which tile is fastest in every launch of a layer? Times a grid of tiles where the kernels pick theirs.

    python -m sparseffn.bench.kernel_tiles OUT.json [--device cuda] [--dtype bfloat16] [--shapes D,G,E,K,T ...] [--limit 420]

A part of `make gpu`; what it finds goes into the table of `ops/triton/tuning.py`, by hand.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch
import tyro

from sparseffn.bench.candidates import DTYPES, print_progress
from sparseffn.bench.machine import head
from sparseffn.devices import Precision, find_device
from sparseffn.ops.triton import tuning
from sparseffn.ops.triton.tuning import Situation, Tile
from sparseffn.results.gpu_result import TilesResult, TileTimes
from sparseffn.storage import write_json

_SHAPES = ("512,128,16,4,8192", "512,128,16,4,1024", "1024,128,32,4,8192", "412,128,16,4,8192", "512,32,64,16,8192")

# Tiles that compile for sm_90 without spilling registers, and their neighbours: m, n, k, warps, stages.
_GRIDS = {
    "product": (
        (32, 128, 64, 4, 3), (64, 64, 64, 4, 3), (64, 64, 64, 4, 4), (64, 128, 32, 4, 4), (64, 128, 64, 4, 3),
        (64, 128, 64, 4, 4), (64, 256, 64, 8, 3), (128, 64, 64, 4, 3), (128, 64, 64, 8, 3), (128, 128, 32, 8, 4),
        (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 256, 64, 8, 3), (64, 128, 128, 4, 2), (128, 32, 64, 4, 3),
        (64, 32, 64, 4, 3),
    ),
    "gated": (
        (32, 64, 64, 4, 4), (64, 64, 32, 4, 4), (64, 64, 64, 4, 3), (64, 64, 64, 8, 3), (64, 128, 32, 8, 4),
        (64, 128, 64, 8, 3), (128, 64, 32, 8, 4), (128, 64, 64, 8, 3), (128, 128, 32, 8, 3), (128, 32, 64, 8, 3),
    ),
    "hidden": (
        (32, 64, 64, 4, 4), (64, 64, 64, 4, 4), (64, 64, 64, 8, 4), (64, 128, 64, 8, 3), (64, 128, 64, 8, 4),
        (128, 64, 64, 8, 3), (128, 128, 64, 8, 3), (128, 32, 64, 8, 3),
    ),
    "outer": (
        (64, 64, 32, 4, 5), (64, 64, 64, 4, 3), (64, 64, 64, 4, 5), (64, 128, 32, 4, 5), (64, 128, 64, 4, 5),
        (128, 64, 64, 4, 5), (128, 128, 32, 8, 5), (128, 128, 64, 8, 3), (128, 128, 64, 8, 5), (32, 128, 64, 4, 5),
    ),
    "ieee": (
        (32, 64, 32, 4, 2), (64, 64, 32, 4, 2), (64, 64, 32, 8, 2), (128, 64, 16, 8, 2), (64, 128, 16, 8, 2),
        (128, 128, 16, 8, 2), (64, 64, 16, 4, 3),
    ),
}  # fmt: skip


class Sweep:
    """Stands in for `tuning.pick_tile`: times every tile of a grid, keeps the times, and takes the fastest."""

    def __init__(self, result: TilesResult, out: Path, *, limit_s: float, most: int | None) -> None:
        self.result, self.out, self.most = result, out, most
        self.stop_at = time.monotonic() + limit_s
        self.shape = ""

    def pick(self, situation: Situation, run: Callable[[Tile], object]) -> Tile:
        """The fastest tile that compiles; the shipped one once the time is over."""
        shipped = tuning.default_tile(situation.family, situation.kind, situation.bucket, situation.aligned, tuning.vendor())
        grid = _GRIDS["ieee" if situation.kind == "ieee" else situation.family][: self.most]
        us: dict[str, float | None] = {}
        best = (float("inf"), shipped)
        for tile in dict.fromkeys((shipped, *(Tile(*sizes) for sizes in grid))):
            if time.monotonic() > self.stop_at:
                break
            name = f"{tile.m}x{tile.n}x{tile.k} w{tile.n_warps} s{tile.n_stages}"
            try:
                us[name] = _microseconds(lambda tile=tile: run(tile), situation.device)
            except Exception as error:
                print_progress(f"{situation.kernel} {name}: {type(error).__name__}")
                us[name] = None
                continue
            best = min(best, (us[name] or 0.0, tile), key=lambda pair: pair[0])
        times = TileTimes(
            shape=self.shape,
            kernel=situation.kernel,
            kind=situation.kind,
            bucket=situation.bucket,
            aligned=situation.aligned,
            us=us,
        )
        self.result = msgspec.structs.replace(self.result, kernels=(*self.result.kernels, times))
        write_json(self.out, self.result)
        print_progress(f"{self.shape} {situation.kernel}: {us}")
        return best[1]


def bench_tiles(
    out: Path,
    *,
    device: str = "cuda",
    dtype: Precision = "bfloat16",
    shapes: tuple[str, ...] = _SHAPES,
    limit: float = 440.0,
    most: int | None = None,
) -> None:
    """Time the tiles of every launch of a forward and a backward; the file is written after every launch.

    Args:
        out: the file.
        device: a GPU; on the CPU Triton must interpret.
        dtype: of weights and tokens.
        shapes: `d_model,expert_size,n_experts,k,tokens`.
        limit: after so many seconds shipped tiles are taken untimed.
        most: of each grid, for a rehearsal.
    """
    place = find_device(device)
    sweep = Sweep(TilesResult(**head(place), dtype=dtype, kernels=()), out, limit_s=limit, most=most)
    picks = tuning.pick_tile
    tuning.pick_tile = sweep.pick
    try:
        for shape in shapes:
            sweep.shape = shape
            _layer(shape, DTYPES[dtype], place)
    finally:
        tuning.pick_tile = picks


def _microseconds(call: Callable[[], object], device: torch.device) -> float:
    """Median of a launch; a single interpreted one on the CPU."""
    if device.type == "cpu":
        start = time.perf_counter()
        call()
        return round(1e6 * (time.perf_counter() - start), 2)
    from triton.testing import do_bench

    return round(1e3 * float(do_bench(call, warmup=5, rep=25, return_mode="median")), 2)  # pyright: ignore[reportArgumentType]


def _layer(shape: str, dtype: torch.dtype, device: torch.device) -> None:
    """One forward and backward of the experts, plain and gated, every launch of which picks a tile."""
    from sparseffn.ops.triton import operations

    d, g, e, k, t = map(int, shape.split(","))
    torch.manual_seed(0)
    sizes = ((t, d), (e, d, g), (e, g, d), (e, d, g))
    x, keys, values, gate_keys = (torch.randn(*size, device=device).to(dtype) for size in sizes)
    gates, indices = torch.rand(t, k, device=device), torch.rand(t, e, device=device).topk(k, dim=1).indices
    for gate, activation in ((None, "relu"), (gate_keys, "silu")):
        # Called as the dispatcher calls them; interpreted kernels take the CPU's tensors no other way.
        arguments = (x, keys, values, gates, indices, gate, None, None, None, None, 1.0, activation, 1.0, 1.0, None)
        y, *kept = operations.experts_kept(*arguments)
        operations.experts_backward(torch.randn_like(y), *arguments, *kept)


if __name__ == "__main__":
    tyro.cli(bench_tiles, config=(tyro.conf.PositionalRequiredArgs,))
