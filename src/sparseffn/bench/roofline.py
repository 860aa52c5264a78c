"""How fast this machine multiplies matrices and reads memory: two roofs, and the limits of every layer under them.

    limit = max(FLOPs / measured matrix-product speed, bytes of touched weights / measured bandwidth)

FLOPs count the selector; backward is twice the forward. Forward and backward together also write every weight gradient, those
of experts without tokens too; its time stands beside the limit and is not part of it.

Matrix products: square ones, by PyTorch and our selector's kernel, and the two products of one expert by the experts' kernel,
with matrices that stay in the caches; the fastest of all counts, as a layer may use any. Bandwidth: reading once through at
least four times the last-level cache, as a matrix-vector product and as a sum. Everywhere the best call counts, not the median:
a low roof would flatter every layer under it. Beside the bandwidth stands what is left of it where a few blocks of the size of
an expert are read from scattered places, which is all that one token asks for: no limit, but what to expect of few tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from sparseffn import ops
from sparseffn.accounting import BACKWARD_OVER_FORWARD
from sparseffn.bench.candidates import DENSE, DTYPES, Progress, Shape, no_progress
from sparseffn.bench.machine import clock_of, head, last_level_cache_bytes, memory_bytes
from sparseffn.devices import find_device
from sparseffn.ffn import FeedForward, FFNConfig
from sparseffn.results.bench_result import (
    LayerSettings,
    Limit,
    MachineSpeed,
    ProductSpeed,
    ReadingSpeed,
    Roof,
    RooflineResult,
    RooflineRow,
    Scattered,
)

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


def measure_roof(dtype: torch.dtype, device: torch.device) -> Roof:
    """All speeds with the threads that are set."""
    reading = bandwidth(device)
    return _roof(product_speed(dtype, device), reading)


def _roof(product: ProductSpeed, reading: ReadingSpeed) -> Roof:
    return Roof(
        flops_per_s=product.flops_per_s,
        bytes_per_s=reading.bytes_per_s,
        scattered_bytes_per_s=reading.scattered.bytes_per_s,
    )


def highest(roof: Roof, other: Roof) -> Roof:
    """The better of two measurements of one machine: what slowed the other one was not the machine."""
    return Roof(**{name: max(getattr(roof, name), getattr(other, name)) for name in Roof.__struct_fields__})


def product_speed(dtype: torch.dtype, device: torch.device) -> ProductSpeed:
    """FLOPs a second of the fastest matrix product, its shape, and whose it is."""
    clock, found = clock_of(device), []

    def time_product(shape: str, how: str, flops: int, call: Callable[[], object]) -> float:
        seconds = _best(call, clock)
        found.append(ProductSpeed(shape=shape, how=how, seconds=seconds, flops_per_s=flops / seconds))
        return seconds

    with torch.inference_mode():
        for n_tokens, d_model, size in _EXPERTS[device.type]:
            call = _expert_product(n_tokens, d_model, size, dtype, device)
            time_product(f"{n_tokens:,} x {d_model:,} x {size}", "experts", 4 * n_tokens * d_model * size, call)
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
    return max(found, key=lambda product: product.flops_per_s)


def _expert_product(n_tokens: int, d_model: int, size: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    """Both products of one expert that every token chooses, by the kernel that the layers run."""
    x, keys, values = (
        torch.randn(*sizes, device=device).to(dtype) for sizes in ((n_tokens, d_model), (1, d_model, size), (1, size, d_model))
    )
    gates = torch.ones(n_tokens, 1, device=device)
    chosen = torch.zeros(n_tokens, 1, dtype=torch.int64, device=device)
    return lambda: ops.experts(x, keys, values, gates, chosen, activation="identity")


def bandwidth(device: torch.device) -> ReadingSpeed:
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
    speed = matrix.nbytes / seconds[how]
    scattered = _scattered(matrix, clock)
    return ReadingSpeed(bytes=matrix.nbytes, how=how, seconds=seconds[how], bytes_per_s=speed, scattered=scattered)


def _scattered(matrix: Tensor, clock: Callable[[], float]) -> Scattered:
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

    block = _BLOCK_ROWS * matrix[0].nbytes
    return Scattered(block_bytes=block, blocks=_BLOCKS, bytes_per_s=n_blocks * block / _best(read_all, clock))


def measure_all(dtypes: Sequence[str], device: torch.device) -> list[MachineSpeed]:
    """Speeds with one thread and with all, for each dtype."""
    rows = []
    counts = [torch.get_num_threads()] if device.type == "cuda" else sorted({1, torch.get_num_threads()})
    for n_threads in counts:
        with using_threads(n_threads):
            reading = bandwidth(device)
            for name in dtypes:
                product = product_speed(DTYPES[name], device)
                rows.append(MachineSpeed(threads=n_threads, dtype=name, product=product, reading=reading))
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


def limit(config: FFNConfig, roof: Roof, *, n_tokens: int, touched_bytes: float, itemsize: int, training: bool) -> Limit:
    """The limit of a forward, or of a forward with its backward."""
    flops = n_tokens * config.forward_flops(training=training) * (1 + BACKWARD_OVER_FORWARD if training else 1)
    arithmetic_s, bytes_s = flops / roof.flops_per_s, touched_bytes / roof.bytes_per_s
    return Limit(
        arithmetic_s=arithmetic_s,
        bytes_s=bytes_s,
        gradient_s=config.num_params() * itemsize / roof.bytes_per_s if training else 0.0,
        limit_s=max(arithmetic_s, bytes_s),
    )


def touched_bytes(layer: FeedForward, x: Tensor) -> int:
    """Bytes of the parameters that a batch needs: all but the pairs of units that no token selected."""
    _, stats = layer.eval()(x, return_stats=True)
    return weight_bytes(layer.config, n_unused=int((stats.counts == 0).sum()), n_units=len(stats.counts), itemsize=x.itemsize)


def weight_bytes(config: FFNConfig, *, n_unused: int, n_units: int, itemsize: int) -> int:
    """Bytes of the parameters without those of unused units; the dense block computes all, zero or not."""
    pairs = 0 if config.active_channels >= config.n_channels else n_unused * config.n_channels // n_units
    return int(_bytes_without(config, pairs, itemsize))


def expected_bytes(config: FFNConfig, *, n_tokens: int, itemsize: int) -> float:
    """The same for tokens that choose their units evenly and independently, in expectation."""
    share = min(1.0, config.active_channels / config.n_channels)
    return _bytes_without(config, (1 - share) ** n_tokens * config.n_channels, itemsize)


def _bytes_without(config: FFNConfig, pairs: float, itemsize: int) -> float:
    """Bytes of the parameters without those of some pairs."""
    return (config.num_params() - pairs * config.rows_per_pair * config.d_model) * itemsize


def bench_roofline(shapes: Sequence[Shape], settings: LayerSettings, *, progress: Progress = no_progress) -> RooflineResult:
    """Measured speeds, and what they allow each block at each number of tokens, without timing any block.

    Tokens are taken to choose their units evenly; `bench layer` counts what its tokens touch.

    Raises:
        UserError: the device is not there.
    """
    device = find_device(settings.device)
    progress("measuring matrix products and bandwidth, with one thread and with all")
    # PyTorch multiplies float16 very slowly on many CPUs; whoever asks for it waits.
    names = ("float32", "bfloat16", *(["float16"] if settings.dtype == "float16" or device.type == "cuda" else []))
    speeds = measure_all(names, device)
    own = next(s for s in speeds if s.threads == torch.get_num_threads() and s.dtype == settings.dtype)
    roof, itemsize = _roof(own.product, own.reading), DTYPES[settings.dtype].itemsize

    def row(shape: str, label: str, config: FFNConfig, n_tokens: int) -> RooflineRow:
        touched = expected_bytes(config, n_tokens=n_tokens, itemsize=itemsize)
        call = partial(limit, config, roof, n_tokens=n_tokens, touched_bytes=touched, itemsize=itemsize)
        forward, training = call(training=False), call(training=True)
        return RooflineRow(shape=shape, label=label, tokens=n_tokens, touched_bytes=touched, forward=forward, training=training)

    blocks = [(shape.name, *block) for shape in shapes for block in {DENSE: shape.dense, **shape.methods}.items()]
    return RooflineResult(
        **head(device),
        settings=msgspec.structs.replace(settings, device=device.type),
        speeds=tuple(speeds),
        rows=tuple(row(*block, n_tokens) for block in blocks for n_tokens in settings.tokens),
    )
