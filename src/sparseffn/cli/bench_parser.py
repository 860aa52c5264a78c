"""Arguments of `sparseffn bench`. Nothing here needs PyTorch."""

from __future__ import annotations

from typing import Any

from sparseffn.cli.arguments import Parser, add_command, add_json, add_machine

_DTYPES = ("float32", "bfloat16", "float16")

DESCRIPTION = """\
Measure speed and memory so that nothing is flattered: candidates take turns in one run, every ratio is within that run,
few tokens are timed with weights that come from memory, and no speed is told of a layer that disagrees with float64.

Examples:
  sparseffn bench layer --preset paper     one layer of each method against dense and installed peers
  sparseffn bench step                     a training step, split into its parts
  sparseffn bench memory                   bytes kept for backward
  sparseffn bench roofline                 what this machine allows
  sparseffn bench figures --out figures    the paper's figures 2, 8, 9, 10, 11
  sparseffn bench kernels                  registers, spills and shared memory of the Triton kernels
"""


def add_bench(commands: Any) -> None:
    """`bench` and its kinds."""
    parser = commands.add_parser("bench", help="Measure speed and memory, interleaved in one run.", description=DESCRIPTION)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="WHAT")
    for add in (_layer, _step, _memory, _roofline, _figures, _kernels):
        add(kinds)


def _result(parser: Parser) -> None:
    parser.add_argument("--out", help="folder for the result as JSON and as a page (HTML, one file)")
    add_machine(parser)
    add_json(parser)


def _sizes(parser: Parser) -> None:
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="methods and options (default: all; paper: sigma-moe pkm)")
    parser.add_argument("--preset", default="tiny", help="paper (wt-s, wt-b and e8), or tiny, small, wt-s, wt-s-star, wt-b, e8")
    parser.add_argument(
        "--tokens", type=int, nargs="+", metavar="N", help="tokens of a call (default: 1024; paper: 1 8 64 1024 4096)"
    )
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="of parameters and tokens")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N")


def _timed(parser: Parser) -> None:
    """What only a command that times layers has."""
    parser.add_argument(
        "--backends", nargs="+", metavar="NAME", help="auto or any that doctor lists (default: SPARSEFFN_BACKEND, else auto)"
    )
    parser.add_argument("--no-peers", action="store_true", help="leave other libraries out")


def _layer(kinds: Any) -> None:
    layer = add_command(
        kinds,
        "layer",
        "Time of one layer of each method against the dense block and installed peers, at equal parameters.",
        "Forward is timed in inference mode; gradients are freed between calls. Ratios are medians of the ratios within a\n"
        "round. Up to 64 tokens the calls go round as many layers as fill four times the last-level cache, with fresh tokens\n"
        'each call; "warm" is one layer called again and again. The limit is the larger of the FLOPs at the measured speed of\n'
        "matrix products and one reading of the weights that the batch touches at the measured bandwidth.\n"
        "A layer or a peer that disagrees with float64, forward or in any gradient, is refused (exit code 2).\n"
        "Peers: transformers' experts (pip install 'sparseffn[hf]'), on CUDA scattermoe\n"
        "and our layer on PyTorch's grouped_mm. Dropout is off for all.\n\n"
        "Examples:\n"
        "  sparseffn bench layer --preset paper --out runs/speed\n"
        "  sparseffn bench layer --preset wt-s --methods sigma-moe sigma-moe k=2 --tokens 1 64 1024\n"
        "  sparseffn bench layer --methods sigma-moe --backends auto torch --threads 1",
        "bench:layer_command",
    )
    _sizes(layer)
    _timed(layer)
    layer.add_argument("--rounds", type=int, default=7, help="timed calls of each, at least; short calls get more")
    _result(layer)


def _memory(kinds: Any) -> None:
    memory = add_command(
        kinds,
        "memory",
        "Bytes that one layer of each method keeps for backward, against the dense block.",
        "Measured on the tensors that autograd keeps. Input, output and selection (indices, a mixture's scores) are counted\n"
        "apart; totals count everything.\n\n"
        "Example:\n  sparseffn bench memory --preset paper --tokens 1024",
        "bench:memory_command",
    )
    _sizes(memory)
    _timed(memory)
    memory.set_defaults(rounds=1)
    _result(memory)


