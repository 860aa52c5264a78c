"""Which limit stands against each aim of the kernels that a measurement missed, from the same run's speeds of the machine.

    limit    = max(FLOPs / product rate, bytes of touched weights / bandwidth)         nothing can be faster
    in turns = FLOPs / product rate + passes x bytes / scattered bandwidth + writing   what reads, multiplies, then writes takes

`roofline` measures the rates; forward reads the weights once, with the backward twice, and writes their gradients once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from sparseffn.report.formats import fixed, integer
from sparseffn.report.table import Table
from sparseffn.results.bench_result import ExpertsResult, ExpertsTime, LayerResult, LayerTime, Roof

Time = LayerTime | ExpertsTime
Measure = Literal["over dense x K/N_E", "over dense", "over bytes", "times faster"]
_USUAL = "sigma-moe"
_PASSES = {"forward": "forward", "training": "forward + backward"}


@dataclass(frozen=True, kw_only=True)
class Aim:
    """What one time should be: at most `bound`, but for `times faster` at least."""

    shape: str
    dtype: str
    tokens: int
    forward: float | None
    training: float | None = None
    measure: Measure
    label: str = _USUAL
    """Of a layer's row."""

    def value(self, time: Time) -> float:
        """What was measured."""
        if isinstance(time, ExpertsTime):
            return time.over_fastest_hf.times_faster if time.over_fastest_hf else float("nan")
        match self.measure:
            case "over dense x K/N_E":
                return time.over_dense_over_share
            case "over dense":
                return time.over_dense
            case _:
                return time.median_s / time.limit_bytes_s

    def misses(self, value: float, bound: float) -> bool:
        return value < bound if self.measure == "times faster" else value > bound

    def scaled(self, value: float, factor: float) -> float:
        """The value of a time `factor` times as long."""
        return value / factor if self.measure == "times faster" else value * factor


_GATED = ("1024x512x32x8", "2048x1024x64x8")
_MANY: Measure = "over dense x K/N_E"
AIMS: tuple[Aim, ...] = (
    Aim(shape="wt-b", dtype="bfloat16", tokens=1024, forward=1.3, training=1.5, measure=_MANY),
    Aim(shape="wt-b", dtype="bfloat16", tokens=4096, forward=1.3, training=1.5, measure=_MANY),
    Aim(shape="wt-b", dtype="bfloat16", tokens=64, forward=0.3, training=0.5, measure="over dense"),
    Aim(shape="wt-b", dtype="bfloat16", tokens=1, forward=2.5, measure="over bytes"),
    Aim(shape="wt-s", dtype="float32", tokens=1, forward=2.2, measure="over bytes"),
    *(
        Aim(shape="wt-s", dtype="float32", tokens=tokens, forward=0.75, training=0.8, measure="over dense", label="topk k=512")
        for tokens in (1024, 4096)
    ),
    Aim(shape="wt-s", dtype="float32", tokens=1024, forward=0.9, training=0.7, measure="over dense", label="pkm"),
    *(
        Aim(shape=shape, dtype=dtype, tokens=tokens, forward=forward, training=training, measure="times faster")
        for shape in _GATED
        for dtype in ("float32", "bfloat16")
        for tokens, forward, training in ((1, 2.0, None), (8, 2.0, None), (64, 2.0, None), (512, 1.5, 1.5))
    ),
)
"""What was aimed at before the kernels were written, on a processor with AVX512-BF16, 2 threads."""


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """A row's times with what their limits are computed from."""

    aim: Aim
    name: str
    bound: float
    time: Time
    touched_bytes: float
    roof: Roof

    @property
    def scattered_s(self) -> float:
        return self.touched_bytes / self.roof.scattered_bytes_per_s

    @property
    def in_turns_s(self) -> float:
        passes = 2 if self.name == "training" else 1
        return self.time.limit_arithmetic_s + passes * self.scattered_s + self.time.gradient_s

    def cells(self) -> tuple[str, ...]:
        aim, time = self.aim, self.time
        value = aim.value(time)
        ratios = [value, aim.scaled(value, time.limit_s / time.median_s), aim.scaled(value, self.in_turns_s / time.median_s)]
        seconds = (time.median_s, time.limit_arithmetic_s, time.limit_bytes_s, self.scattered_s, time.gradient_s)
        return (
            f"{aim.shape}, {aim.dtype}, {integer(aim.tokens)}{'' if aim.label == _USUAL else f', {aim.label}'}",
            _PASSES[self.name],
            aim.measure,
            *(f"{1e6 * s:,.0f}" for s in seconds),
            f"{self.bound:g}",
            *(fixed(ratio) for ratio in ratios),
        )


def limits_table(layers: Sequence[LayerResult], experts: ExpertsResult) -> Table:
    """A row for each aim that was missed: the time, what its products and bytes take, and its ratio at these limits."""
    missed = [m for aim in AIMS for m in _measured(aim, layers, experts) if aim.misses(aim.value(m.time), m.bound)]
    head = ("shape, type, tokens", "pass", "measure", "us", "products", "bytes", "scattered", "gradients")
    head += ("aim", "measured", "at the limit", "in turns")
    notes = (
        "us: measured; of the products at the measured rate, of one reading of the touched weights in order and from scattered "
        "places, and of writing all gradients. Ratios: aimed at, measured, if the time were its limit (the larger of products "
        "and bytes), and if reading, products and writing took turns.",
    )
    return Table.of(head, (m.cells() for m in missed), n_words=3, notes=notes)


def _measured(aim: Aim, layers: Sequence[LayerResult], experts: ExpertsResult) -> Iterator[_Measured]:
    found = [
        (row, result.roof)
        for result in layers
        for row in result.rows
        if result.settings.dtype == aim.dtype and row.label == aim.label
    ]
    found += [(row, experts.roofs[aim.dtype]) for row in experts.rows if not row.peer and row.dtype == aim.dtype]
    for row, roof in found:
        if (row.shape, row.tokens) != (aim.shape, aim.tokens):
            continue
        for name, bound, time in (("forward", aim.forward, row.forward), ("training", aim.training, row.training)):
            if bound is not None and time is not None:
                yield _Measured(aim=aim, name=name, bound=bound, time=time, touched_bytes=row.touched_bytes, roof=roof)
