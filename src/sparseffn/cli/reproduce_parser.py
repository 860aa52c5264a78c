"""Arguments of `sparseffn reproduce`. Nothing here needs PyTorch."""

from __future__ import annotations

from typing import Any

from sparseffn.cli.arguments import add_command, add_json, add_machine


def add_reproduce(commands: Any) -> None:
    """The command `reproduce`."""
    parser = add_command(
        commands,
        "reproduce",
        "Run a table of the paper at a chosen scale and print what was measured beside what was published.",
        "Runs are kept in a pool by the digest of their config: tables share them, and an interrupted command goes on.\n"
        "An option that changes nothing for the targets is refused. A label that is published for one row and shown for\n"
        "another takes `published:` or `shown:` in front.\n\n"
        "Examples:\n"
        "  sparseffn reproduce all --dry-run                     # every run of the paper: parameters, FLOPs, time\n"
        "  sparseffn reproduce table7                            # counted, no training\n"
        "  sparseffn reproduce table3 --scale cpu --data-dir ptb/ --columns WT-S --seeds 3\n"
        "  sparseffn reproduce table10 --scale cpu --corpus stdlib --columns WT-S --rows dense sigma-moe\n"
        "  sparseffn reproduce evidence --budget 60m --data-dir ptb/",
        "reproduce:reproduce_command",
    )
    parser.add_argument(
        "targets",
        nargs="+",
        metavar="TARGET",
        help="table1 ... table10, all, evidence, fig1 ... fig11; of our own: ptb, universal, inner, sweep-k, sweep-size, "
        "sweep-experts",
    )
    parser.add_argument(
        "--scale", help="paper, base (about 10M parameters) or cpu, minutes a run (default: paper; cpu for evidence)"
    )
    parser.add_argument(
        "--settings", choices=("paper", "released"), help="the paper's, or those of the released runs (default: paper)"
    )
    parser.add_argument("--columns", nargs="+", metavar="NAME", help="only these columns: WT-S WT-B E8 ...")
    parser.add_argument("--rows", nargs="+", metavar="LABEL", help="only these rows, by the published label or the shown one")
    parser.add_argument("--seeds", nargs="+", help="a number of seeds, or several seeds (default: 1)")
    parser.add_argument("--steps", type=int, help="training steps (default: the scale's)")
    parser.add_argument("--corpus", help="corpus of scales base and cpu (default: ptb, as characters)")
    parser.add_argument("--data-dir", help="your file or folder, for corpora that have one")
    parser.add_argument("--tokenizer", help="bytes, chars, words or bpe (default: the corpus's own; characters for ptb)")
    parser.add_argument("--vocab-size", type=int, help="pieces of a bpe vocabulary (default: 8000)")
    parser.add_argument("--cache-dir", help="where token files are kept (default: the user's cache folder)")
    parser.add_argument("--pool", help="folder of the runs (default: pool in the user's cache folder)")
    parser.add_argument("--out", help="folder for the files (default: runs/figures for figures; none for tables)")
    parser.add_argument("--jobs", type=int, help="runs at once, the threads divided among them (default: 1)")
    parser.add_argument(
        "--dry-run", action="store_true", help="print every run with its cost, or of evidence the list; train nothing"
    )
    parser.add_argument("--view", action="store_true", help="print what the pool holds, or of evidence the list; train nothing")
    parser.add_argument("--budget", help="evidence: start no run that would not fit; 90s, 60m, 2h")
    parser.add_argument("--list", action="store_true", help="evidence: print the order and what is done")
    figures = parser.add_argument_group("figures")
    figures.add_argument("--from", dest="from_", nargs="+", metavar="RUN", help="finished runs to draw (figures 1 and 3 to 7)")
    figures.add_argument("--max-tokens", type=int, help="tokens of each split that are looked at (default: all)")
    figures.add_argument("--tokens", type=int, help="tokens of a timed call, figures 2 and 8 to 11 (default: 2048)")
    figures.add_argument("--time-limit", help="for what is still to be timed: 90s, 20m, 2h (default: 20m)")
    add_machine(parser)
    add_json(parser)
