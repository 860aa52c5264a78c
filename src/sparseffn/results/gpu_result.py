"""Results of `make gpu`: one file for each part, with what was measured and how its command ended."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from sparseffn.results.bench_result import FiguresResult, Head, LayerResult, Record, StepResult
from sparseffn.storage import read


class TritonCase(Record, frozen=True, kw_only=True):
    name: str
    message: str


class CasesResult(Head, frozen=True, kw_only=True, tag="cases"):
    """The cases of the Triton tests, run on the device; only what went wrong is listed."""

    n_cases: int
    n_run: int
    """Less than `n_cases` where the time limit came first."""
    wrong: tuple[TritonCase, ...]
    restarts: int
    """How often a worker was started again, as it had lost the device."""
    interpreted: bool = False
    """Whether Triton's interpreter ran them, on the CPU."""


class LaunchRow(Record, frozen=True, kw_only=True):
    """How a layer keeps the device busy; times are None where they could not be measured."""

    d_model: int
    n_experts: int
    tokens: int
    label: str
    forward_us: float | None
    """Calls back to back, one synchronisation at the end."""
    training_us: float | None
    forward_issued_us: float | None
    """Of that, until the host had issued the work."""
    training_issued_us: float | None
    forward_graph_us: float | None = None
    """The same call captured in a CUDA graph and replayed: without the host."""
    training_graph_us: float | None = None
    n_kernels: int | None = None
    """Of forward and backward."""
    kernels_us: float | None = None
    longest: tuple[tuple[str, int, float], ...] = ()
    """The kernels that take longest: name, calls, microseconds."""
    waits: str | None = None
    """Where forward and backward wait for the device; empty if nowhere."""
    waits_with_statistics: str | None = None
    notes: tuple[str, ...] = ()
    """What could not be measured, and why."""


class LaunchesResult(Head, frozen=True, kw_only=True, tag="launches"):
    """Host time against device time of layers."""

    dtype: str
    rows: tuple[LaunchRow, ...]


class TileTimes(Record, frozen=True, kw_only=True):
    """Microseconds of one kernel at one shape by tile, the shipped one first; None for a tile that does not compile."""

    shape: str
    kernel: str
    kind: str
    bucket: int
    aligned: bool
    us: dict[str, float | None]


class TilesResult(Head, frozen=True, kw_only=True, tag="tiles"):
    """Tiles of the Triton kernels, timed inside a layer."""

    dtype: str
    kernels: tuple[TileTimes, ...]


class ComparedMethod(Record, frozen=True, kw_only=True):
    """One method of a short comparison; losses are means over seeds, in the comparison's metric."""

    label: str
    params: int
    valid: float | None
    test: float | None
    step_s: float | None
    """Median of a training step."""
    layer_forward_over_dense: float | None = None
    layer_training_over_dense: float | None = None


class ComparedResult(Head, frozen=True, kw_only=True, tag="compared"):
    """Methods trained at equal parameters on the device; the curves are in the comparison's own files."""

    preset: str
    corpus: str
    metric: str
    seeds: tuple[int, ...]
    steps: int
    tokens_per_step: int
    methods: tuple[ComparedMethod, ...]


GpuContent = LayerResult | StepResult | FiguresResult | CasesResult | LaunchesResult | TilesResult | ComparedResult


class GpuPart(Head, frozen=True, kw_only=True, tag="gpu"):
    """One part of `make gpu`: what was run, on which machine, and what came out."""

    part: str
    title: str
    command: tuple[str, ...]
    seconds: float
    limit_s: float
    state: Literal["done", "failed", "time limit"]
    rehearsal: bool = False
    """Whether sizes were tiny, to try the commands: no measurement."""
    error: str = ""
    """The end of what a failed command printed."""
    result: GpuContent | None = None
    """What was measured, as far as the part came."""


GPU_PARTS = (
    "triton-cases",
    "layer-bf16",
    "layer-fp32",
    "step-bf16",
    "step-fp32",
    "launches",
    "figures",
    "compare-small",
    "compare-wt-s",
    "tiles",
)
"""The parts of `make gpu`, in the order in which they are run: what the others rest on comes first."""


def read_gpu_parts(folder: Path) -> list[GpuPart]:
    """The parts that a folder holds, in their order; none where there is no folder.

    Raises:
        UserError: a file is damaged.
    """
    paths = [folder / f"{name}.json" for name in GPU_PARTS]
    return [read(path, GpuPart, fix="remove it and run `make gpu` again") for path in paths if path.exists()]
