"""The points of the paper's figures, measured one by one into a JSON file that the figures are drawn from.

Time is that of forward and backward, dense and mixture interleaved; memory is what is saved for backward plus the output, as
the authors measured. Cheap points come first. A point that does not fit the time that is left, or half of the memory, is left
out and said to be. The file is written after every point, and points that it holds are not measured again.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from sparseffn.bench.candidates import Candidate
from sparseffn.bench.head import result
from sparseffn.bench.layer import DENSE, DTYPES, LayerSettings, over_limits
from sparseffn.bench.machine import find_device, memory_bytes
from sparseffn.bench.memory import kept_by
from sparseffn.bench.race import Race, Say, race
from sparseffn.bench.roofline import Roof
from sparseffn.bench.sweeps import SWEEPS, Sweep
from sparseffn.bench.timing import Clock, ratio, spread
from sparseffn.errors import UserError
from sparseffn.storage import Kind, read_fields, write_json

MOE = "sigma-moe"
# Of the environment, what must be the same for points to stand in one figure.
_SAME_MACHINE = ("cpu", "device", "threads", "torch", "blas", "cpu_capability")
# Rounds that warm up.
_WARMUP = 2
# Part of the roof's speed at which a point's time is predicted; the blocks reach more.
_PREDICTED_SPEED = 0.5
# Seconds that the gate of a point takes at the least, parameters and truth included.
_GATE_S = 2.0
# Part of the machine's memory that a point may take.
_MEMORY_SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class Point:
    """One place in one figure."""

    sweep: Sweep
    value: int

    @property
    def names(self) -> dict[str, int]:
        """As the file names it."""
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


_FIELDS = {
    "settings": Kind.OBJECT,
    "environment": Kind.OBJECT,
    "figures": Kind.LIST,
    "points": Kind.LIST,
    "left_out": Kind.LIST,
}


@final
class FigureFile:
    """The JSON file: opened for one machine and setting, written after every point."""

    def __init__(self, path: Path, fresh: dict[str, Any]) -> None:
        self.path = path
        self.data = fresh
        if path.exists():
            self.data = self._continued(fresh)

    def _continued(self, fresh: dict[str, Any]) -> dict[str, Any]:
        """The file's points, if they are of the same machine and setting.

        Raises:
            UserError: they are not, or the file is damaged.
        """
        fix = "choose another --out"
        if read_fields(self.path, {"kind": Kind.TEXT}, fix=fix)["kind"] != "figures":
            raise UserError(f"{self.path} must be a file of `bench figures`; got another one; fix: choose another --out")
        found = read_fields(self.path, _FIELDS, fix=fix)
        pairs = [(f"`{key}`", found["settings"].get(key), value) for key, value in fresh["settings"].items()]
        pairs += [(f"`{key}`", found["environment"].get(key), fresh["environment"][key]) for key in _SAME_MACHINE]
        different = [f"{name} is {old!r}, not {new!r}" for name, old, new in pairs if old != new]
        if different:
            raise UserError(
                f"`--out` must hold no figures or those of this machine and setting; got {self.path}, where "
                f"{'; '.join(different[:3])}; fix: choose another --out, or the same settings"
            )
        return {**found, "figures": sorted({*found["figures"], *fresh["figures"]})}

    def holds(self, point: Point) -> bool:
        """Whether a point is there, or its blocks are, under another figure; then it is added."""
        if any(point.names.items() <= known.items() for known in self.data["points"]):
            return True
        blocks = _blocks_json(point)
        twin = next((known for known in self.data["points"] if known["blocks"] == blocks), None)
        if twin is not None:
            self.add({**twin, **point.names})
        return twin is not None

    def add(self, measured: dict[str, Any]) -> None:
        """Write a point."""
        self.data["points"].append(measured)
        self.write()

    def leave_out(self, point: Point, limit: str, reason: str) -> None:
        """Note why a point is not there: which limit, and by how much."""
        left = {**point.names, "variable": point.sweep.variable, "limit": limit, "reason": reason}
        self.data["left_out"].append(left)

    def write(self) -> None:
        """The whole file, points in order."""
        for name in ("points", "left_out"):
            self.data[name].sort(key=lambda entry: (entry["figure"], entry["value"]))
        write_json(self.path, self.data)


def bench_figures(
    numbers: Sequence[int],
    settings: LayerSettings,
    path: Path,
    *,
    time_limit_s: float,
    say: Say = lambda text: None,
    clock: Clock = time.monotonic,
) -> dict[str, Any]:
    """Measure what the file lacks of the figures and what fits.

    Args:
        numbers: of figures.
        settings: one number of tokens; dtype, device, rounds and one backend.
        path: the file, new or of the same machine and settings.
        time_limit_s: for all points together.
        say: told what is being done.
        clock: seconds, for the time limit.

    Returns:
        What the file then holds.

    Raises:
        UserError: an unknown figure; a file of another machine or setting; a wrong kernel.
    """
    start = clock()
    points = points_of(numbers)
    device = find_device(settings.device)
    described = {
        "tokens": settings.tokens[0],
        "dtype": settings.dtype,
        "device": settings.device,
        "backend": settings.backends[0],
        "rounds": settings.rounds,
    }
    figures = {"figures": sorted(set(numbers)), "sweeps": _described_sweeps(), "points": [], "left_out": []}
    file = FigureFile(path, result("figures", device, described, **figures))
    # What did not fit before may fit now.
    file.data["left_out"] = [left for left in file.data["left_out"] if left["figure"] not in numbers]
    roof = Roof.measure(DTYPES[settings.dtype], device)
    for point in sorted(points, key=lambda p: p.flops(settings.tokens[0])):
        if file.holds(point):
            continue
        reason = _reason_to_leave_out(point, settings, roof, left_s=time_limit_s - (clock() - start))
        if reason is not None:
            file.leave_out(point, *reason)
            continue
        say(f"figure {point.sweep.number}, {point.sweep.variable} {point.value}")
        file.add(_measure(point, settings, roof))
    file.write()
    return file.data


def _reason_to_leave_out(point: Point, settings: LayerSettings, roof: Roof, *, left_s: float) -> tuple[str, str] | None:
    """Which limit a point does not fit and how it was judged, or None."""
    n_tokens, itemsize = settings.tokens[0], DTYPES[settings.dtype].itemsize
    memory = memory_bytes(find_device(settings.device))
    needed = point.bytes(n_tokens, itemsize)
    if needed > _MEMORY_SHARE * memory:
        return "half of the memory", f"would need {needed / 2**30:.0f} of {memory / 2**30:.0f} GiB"
    # A forward is a third of forward and backward.
    calls = (settings.rounds + _WARMUP) * 4 / 3
    seconds = _GATE_S + calls * point.flops(n_tokens) / (_PREDICTED_SPEED * roof.flops_per_s)
    if seconds > left_s:
        return "time limit", f"would take about {seconds:.0f} s, {max(left_s, 0):.0f} s were left"
    return None


def _measure(point: Point, settings: LayerSettings, roof: Roof) -> dict[str, Any]:
    """Gate, time and memory of one point."""
    setting = settings.setting(settings.tokens[0])
    dense, mixture = point.sweep.blocks(point.value)
    candidates = [
        Candidate(label=DENSE, config=dense),
        Candidate(label=MOE, config=mixture, backend=settings.backends[0]),
    ]
    done = race(candidates, setting, rounds=settings.rounds, cold_tokens=0)
    layers = {c.label: _layer(c, done, kept_by(c, setting), settings.dtype) for c in candidates}
    # The machine may have been busy when it was measured before the points.
    roof = roof.highest(Roof.measure(setting.dtype, setting.device))
    for c in candidates:
        for name, limits in over_limits(c, done, setting, roof).items():
            layers[c.label][name] |= limits
    for name, times in (("forward", done.forward), ("training", done.training)):
        layers[MOE][name]["over_dense"] = ratio(times, MOE, DENSE)
    return {**point.names, "variable": point.sweep.variable, "blocks": _blocks_json(point), "layers": layers}


def _layer(candidate: Candidate, done: Race, kept: dict[str, int], dtype: str) -> dict[str, Any]:
    """One side of a point; memory is what the authors measured."""
    return {
        "forward": dataclasses.asdict(spread(done.forward[candidate.label])),
        "training": dataclasses.asdict(spread(done.training[candidate.label])),
        "memory_bytes": kept["saved_bytes"] + kept["selection_bytes"] + kept["output_bytes"],
        **kept,
        "gradient_bytes": candidate.config.num_params() * DTYPES[dtype].itemsize,
    }


def _blocks_json(point: Point) -> dict[str, Any]:
    dense, mixture = point.sweep.blocks(point.value)
    return {DENSE: dense.to_json(), MOE: mixture.to_json()}


def _described_sweeps() -> dict[str, Any]:
    return {
        str(number): {"variable": sweep.variable, "values": list(sweep.values), "fixed": sweep.fixed}
        for number, sweep in SWEEPS.items()
    }
