"""Results of `sparseffn bench`: one type for each kind of file, named by its field `kind`; its parts stand before it.

Seconds, bytes, FLOPs and parameters are plain numbers in these units. `forward` is an evaluation forward, `training` a forward
with its backward. Fields that older files lack have a default; fields that are not known here are ignored.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from sparseffn.errors import UserError

FORMAT = 1
"""Layout of the files; another one is refused."""

DTYPE_NAMES = ("float32", "bfloat16", "float16")


class Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A part of a result."""


class Environment(Record, frozen=True, kw_only=True):
    sparseffn: str
    python: str
    torch: str
    numpy: str
    threads: int
    cpu: str
    platform: str
    device: str
    """`cpu`, or the name of the GPU."""
    blas: str
    """The library of matrix products that PyTorch was built with."""
    cpu_capability: str
    last_level_cache_bytes: int
    last_level_cache_source: str
    memory_bytes: int
    cpus: int
    load_average: float
    date: str
    sources: str = ""
    blas_version: str | None = None
    blas_threads: str | None = None
    """Of the library and of OpenMP, which may differ from `threads` by the variables of either."""
    packages: dict[str, str] = {}
    """Versions of other packages whose kernels may have been timed."""
    compiler: str | None = None
    cuda: str | None = None
    driver: str | None = None
    freed_memory: str | None = None
    instruction_sets: str | None = None
    """What the CPU kernels were compiled for; None where they could not be."""


class Head(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="kind"):
    """The fields that every file has; `kind` tells which of the types below it is."""

    format: int
    environment: Environment

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise UserError(f"`format` of the result must be {FORMAT}; got {self.format}; fix: measure again")

    @property
    def kind(self) -> str:
        """`layer`, `experts`, `hf`, `memory`, `roofline`, `step`, `figures` or `gpu`."""
        return str(self.__struct_config__.tag)


class Spread(Record, frozen=True, kw_only=True):
    """Median and quartiles of `n` timed calls."""

    median_s: float
    q1_s: float
    q3_s: float
    n: int


class LimitedTime(Spread, frozen=True, kw_only=True):
    """Timed calls, and the least that such a call can take."""

    limit_s: float
    """The larger of the next two."""
    limit_arithmetic_s: float
    limit_bytes_s: float
    gradient_s: float
    """Writing the gradients of all weights once, 0 for a forward; no part of the limit."""
    over_limit: float


class OverPeer(Record, frozen=True, kw_only=True):
    """Time over that of the fastest of Hugging Face's implementations."""

    fastest: str
    over: float
    times_faster: float


class Roof(Record, frozen=True, kw_only=True):
    """Speeds of a device with the threads of the process."""

    flops_per_s: float
    """Of matrix products in the timed dtype."""
    bytes_per_s: float
    """Reading memory in one long pass."""
    scattered_bytes_per_s: float
    """Reading a few blocks of an expert's size from scattered places. No part of any limit."""


class AbsentCandidate(Record, frozen=True, kw_only=True):
    """A candidate that was not measured at a size, and why."""

    shape: str
    tokens: int
    label: str
    reason: str


