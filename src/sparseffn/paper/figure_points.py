"""The points of figures 2 and 8 to 11 of arXiv 2310.10837, measured one by one into a JSON file that figures are drawn from.

Time is that of forward and backward, dense and mixture interleaved; memory is what is saved for backward plus the output, as
the authors measured. Cheap points come first. A point that does not fit the time that is left, or half of the memory, is left
out and said to be. The file is written after every point, and points that it holds are not measured again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import msgspec

from sparseffn.bench.benchmark import benchmark
from sparseffn.bench.candidates import DENSE, Candidate, Progress, Setting, no_progress
from sparseffn.bench.layer import fields_of, limited_times
from sparseffn.bench.machine import head, memory_bytes
from sparseffn.bench.memory import kept_by
from sparseffn.bench.roofline import highest, measure_roof
from sparseffn.bench.timing import Clock, ratio
from sparseffn.errors import UserError
from sparseffn.ffn.dense import DenseConfig
from sparseffn.ffn.sigma_moe import SigmaMoEConfig
from sparseffn.results.bench_result import (
    AbsentPoint,
    FigureLayer,
    FigurePoint,
    FigureSettings,
    FiguresResult,
    FigureSweep,
    FigureTime,
    LayerSettings,
    Roof,
)
from sparseffn.storage import read, rounded, write_json

MOE = "sigma-moe"
# Of the environment, what must be the same for points to stand in one figure.
_SAME_MACHINE = ("cpu", "device", "threads", "torch", "blas", "cpu_capability")
# Rounds that warm up.
_WARMUP = 2
# Part of the roof's speed at which a point's time is predicted; the blocks reach more.
_PREDICTED_SPEED = 0.5
# Seconds that the correctness check of a point takes at the least, parameters and truth included.
_CHECK_S = 2.0
# Part of the machine's memory that a point may take.
_MEMORY_SHARE = 0.5


_K = 4


@dataclass(frozen=True)
class Sweep:
    """One figure: time and memory of one layer over one size."""

    number: int
    variable: str
    values: tuple[int, ...]
    fixed: str
    """What is held fixed, for the caption."""
    mixture: Callable[[int], SigmaMoEConfig]
    """The mixture at a value; the dense block has as many channels."""

    def blocks(self, value: int) -> tuple[DenseConfig, SigmaMoEConfig]:
        mixture = self.mixture(value)
        return DenseConfig(d_model=mixture.d_model, d_ff=mixture.n_channels), mixture


def _mixture(d_model: int, n_experts: int, expert_size: int) -> SigmaMoEConfig:
    return SigmaMoEConfig(d_model=d_model, n_experts=n_experts, expert_size=expert_size, k=_K)


_WIDTHS = (256, 512, 1024, 2048, 4096)
_ALL = (
    Sweep(2, "d_model", _WIDTHS, "d_ff = 4 d_model, G = 128, N_E = d_ff / G, K = 4", lambda d: _mixture(d, 4 * d // 128, 128)),
    Sweep(8, "d_model", _WIDTHS, "d_ff = 4 d_model, N_E = 32, G = d_ff / N_E, K = 4", lambda d: _mixture(d, 32, 4 * d // 32)),
    Sweep(9, "N_E", (8, 16, 32, 64, 128, 256), "d_model = 512, G = 128, d_ff = G N_E, K = 4", lambda n: _mixture(512, n, 128)),
    Sweep(10, "G", (64, 128, 256, 512, 1024), "d_model = 512, N_E = 32, d_ff = G N_E, K = 4", lambda g: _mixture(512, 32, g)),
    Sweep(11, "d_model", (128, 256, 512, 1024, 2048), "N_E = 32, G = 128, d_ff = 4096, K = 4", lambda d: _mixture(d, 32, 128)),
)
SWEEPS = {sweep.number: sweep for sweep in _ALL}


@dataclass(frozen=True, kw_only=True)
class Point:
    sweep: Sweep
    value: int

    @property
    def names(self) -> dict[str, int]:
        """In the file."""
        return {"figure": self.sweep.number, "value": self.value}

    def flops(self, n_tokens: int) -> int:
        """Of forward and backward of both blocks."""
        return 3 * n_tokens * sum(config.forward_flops(training=True) for config in self.sweep.blocks(self.value))

    def bytes(self, n_tokens: int, itemsize: int) -> int:
        """Of parameters, gradients and activations of both blocks, and of the truths in float64 that they are held against."""
        blocks = self.sweep.blocks(self.value)
        params = sum(config.num_params() for config in blocks)
        truth = 8 * (2 * params + max(config.num_params() for config in blocks))
        return params * 2 * itemsize + truth + 4 * itemsize * n_tokens * blocks[0].d_ff


def points_of(numbers: Sequence[int]) -> list[Point]:
    """Every point of the figures.

    Raises:
        UserError: a figure is not one of the paper's figures of time and memory.
    """
    for number in numbers:
        if number not in SWEEPS:
            known = ", ".join(map(str, SWEEPS))
            raise UserError(f"`--figures` must be among {known}; got {number}; fix: --figures {known.replace(',', '')}")
    return [Point(sweep=SWEEPS[number], value=value) for number in dict.fromkeys(numbers) for value in SWEEPS[number].values]


@final
class FigureFile:
    """The JSON file: opened for one machine and setting, written after every point."""

    def __init__(self, path: Path, fresh: FiguresResult) -> None:
        self.path = path
        self.data = _continued(path, fresh) if path.exists() else fresh

    def holds(self, point: Point) -> bool:
        """Whether a point is there, or its blocks are, under another figure; then it is added."""
        if any((known.figure, known.value) == (point.sweep.number, point.value) for known in self.data.points):
            return True
        twin = next((known for known in self.data.points if known.blocks == _blocks_json(point)), None)
        if twin is not None:
            self.add(msgspec.structs.replace(twin, **point.names))
        return twin is not None

    def add(self, measured: FigurePoint) -> None:
        self._change(points=(*self.data.points, measured))
        self.write()

    def leave_out(self, point: Point, limit: str, reason: str) -> None:
        """Note why a point is not there: which limit, and by how much."""
        left = AbsentPoint(**point.names, variable=point.sweep.variable, limit=limit, reason=reason)
        self._change(left_out=(*self.data.left_out, left))

    def forget_left_out(self, numbers: Sequence[int]) -> None:
        """What did not fit before may fit now."""
        self._change(left_out=tuple(left for left in self.data.left_out if left.figure not in numbers))

    def write(self) -> None:
        write_json(self.path, rounded(self.data))

    def _change(self, **fields: tuple[Any, ...]) -> None:
        ordered = {name: tuple(sorted(entries, key=lambda e: (e.figure, e.value))) for name, entries in fields.items()}
        self.data = msgspec.structs.replace(self.data, **ordered)


def _continued(path: Path, fresh: FiguresResult) -> FiguresResult:
    """The file's points, if they are of the same machine and setting.

    Raises:
        UserError: they are not, or the file is damaged.
    """
    found = read(path, FiguresResult, fix="choose another --out")
    pairs = [(name, getattr(found.settings, name), getattr(fresh.settings, name)) for name in FigureSettings.__struct_fields__]
    pairs += [(name, getattr(found.environment, name), getattr(fresh.environment, name)) for name in _SAME_MACHINE]
    different = [f"`{name}` is {old!r}, not {new!r}" for name, old, new in pairs if old != new]
    if different:
        raise UserError(
            f"`--out` must hold no figures or those of this machine and setting; got {path}, where "
            f"{'; '.join(different[:3])}; fix: choose another --out, or the same settings"
        )
    return msgspec.structs.replace(found, figures=tuple(sorted({*found.figures, *fresh.figures})))


def bench_figures(
    numbers: Sequence[int],
    settings: LayerSettings,
    path: Path,
    *,
    time_limit_s: float,
    progress: Progress = no_progress,
    clock: Clock = time.monotonic,
) -> FiguresResult:
    """Measure what the file lacks of the figures and what fits; returns what it then holds.

    Args:
        numbers: of figures.
        settings: one number of tokens; dtype, device, rounds and one backend.
        path: the file, new or of the same machine and settings.
        time_limit_s: for all points together.
        progress: receives what is being done.
        clock: seconds, for the time limit.

    Raises:
        UserError: an unknown figure; a file of another machine or setting; a wrong kernel.
    """
    start = clock()
    points = points_of(numbers)
    setting = Setting.of(settings, settings.tokens[0])
    fresh = FiguresResult(
        **head(setting.device),
        settings=FigureSettings(
            tokens=setting.n_tokens,
            dtype=settings.dtype,
            device=setting.device.type,
            backend=settings.backends[0],
            rounds=settings.rounds,
        ),
        figures=tuple(sorted(set(numbers))),
        sweeps={str(n): FigureSweep(variable=s.variable, values=s.values, fixed=s.fixed) for n, s in SWEEPS.items()},
        points=(),
        left_out=(),
    )
    file = FigureFile(path, fresh)
    file.forget_left_out(numbers)
    roof = measure_roof(setting.dtype, setting.device)
    for point in sorted(points, key=lambda p: p.flops(setting.n_tokens)):
        if file.holds(point):
            continue
        reason = _reason_to_leave_out(point, setting, settings.rounds, roof, left_s=time_limit_s - (clock() - start))
        if reason is not None:
            file.leave_out(point, *reason)
            continue
        progress(f"figure {point.sweep.number}, {point.sweep.variable} {point.value}")
        file.add(_measure(point, settings, roof))
    file.write()
    return file.data


def _reason_to_leave_out(point: Point, setting: Setting, rounds: int, roof: Roof, *, left_s: float) -> tuple[str, str] | None:
    """Which limit a point does not fit and how it was judged, or None."""
    memory = memory_bytes(setting.device)
    needed = point.bytes(setting.n_tokens, setting.dtype.itemsize)
    if needed > _MEMORY_SHARE * memory:
        return "half of the memory", f"would need {needed / 2**30:.0f} of {memory / 2**30:.0f} GiB"
    # A forward is a third of forward and backward.
    calls = (rounds + _WARMUP) * 4 / 3
    seconds = _CHECK_S + calls * point.flops(setting.n_tokens) / (_PREDICTED_SPEED * roof.flops_per_s)
    if seconds > left_s:
        return "time limit", f"would take about {seconds:.0f} s, {max(left_s, 0):.0f} s were left"
    return None


def _measure(point: Point, settings: LayerSettings, roof: Roof) -> FigurePoint:
    """Correctness, time and memory of one point."""
    setting = Setting.of(settings, settings.tokens[0])
    dense, mixture = point.sweep.blocks(point.value)
    candidates = [Candidate(label=DENSE, config=dense), Candidate(label=MOE, config=mixture, backend=settings.backends[0])]
    done = benchmark(candidates, setting, rounds=settings.rounds, cold_tokens=0)
    kept = {c.label: kept_by(c, setting) for c in candidates}
    # The machine may have been busy when it was measured before the points.
    roof = highest(roof, measure_roof(setting.dtype, setting.device))
    layers = {}
    for c in candidates:
        over = {} if c.label == DENSE else {name: ratio(times, MOE, DENSE) for name, times in done.times.items()}
        limited = limited_times(c, done, setting, roof)
        times = {name: FigureTime(**fields_of(timed), over_dense=over.get(name)) for name, timed in limited.items()}
        layers[c.label] = FigureLayer(
            forward=times["forward"],
            training=times["training"],
            **kept[c.label],
            memory_bytes=sum(kept[c.label][f"{part}_bytes"] for part in ("saved", "selection", "output")),
            gradient_bytes=c.config.num_params() * setting.dtype.itemsize,
        )
    return FigurePoint(**point.names, variable=point.sweep.variable, blocks=_blocks_json(point), layers=layers)


def _blocks_json(point: Point) -> dict[str, Any]:
    dense, mixture = point.sweep.blocks(point.value)
    return {DENSE: dense.to_json(), MOE: mixture.to_json()}