def _roofline(kinds: Any) -> None:
    roofline = add_command(
        kinds,
        "roofline",
        "Measured speed of matrix products and memory, and the limits of the blocks that follow from them.",
        "Products: square ones and an expert's two, with one thread and with all, in each dtype. Memory: one reading of four\n"
        "times the last-level cache or more, and beside it what a few scattered blocks of an expert's size come at. The best\n"
        "call counts. A block takes at least its FLOPs (selector included) at that speed, and at\n"
        "least one reading of the weights that its tokens touch; here tokens choose evenly.\n\n"
        "Example:\n  sparseffn bench roofline --preset paper --tokens 1 64 4096",
        "bench:roofline_command",
    )
    _sizes(roofline)
    roofline.set_defaults(rounds=1, preset="paper", methods=["sigma-moe"], backends=None, no_peers=True)
    _result(roofline)


def _step(kinds: Any) -> None:
    step = add_command(
        kinds,
        "step",
        "Time of a training step: relative against plain attention, and methods against the dense block, in parts.",
        "The step is the training loop's: forward, loss, backward, clipping, optimiser; memory full. Blocks that\n"
        "disagree with float64 at the step's tokens are refused (exit code 2). The split into\n"
        "feedforward, attention, output layer (with the loss) and optimiser is measured by hooks in steps of its own.\n\n"
        "Examples:\n"
        "  sparseffn bench step                                # 47M, 4 x 256 tokens, sigma-moe against dense\n"
        "  sparseffn bench step --preset e8 --methods sigma-moe pkm --batch 2",
        "bench:step_command",
    )
    step.add_argument("--method", nargs="+", default=["dense"], metavar="NAME", help="block of the attentions' comparison")
    step.add_argument("--methods", nargs="+", default=["sigma-moe"], metavar="NAME", help="methods to hold against dense")
    step.add_argument("--preset", default="wt-s", help="sizes")
    step.add_argument("--batch", type=int, default=4, help="streams")
    step.add_argument("--vocab-size", type=int, default=8000, help="vocabulary")
    step.add_argument("--precision", choices=_DTYPES[:2], default="float32", help="float32, or autocast to bfloat16")
    step.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N")
    step.add_argument("--backend", metavar="NAME", help="as doctor lists them (default: SPARSEFFN_BACKEND, else auto)")
    step.add_argument("--rounds", type=int, default=5, help="timed steps of each")
    _result(step)


def _figures(kinds: Any) -> None:
    figures = add_command(
        kinds,
        "figures",
        "The paper's figures 2, 8, 9, 10 and 11: time and memory of one layer, dense block against sigma-MoE, over sizes.",
        "Time is that of forward and backward; memory is what is saved for backward plus the output, as the authors measured.\n"
        "Writes figures.json, a page, and each figure as SVG and PNG. Cheap points come first; those that do not fit the time\n"
        "limit or half of the memory are listed in the figure. Points that figures.json holds are not measured again: the\n"
        "same command goes on. The paper used 32,768 tokens on a GPU.\n\n"
        "Examples:\n"
        "  sparseffn bench figures --time-limit 20m\n"
        "  sparseffn bench figures --figures 9 --tokens 32768 --device cuda --out runs/figure9\n"
        "  sparseffn bench figures --redraw              # from figures.json, measuring nothing",
        "bench_figures:figures_command",
    )
    figures.add_argument("--figures", type=int, nargs="+", default=[2, 8, 9, 10, 11], metavar="N", help="which of the paper's")
    figures.add_argument("--tokens", type=int, default=2048, help="tokens of a call")
    figures.add_argument("--time-limit", default="20m", help="for all points that are still to be measured: 90s, 20m, 2h")
    figures.add_argument("--rounds", type=int, default=5, help="timed calls of each, at least")
    figures.add_argument("--backend", metavar="NAME", help="as doctor lists them (default: SPARSEFFN_BACKEND, else auto)")
    figures.add_argument("--dtype", choices=_DTYPES, default="float32", help="of parameters and tokens")
    figures.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N")
    figures.add_argument("--redraw", action="store_true", help="draw what figures.json holds, and measure nothing")
    figures.add_argument("--out", default="runs/figures", help="folder")
    add_machine(figures)
    add_json(figures)


def _kernels(kinds: Any) -> None:
    parser = add_command(
        kinds,
        "kernels",
        "Registers, spills and shared memory of the Triton kernels, compiled ahead of time; no GPU is needed.",
        "About a second a line; all of them are some hundreds.\n\n"
        "Example:\n  sparseffn bench kernels --targets sm_90 --dtypes bfloat16",
        "bench_kernels:kernels_command",
    )
    parser.add_argument("--targets", nargs="+", metavar="NAME", help="sm_80, sm_90, gfx942 (default: all)")
    parser.add_argument("--kernels", nargs="+", metavar="NAME", help="kernels by name (default: all)")
    parser.add_argument("--dtypes", nargs="+", metavar="NAME", help="float32, bfloat16, float16 (default: all)")
    add_json(parser)