class LayerSettings(Record, frozen=True, kw_only=True, omit_defaults=False):
    """How layers are measured.

    Raises:
        UserError: a list is empty or names something twice; a number below 1; an unknown dtype.
    """

    tokens: tuple[int, ...]
    """Tokens of a call."""
    rounds: int = 7
    """Timed calls of each candidate, at least."""
    backends: tuple[str, ...] = ("auto",)
    dtype: str = "float32"
    device: str = "cpu"
    peers: bool = True
    """Also time other libraries' experts, where sigma-moe is among the methods."""

    def __post_init__(self) -> None:
        for name in ("tokens", "backends"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise UserError(f"`{name}` must name at least one, each once; got {list(values)}; fix: name each once")
        if min(self.tokens) < 1 or self.rounds < 1:
            raise UserError(
                f"`--tokens` and `--rounds` must be at least 1; got {list(self.tokens)}, {self.rounds}; fix: --tokens 1024"
            )
        if self.dtype not in DTYPE_NAMES:
            raise UserError(f"`dtype` must be one of {', '.join(DTYPE_NAMES)}; got {self.dtype!r}; fix: --dtype float32")


class ShapeConfigs(Record, frozen=True, kw_only=True):
    """The configs behind the labels of a shape."""

    name: str
    dense: dict[str, Any]
    methods: dict[str, dict[str, Any]]


class Deviation(Record, frozen=True, kw_only=True):
    """The correctness check of a candidate: by quantity, the largest deviation from float64 over its largest value."""

    tokens: int
    largest_deviation: dict[str, float]


class WarmTime(Spread, frozen=True, kw_only=True):
    """One layer called again and again with the same tokens."""

    over_dense: float
    over_dense_over_share: float


class LayerTime(LimitedTime, frozen=True, kw_only=True, omit_defaults=False):
    over_dense: float
    over_dense_over_share: float
    over_fastest_hf: OverPeer | None = None
    """None for peers, other methods, and where no peer was timed."""


class WarmTimes(Record, frozen=True, kw_only=True):
    forward: WarmTime
    training: WarmTime


class LayerRow(Record, frozen=True, kw_only=True):
    shape: str
    tokens: int
    label: str
    method: str
    peer: bool
    backend: str | None
    """None for a peer, which has its own."""
    cache: Literal["cold", "repeated"]
    n_layers: int
    share: float
    """Active over all channels, K / N."""
    params: int
    touched_bytes: float
    gradient_bytes: int
    check: Deviation = msgspec.field(name="gate")
    forward: LayerTime
    training: LayerTime
    warm: WarmTimes | None = None
    """Where `cache` is cold."""


class CountedExperts(Record, frozen=True, kw_only=True):
    forward: LimitedTime
    training: LimitedTime
    gradient_bytes: int


class ExpertCounts(Record, frozen=True, kw_only=True):
    """Few experts against many in one run."""

    tokens: int
    fixed: str
    backend: str
    layers: dict[str, CountedExperts]
    forward_over_few: float
    training_over_few: float


class LayerResult(Head, frozen=True, kw_only=True, tag="layer"):
    settings: LayerSettings
    roof: Roof
    shapes: tuple[ShapeConfigs, ...]
    rows: tuple[LayerRow, ...]
    left_out: tuple[AbsentCandidate, ...]
    expert_counts: ExpertCounts | None = None


class MemoryRow(Record, frozen=True, kw_only=True):
    shape: str
    tokens: int
    label: str
    backend: str | None
    share: float
    saved_bytes: int
    selection_bytes: int
    input_bytes: int
    output_bytes: int
    total_bytes: int
    over_dense: float
    over_dense_over_share: float
    total_over_dense: float


class MemoryResult(Head, frozen=True, kw_only=True, tag="memory"):
    settings: LayerSettings
    rows: tuple[MemoryRow, ...]
    left_out: tuple[AbsentCandidate, ...]


class ProductSpeed(Record, frozen=True, kw_only=True):
    """The fastest matrix product: whose it is, its shape and its speed."""

    how: str
    seconds: float
    flops_per_s: float
    shape: str


class Scattered(Record, frozen=True, kw_only=True):
    """Reading a few blocks of an expert's size from scattered places."""

    bytes_per_s: float
    block_bytes: int
    blocks: int


class ReadingSpeed(Record, frozen=True, kw_only=True):
    """Reading a working set of four times the last-level cache or more."""

    bytes: int
    how: str
    seconds: float
    bytes_per_s: float
    scattered: Scattered


class MachineSpeed(Record, frozen=True, kw_only=True):
    threads: int
    dtype: str
    product: ProductSpeed
    reading: ReadingSpeed


class Limit(Record, frozen=True, kw_only=True):
    """Seconds that a call takes at the least."""

    arithmetic_s: float
    bytes_s: float
    gradient_s: float
    """Writing the gradients of all weights; 0 for a forward. Not part of the limit."""
    limit_s: float
    """The larger of arithmetic and bytes."""


class RooflineRow(Record, frozen=True, kw_only=True):
    shape: str
    label: str
    tokens: int
    touched_bytes: float
    forward: Limit
    training: Limit


class RooflineResult(Head, frozen=True, kw_only=True, tag="roofline"):
    settings: LayerSettings
    speeds: tuple[MachineSpeed, ...]
    rows: tuple[RooflineRow, ...]


class StepSettings(Record, frozen=True, kw_only=True, omit_defaults=False):
    preset: str
    method: str
    """Label of the block with which attentions are compared."""
    params: int
    vocab_size: int
    rounds: int
    batch: int
    context: int
    memory: int
    backend: str = "auto"
    precision: str = "float32"
    device: str = "cpu"


class MethodStep(Record, frozen=True, kw_only=True):
    seconds: float
    over_base: float
    times: tuple[float, ...]
    parts: dict[str, float]
    parts_whole_s: float
    params: int


class StepResult(Head, frozen=True, kw_only=True, tag="step"):
    """`seconds`, `ratio` and `times` compare relative with plain attention."""

    settings: StepSettings
    seconds: dict[str, float]
    ratio: float
    times: dict[str, tuple[float, ...]]
    methods: dict[str, MethodStep]


class FigureSettings(Record, frozen=True, kw_only=True):
    tokens: int
    dtype: str
    device: str
    backend: str
    rounds: int


class FigureSweep(Record, frozen=True, kw_only=True):
    """What a figure varies, and what it holds fixed."""

    variable: str
    values: tuple[int, ...]
    fixed: str


class FigureTime(LimitedTime, frozen=True, kw_only=True):
    over_dense: float | None = None
    """None for the dense block."""


class FigureLayer(Record, frozen=True, kw_only=True):
    """One side of a point; `memory_bytes` is what the authors measured, all but the block's input."""

    forward: FigureTime
    training: FigureTime
    memory_bytes: int
    saved_bytes: int
    selection_bytes: int
    input_bytes: int
    output_bytes: int
    gradient_bytes: int


class FigurePoint(Record, frozen=True, kw_only=True):
    figure: int
    value: int
    variable: str
    blocks: dict[str, dict[str, Any]]
    layers: dict[str, FigureLayer]


class AbsentPoint(Record, frozen=True, kw_only=True):
    """A point that was not measured, and which limit it did not fit."""

    figure: int
    value: int
    variable: str
    limit: str
    reason: str


class FiguresResult(Head, frozen=True, kw_only=True, tag="figures"):
    settings: FigureSettings
    figures: tuple[int, ...]
    sweeps: dict[str, FigureSweep]
    points: tuple[FigurePoint, ...]
    left_out: tuple[AbsentPoint, ...]


class ExpertShape(Record, frozen=True, kw_only=True):
    """Sizes of a layer of gated experts."""

    d_model: int
    expert_size: int
    n_experts: int
    k: int
    """Experts of a token."""

    def __post_init__(self) -> None:
        if min(self.d_model, self.expert_size, self.k) < 1 or self.k > self.n_experts:
            raise UserError(f"`shapes` must have sizes of at least 1 and K at most E; got {self.label}; fix: 1024x512x32x8")

    @property
    def label(self) -> str:
        """`1024x512x32x8`: width, units of an expert, experts, experts of a token."""
        return f"{self.d_model}x{self.expert_size}x{self.n_experts}x{self.k}"

    @property
    def num_params(self) -> int:
        """Of all experts' three matrices."""
        return 3 * self.d_model * self.expert_size * self.n_experts


class ExpertsSettings(Record, frozen=True, kw_only=True, omit_defaults=False):
    """How gated experts are measured.

    Raises:
        UserError: a list is empty or names something twice; a number below 1; an unknown dtype.
    """

    shapes: tuple[ExpertShape, ...]
    tokens: tuple[int, ...]
    """Tokens of a call."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    rounds: int = 7
    """Timed calls of each candidate, at least."""
    backend: str = "auto"
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("shapes", "tokens", "dtypes"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise UserError(f"`{name}` must name at least one, each once; got {list(values)}; fix: name each once")
        if min(self.tokens) < 1 or self.rounds < 1:
            raise UserError(
                f"`--tokens` and `--rounds` must be at least 1; got {list(self.tokens)}, {self.rounds}; fix: --tokens 64"
            )
        if unknown := set(self.dtypes) - set(DTYPE_NAMES):
            raise UserError(f"`dtypes` must be among {', '.join(DTYPE_NAMES)}; got {min(unknown)!r}; fix: --dtype float32")


class ExpertsTime(LimitedTime, frozen=True, kw_only=True):
    over_fastest_hf: OverPeer | None = None
    """None for peers, and where none was timed."""


class ExpertsRow(Record, frozen=True, kw_only=True):
    shape: str
    dtype: str
    tokens: int
    label: str
    peer: bool
    backend: str | None
    """None for a peer, which has its own."""
    cache: Literal["cold", "repeated"]
    n_layers: int
    touched_bytes: float
    check: Deviation
    forward: ExpertsTime
    training: ExpertsTime | None = None
    """None for few tokens, which are decoded."""


class ExpertsResult(Head, frozen=True, kw_only=True, tag="experts"):
    """Experts as Hugging Face stores them, against each of its implementations."""

    settings: ExpertsSettings
    roofs: dict[str, Roof]
    """By dtype."""
    rows: tuple[ExpertsRow, ...]
    left_out: tuple[AbsentCandidate, ...]


class WholeSettings(Record, frozen=True, kw_only=True, omit_defaults=False):
    """How whole models of transformers are measured.

    Raises:
        UserError: a list is empty or names something twice; a number below 1; an unknown dtype.
    """

    models: tuple[str, ...]
    prompt: int = 512
    """Tokens of a prompt."""
    decoded: int = 16
    """Tokens that are decoded in a timed call."""
    layers: int | None = None
    """At most so many, as far as they fit into memory; None: the published model's."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    rounds: int = 5
    """Timed calls of each candidate."""
    backend: str = "auto"
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("models", "dtypes"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise UserError(f"`{name}` must name at least one, each once; got {list(values)}; fix: name each once")
        for name in ("prompt", "decoded", "rounds", "layers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"`{name}` must be at least 1; got {value}; fix: --{name} 16")
        if self.prompt == 1:
            raise UserError("`prompt` must be at least 2, one token is decoding; got 1; fix: --prompt 512")
        if unknown := set(self.dtypes) - set(DTYPE_NAMES):
            raise UserError(f"`dtypes` must be among {', '.join(DTYPE_NAMES)}; got {min(unknown)!r}; fix: --dtype float32")


class WholeLimit(Record, frozen=True, kw_only=True):
    """What no implementation of the experts can beat: the rest of the model, and the larger of two limits of theirs.

    Tokens are taken to choose their experts evenly.
    """

    rest_s: float
    """The same pass with experts that return zeros, the median of calls in turn with the others."""
    layers_rest_s: float
    """Of it in the decoder layers."""
    arithmetic_s: float
    """FLOPs of the experts in all layers at the measured rate of products."""
    bytes_s: float
    """One reading of the weights that they need, at the measured rate."""
    most_times_faster: float | None = None
    """Than the fastest of transformers', if the pass took just this long; None where none was timed."""
    layers_most_times_faster: float | None = None


class WholeTime(Spread, frozen=True, kw_only=True):
    """One pass of a model: a token that is decoded, or a prompt."""

    layers: Spread
    """Of it in the decoder layers."""
    tokens_per_s: float
    over_fastest_hf: OverPeer | None = None
    """None for peers, and where none was timed."""
    layers_over_fastest_hf: OverPeer | None = None
    limit: WholeLimit | None = None
    """None for peers."""


class WholeRow(Record, frozen=True, kw_only=True):
    model: str
    dtype: str
    label: str
    peer: bool
    backend: str | None
    """None for a peer, which has its own."""
    n_layers: int
    n_published: int
    """Layers of the model whose shape it is."""
    num_params: int
    deviation: float
    """Largest from float64, of the first layer's experts."""
    decoding: WholeTime
    prompt: WholeTime | None = None
    """None where the candidate was left out."""


class WholeResult(Head, frozen=True, kw_only=True, tag="hf"):
    """Whole models of transformers by its own implementations of the experts and by ours."""

    settings: WholeSettings
    roofs: dict[str, Roof]
    """By dtype."""
    rows: tuple[WholeRow, ...]
    left_out: tuple[AbsentCandidate, ...]


BenchResult = LayerResult | MemoryResult | RooflineResult | StepResult | FiguresResult | ExpertsResult | WholeResult
