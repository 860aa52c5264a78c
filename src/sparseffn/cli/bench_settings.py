"""What a user sets on `sparseffn bench`. Nothing here needs PyTorch."""

from __future__ import annotations

from typing import Annotated, Literal

from tyro.conf import arg

from sparseffn.cli.settings import Flag, Ints, Machine, MaybeInt, MaybeText, Precision, Printed, Words, settings_class


@settings_class
class Bench(Machine, Printed):
    """What all measurements share."""

    out: MaybeText = None
    """folder for the result as JSON and as a page (HTML, one file)"""


@settings_class
class Sized(Bench):
    """What is measured on layers."""

    methods: Words = ()
    """methods and options (default: all; paper: sigma-moe topk k=512 pkm)"""
    preset: str = "tiny"
    """paper (wt-s, wt-b and e8), or tiny, small, wt-s, wt-s-star, wt-b, e8"""
    tokens: Ints = ()
    """tokens of a call (default: 1024; paper: 1 8 64 1024 4096)"""
    dtype: Precision = "float32"
    """of parameters and tokens"""


@settings_class
class Layers(Sized):
    """What is measured on our layers and on peers."""

    backends: Words = ()
    """auto or any that doctor lists (default: SPARSEFFN_BACKEND, else auto)"""
    no_peers: Flag = False
    """leave other libraries out"""


@settings_class
class BenchLayer(Layers):
    """Time of one layer of each method against the dense block and installed peers, at equal parameters.

    Forward is timed in inference mode; gradients are freed between calls. Ratios are medians of the ratios within a round.
    Up to 64 tokens the calls go round as many layers as fill four times the last-level cache, with fresh tokens each call;
    "warm" is one layer called again and again. The limit is the larger of the FLOPs at the measured speed of matrix
    products and one reading of the weights that the batch touches at the measured bandwidth. A layer or a peer that
    disagrees with float64, forward or in any gradient, is refused (exit code 2). Peers: transformers' experts (pip install
    'sparseffn[hf]'), on CUDA scattermoe and our layer on PyTorch's grouped_mm. Dropout is off for all.

    Examples:
      sparseffn bench layer --preset paper --out runs/speed
      sparseffn bench layer --preset wt-s --methods sigma-moe sigma-moe k=2 --tokens 1 64 1024
      sparseffn bench layer --methods sigma-moe --backends auto torch --threads 1
    """

    rounds: int = 7
    """timed calls of each, at least; short calls get more"""


@settings_class
class BenchExperts(Bench):
    """Time of gated experts as Hugging Face stores them, against each of transformers' implementations, on the same weights.

    The experts alone, silu(G x) * U x, without a router. Up to 64 tokens forward alone is timed, in inference mode, and
    nothing is in the caches; beyond, forward and backward too. What disagrees with float64 is refused, ours with exit code 2.
    Beside each time stands its limit: FLOPs at the measured speed of matrix products, or one reading of the chosen experts.
    transformers is an extra: pip install 'sparseffn[hf]'.

    Examples:
      sparseffn bench experts --out runs/experts
      sparseffn bench experts --shapes 2048x768x128x8 --tokens 1 --dtype bfloat16
    """

    shapes: Annotated[tuple[str, ...], arg(metavar="DxIxExK ...")] = ("1024x512x32x8", "2048x1024x64x8")
    """width, units of an expert, experts, experts of a token"""
    tokens: Annotated[tuple[int, ...], arg(metavar="N ...")] = (1, 8, 64, 512)
    """tokens of a call"""
    dtype: Annotated[tuple[Precision, ...], arg(metavar="NAME ...")] = ("float32", "bfloat16")
    """of weights and tokens: float32, bfloat16, float16"""
    backend: MaybeText = None
    """as doctor lists them (default: SPARSEFFN_BACKEND, else auto)"""
    rounds: int = 7
    """timed calls of each, at least; short calls get more"""


@settings_class
class BenchHf(Bench):
    """Tokens per second of whole models of transformers by its own implementations of the experts and by ours.

    Random weights in the layer shapes of OLMoE-1B-7B, Qwen3-30B-A3B and Granite-3.0-1B-A400M, as many layers as fit into half
    of the memory; nothing is downloaded. Decoding of one sequence with a cache, and a prompt in one pass; calls are taken in
    turn. Ours is held against float64 before (exit code 2). transformers is an extra: pip install 'sparseffn[hf]'.

    Examples:
      sparseffn bench hf --out runs/hf
      sparseffn bench hf --models granite-1b --layers 4 --dtype bfloat16
    """

    models: Annotated[tuple[str, ...], arg(metavar="NAME ...")] = ("olmoe", "qwen3-moe", "granite-1b")
    """olmoe, qwen3-moe, granite-1b, tiny"""
    prompt: int = 512
    """tokens of a prompt"""
    decoded: int = 16
    """tokens that are decoded in a timed call"""
    layers: MaybeInt = None
    """at most so many (default: as many as fit)"""
    dtype: Annotated[tuple[Precision, ...], arg(metavar="NAME ...")] = ("float32", "bfloat16")
    """of the weights: float32, bfloat16, float16"""
    backend: MaybeText = None
    """as doctor lists them (default: SPARSEFFN_BACKEND, else auto)"""
    rounds: int = 5
    """timed calls of each"""


@settings_class
class BenchMemory(Layers):
    """Bytes that one layer of each method keeps for backward, against the dense block.

    Measured on the tensors that autograd keeps. Input, output and selection (indices, a mixture's scores) are counted apart;
    totals count everything.

    Example:
      sparseffn bench memory --preset paper --tokens 1024
    """


