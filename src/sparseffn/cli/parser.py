"""Arguments of every command. Nothing here needs PyTorch, so that help comes at once."""

from __future__ import annotations

from typing import Any

from sparseffn.cli.arguments import Parser, add_command, add_json, add_machine
from sparseffn.cli.bench_parser import add_bench
from sparseffn.cli.data_parser import add_data
from sparseffn.cli.reproduce_parser import add_reproduce

DESCRIPTION = """\
Compare Transformer feedforward blocks at equal parameter count: Top-K, product keys, mixtures of experts.

  sparseffn methods                        what there is
  sparseffn compare --methods dense topk pkm sigma-moe --budget 8m --out runs/first
"""


def build_parser() -> Parser:
    """The parser of `sparseffn`."""
    parser = Parser(prog="sparseffn", description=DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    own = (_methods, _match, _compare, _train, _eval, _generate, _analyze)
    for add in (*own, add_bench, add_reproduce, _study, add_data, _doctor):
        add(commands)
    return parser


def _corpus(parser: Parser) -> None:
    parser.add_argument("--corpus", default="stdlib", help="stdlib (always there), text, or one of `sparseffn data list`")
    _places(parser)
    parser.add_argument("--tokenizer", help="bytes, seen-bytes, chars, words or bpe (default: the corpus's own)")
    parser.add_argument("--vocab-size", type=int, help="pieces of a bpe vocabulary (default: 8000)")


def _places(parser: Parser) -> None:
    parser.add_argument("--data-dir", help="your file or folder, for text, or with a copy of a published corpus")
    parser.add_argument("--cache-dir", help="where token files are kept (default: the user's cache folder)")


def _settings(parser: Parser) -> None:
    parser.add_argument("--preset", default="tiny", help="tiny, small, wt-s, wt-s-star, wt-b or e8")
    for name, kind, what in (
        ("--lr", float, "peak learning rate"),
        ("--batch", int, "streams read in parallel"),
        ("--context", int, "tokens of a window"),
        ("--warmup", int, "steps of linear warm-up"),
        ("--clip", float, "largest gradient norm"),
    ):
        parser.add_argument(name, type=kind, help=f"{what} (default: the preset's)")


def _methods(commands: Any) -> None:
    parser = add_command(
        commands,
        "methods",
        "List the methods, or the options of one.",
        "Examples:\n  sparseffn methods\n  sparseffn methods sigma-moe",
        "describe:methods",
    )
    parser.add_argument("method", nargs="?", help="show this method's options")
    parser.add_argument("--markdown", action="store_true", help="the table of the README")
    add_json(parser)


def _match(commands: Any) -> None:
    parser = add_command(
        commands,
        "match",
        "Size a method so that it has another one's parameters.",
        "Options of a method follow its name as key=value; matching then solves its size fields.\n\n"
        "Examples:\n"
        "  sparseffn match --method pkm --like dense --d-model 412 --d-ff 2053\n"
        "  sparseffn match --method sigma-moe expert_size=64 k=8 --like dense --d-model 412 --d-ff 2053\n"
        "  sparseffn match --method switch --like dense --preset wt-b --vocab-size 8000   # within the whole model",
        "describe:match",
    )
    parser.add_argument("--method", nargs="+", required=True, metavar="NAME", help="method, then its options as key=value")
    parser.add_argument("--like", nargs="+", default=["dense"], metavar="NAME", help="method to match, then its options")
    parser.add_argument("--d-model", type=int, help="width of the model")
    parser.add_argument("--d-ff", type=int, help="key-value pairs of the dense block")
    parser.add_argument("--preset", help="take sizes from a preset and match the whole model")
    parser.add_argument("--vocab-size", type=int, default=8000, help="vocabulary of the preset's model")
    add_json(parser)


def _compare(commands: Any) -> None:
    parser = add_command(
        commands,
        "compare",
        "Train parameter-equal models that differ in their feedforward block; one table and one page.",
        "All methods see the same data in the same order, share every hyperparameter, and start from the same\n"
        "parameters outside the feedforward blocks. Interrupt it when you like: the same command goes on.\n\n"
        "Examples:\n"
        "  sparseffn compare --methods dense topk pkm sigma-moe --budget 8m --out runs/first\n"
        "  sparseffn compare --methods dense sigma-moe sigma-moe k=1 expert_size=256 --steps 500 --seeds 3 --out runs/k\n"
        "  sparseffn compare --corpus text --data-dir my_notes/ --methods dense switch --budget 20m --out runs/notes",
        "compare:compare_command",
    )
    parser.add_argument(
        "--methods", nargs="+", required=True, metavar="NAME", help="methods, each followed by its options as key=value"
    )
    _corpus(parser)
    _settings(parser)
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds")
    parser.add_argument("--seed", type=int, default=0, help="first seed")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--budget", help="time for everything: 90s, 8m, 2h; sets the steps once, equal for all methods")
    length.add_argument("--steps", type=int, help="training steps, equal for all methods (default: the preset's)")
    parser.add_argument("--out", required=True, help="folder of the comparison")
    add_machine(parser)
    add_json(parser)


def _train(commands: Any) -> None:
    parser = add_command(
        commands,
        "train",
        "Train one language model.",
        "Goes on from the last checkpoint in --out with the same command, bit-identically.\n\n"
        "Examples:\n"
        "  sparseffn train --method sigma-moe --steps 300 --out runs/sigma\n"
        "  sparseffn train --method topk k=128 --corpus ptb --data-dir ptb/ --preset small --out runs/topk",
        "run:train_command",
    )
    parser.add_argument("--method", nargs="+", required=True, metavar="NAME", help="method, then its options as key=value")
    _corpus(parser)
    _settings(parser)
    parser.add_argument("--steps", type=int, help="training steps (default: the preset's)")
    parser.add_argument("--seed", type=int, default=0, help="seed of parameters and dropout")
    parser.add_argument("--optimizer", choices=("adam", "adamw"), default="adam", help="optimiser")
    parser.add_argument("--weight-decay", type=float, default=0.0, help="weight decay")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of a step")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="autocast dtype")
    parser.add_argument("--eval-every", type=int, help="steps between points of the validation curve (default: 12 points)")
    parser.add_argument("--checkpoint-every", type=int, help="steps between checkpoints (default: 10 of them)")
    parser.add_argument("--tensorboard", action="store_true", help="also write TensorBoard events; needs sparseffn[track]")
    parser.add_argument("--out", required=True, help="run folder")
    add_machine(parser)
    add_json(parser)


def _eval(commands: Any) -> None:
    parser = add_command(
        commands,
        "eval",
        "Evaluate a run's model: every token of a split is predicted once.",
        "Examples:\n  sparseffn eval runs/sigma\n  sparseffn eval runs/sigma --split valid --memory 2048",
        "run:eval_command",
    )
    parser.add_argument("folder", metavar="RUN", help="run folder")
    parser.add_argument("--split", choices=("valid", "test"), default="test", help="split")
    parser.add_argument("--memory", type=int, help="positions that are remembered (default: the run's)")
    parser.add_argument("--eval-batch", type=int, help="streams the split is cut into; 1 is exact (default: the run's)")
    _places(parser)
    add_machine(parser)
    add_json(parser)


def _generate(commands: Any) -> None:
    parser = add_command(
        commands,
        "generate",
        "Print text that a run's model writes.",
        'Examples:\n  sparseffn generate runs/sigma --prompt "def main("\n'
        '  sparseffn generate runs/sigma --prompt "import " --temperature 0.8 --top-k 40 --n-tokens 400',
        "run:generate_command",
    )
    parser.add_argument("folder", metavar="RUN", help="run folder")
    parser.add_argument("--prompt", default="\n", help="text to go on from")
    parser.add_argument("--n-tokens", type=int, default=200, help="tokens to write")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the most likely token")
    parser.add_argument("--top-k", type=int, help="sample among the K most likely tokens")
    parser.add_argument("--memory", type=int, help="positions that are remembered (default: the run's in evaluation)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples")
    add_machine(parser)


def _study(commands: Any) -> None:
    parser = add_command(
        commands,
        "study",
        "Measure why this selector and why this initialisation: predictions beside figures.",
        "init: output, gradients and load at initialisation over depth, N_E, G and K, then short trainings;\n"
        "competition: sigmoid against softmax before and after top-k; balance: entropy loss and expert dropout, two by two.\n"
        "With --budget a call ends when its time is spent; the same command goes on.\n\n"
        "Examples:\n"
        "  sparseffn study init --budget 10m --out runs/study\n"
        "  sparseffn study competition --seeds 5 --out runs/study   # shares its runs with the others in one folder",
        "study:study_command",
    )
    parser.add_argument("study", choices=("init", "competition", "balance"), help="what is asked")
    parser.add_argument("--corpus", default="stdlib", help="stdlib (always there), text or ptb")
    _places(parser)
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each variant")
    parser.add_argument("--budget", help="time for this call: 90s, 8m, 2h (default: until all is done)")
    parser.add_argument("--out", default="runs/study", help="folder of the studies")
    add_machine(parser)
    add_json(parser)


def _analyze(commands: Any) -> None:
    parser = add_command(
        commands,
        "analyze",
        "What a finished run's feedforward blocks do: active channels, use of experts, their tokens, routing over training.",
        "Writes analysis.json and every figure as PNG and SVG. Per layer: active channels a token; share of the selection\n"
        "weight of each expert; experts selected together; the tokens that an expert serves, with their lift; evenness of the\n"
        "load. Over training: load, and how many of its experts a token keeps. Memory does not grow with the text.\n\n"
        "Examples:\n  sparseffn analyze runs/sigma\n"
        "  sparseffn analyze runs/first/runs/sigma-moe/seed-0 --split test --max-tokens 100000 --out figures/sigma",
        "analyze:analyze_command",
    )
    parser.add_argument("folder", metavar="RUN", help="folder of a finished run")
    parser.add_argument("--split", choices=("valid", "test", "both"), default="valid", help="what to read")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="only the first N tokens (default: the whole split)")
    parser.add_argument("--out", metavar="DIR", help="folder for the results (default: RUN/analysis)")
    _places(parser)
    add_machine(parser)
    add_json(parser)


def _doctor(commands: Any) -> None:
    parser = add_command(
        commands,
        "doctor",
        "Say what this installation can do: versions, threads, backends and why, extras.",
        "Paste it into a report of a problem.\n\nExamples:\n  sparseffn doctor\n  sparseffn doctor --json > doctor.json",
        "describe:doctor",
    )
    add_json(parser)