@settings_class
class BenchRoofline(Sized):
    """Measured speed of matrix products and memory, and the limits of the blocks that follow from them.

    Products: square ones and an expert's two, with one thread and with all, in each dtype. Memory: one reading of four times
    the last-level cache or more, and beside it what a few scattered blocks of an expert's size come at. The best call counts.
    A block needs at least its FLOPs (selector included) at that speed, and at least one reading of the weights that its
    tokens touch; here tokens choose evenly.

    Example:
      sparseffn bench roofline --preset paper --tokens 1 64 4096
    """

    methods: Annotated[tuple[str, ...], arg(metavar="NAME ...")] = ("sigma-moe",)
    """methods and options"""
    preset: str = "paper"
    """paper (wt-s, wt-b and e8), or tiny, small, wt-s, wt-s-star, wt-b, e8"""


@settings_class
class BenchStep(Bench):
    """Time of a training step: relative against plain attention, and methods against the dense block, in parts.

    The step is the training loop's: forward, loss, backward, clipping, optimiser; memory full. Blocks that disagree with
    float64 at the step's tokens are refused (exit code 2). The split into feedforward, attention, output layer (with the
    loss) and optimiser is measured by hooks in steps of its own.

    Examples:
      sparseffn bench step                                # 47M, 4 x 256 tokens, sigma-moe against dense
      sparseffn bench step --preset e8 --methods sigma-moe pkm --batch 2
    """

    method: Annotated[tuple[str, ...], arg(metavar="NAME ...")] = ("dense",)
    """block of the attentions' comparison"""
    methods: Annotated[tuple[str, ...], arg(metavar="NAME ...")] = ("sigma-moe",)
    """methods to hold against dense"""
    preset: str = "wt-s"
    """sizes"""
    batch: int = 4
    """streams"""
    vocab_size: int = 8000
    """vocabulary"""
    precision: Literal["float32", "bfloat16"] = "float32"
    """float32, or autocast to bfloat16"""
    backend: MaybeText = None
    """as doctor lists them (default: SPARSEFFN_BACKEND, else auto)"""
    rounds: int = 5
    """timed steps of each"""


@settings_class
class BenchFigures(Machine, Printed):
    """The paper's figures 2, 8, 9, 10 and 11: time and memory of one layer, dense block against sigma-MoE, over sizes.

    Time is that of forward and backward; memory is what is saved for backward plus the output, as the authors measured.
    Writes figures.json, a page, and each figure as SVG and PNG. Cheap points come first; those that do not fit the time
    limit or half of the memory are listed in the figure. Points that figures.json holds are not measured again: the same
    command goes on. The paper used 32,768 tokens on a GPU.

    Examples:
      sparseffn bench figures --time-limit 20m
      sparseffn bench figures --figures 9 --tokens 32768 --device cuda --out runs/figure9
      sparseffn bench figures --redraw              # from figures.json, measuring nothing
    """

    figures: Annotated[tuple[int, ...], arg(metavar="N ...")] = (2, 8, 9, 10, 11)
    """which of the paper's"""
    tokens: int = 2048
    """tokens of a call"""
    time_limit: str = "20m"
    """for all points that are still to be measured: 90s, 20m, 2h"""
    rounds: int = 5
    """timed calls of each, at least"""
    backend: MaybeText = None
    """as doctor lists them (default: SPARSEFFN_BACKEND, else auto)"""
    dtype: Precision = "float32"
    """of parameters and tokens"""
    redraw: Flag = False
    """draw what figures.json holds, and measure nothing"""
    out: str = "runs/figures"
    """folder"""


@settings_class
class BenchKernels(Printed):
    """Registers, spills and shared memory of the Triton kernels, compiled ahead of time; no GPU is needed.

    About a second a line; all of them are some hundreds.

    Example:
      sparseffn bench kernels --targets sm_90 --dtypes bfloat16
    """

    targets: Words = ()
    """sm_80, sm_90, gfx942 (default: all)"""
    kernels: Words = ()
    """kernels by name (default: all)"""
    dtypes: Words = ()
    """float32, bfloat16, float16 (default: all)"""


@settings_class
class BenchGpu(Printed):
    """Everything that needs a CUDA device, in parts of under 8 minutes: what `make gpu` runs.

    Parts: triton-cases, layer-bf16, layer-fp32, step-bf16, step-fp32, launches, figures, compare-small, compare-wt-s, tiles.
    Each runs in a process of its own and writes OUT/PART.json; gpu.html shows them all. The same command goes on where it
    stopped: a part that is done is skipped. It runs from a source tree with the tests (PYTHONPATH=src), without network and
    without installing. A machine that has PyTorch, Triton, NumPy, rich, Jinja, safetensors and filelock lacks msgspec, tyro,
    docstring-parser and typeguard: `make gpu-wheels` puts them into a folder to take along, which PYTHONPATH then names too.

    Examples:
      sparseffn bench gpu
      sparseffn bench gpu --parts layer-bf16 step-bf16
      sparseffn bench gpu --rehearse --device cpu --out runs/rehearsal      # tiny sizes: do the commands work?
    """

    parts: Words = ()
    """which parts (default: all that are not done)"""
    out: str = "results/gpu"
    """folder of the results"""
    work: str = "runs/gpu"
    """folder of what the parts write themselves, logs included"""
    device: str = "cuda"
    """cuda or cuda:N; cpu with --rehearse alone"""
    rehearse: Flag = False
    """tiny sizes, to try the commands; no measurement"""
