"""Arguments of `sparseffn data`. Nothing here needs PyTorch."""

from __future__ import annotations

from typing import Any

from sparseffn.cli.arguments import Parser, add_command, add_json

DESCRIPTION = """\
Say which corpora there are, get them, and look at what is in them. Nothing else downloads files.

Examples:
  sparseffn data list                          every corpus: whether it is here, size, digest
  sparseffn data prepare --corpus enwik8       download, check, unpack, tokenise; goes on where it broke off
  sparseffn data check                         everything that is here, checked
  sparseffn data check --corpus stdlib         tokens, vocabulary, first lines of one corpus
"""


def add_data(commands: Any) -> None:
    """`data` and what can be done with it."""
    parser = add_command(commands, "data", "List, download, prepare and check corpora.", DESCRIPTION, "data:list_command")
    parser.set_defaults(cache_dir=None, json=False)
    kinds = parser.add_subparsers(dest="kind", metavar="WHAT")
    for add in (_list, _prepare, _check):
        add(kinds)


def _places(parser: Parser) -> None:
    parser.add_argument("--cache-dir", help="where downloads and token files are kept (default: the user's cache folder)")
    add_json(parser)


def _tokens(parser: Parser) -> None:
    parser.add_argument("--data-dir", help="your copy: the published archive, or plain files")
    parser.add_argument("--tokenizer", help="bytes, seen-bytes, chars, words or bpe (default: the corpus's own)")
    parser.add_argument("--vocab-size", type=int, help="pieces of a bpe vocabulary (default: 8000)")


def _list(kinds: Any) -> None:
    parser = add_command(
        kinds,
        "list",
        "List every corpus: whether it is here, its size, and whether its published digest was ever verified.",
        "Example:\n  sparseffn data list",
        "data:list_command",
    )
    _places(parser)


def _prepare(kinds: Any) -> None:
    parser = add_command(
        kinds,
        "prepare",
        "Get a corpus, check it, make its tokens.",
        "Where a transfer breaks off, the same command goes on. A wrong file is removed, and the next mirror is asked.\n"
        "Of your copy in --data-dir the cache keeps the text, so that later commands need no --data-dir.\n\n"
        "Examples:\n"
        "  sparseffn data prepare --corpus enwik8\n"
        "  sparseffn data prepare --corpus wikitext103 --data-dir downloads/   # holds wikitext-103-v1.zip or wiki.*.tokens",
        "data:prepare_command",
    )
    parser.add_argument("--corpus", required=True, help="one that `data list` shows")
    _tokens(parser)
    parser.add_argument("--offline", action="store_true", help="download nothing")
    parser.add_argument(
        "--accept-digest",
        nargs="+",
        metavar="DIGEST",
        help="take a file with this digest, as the error told it, for one whose published digest is unverified",
    )
    _places(parser)


def _check(kinds: Any) -> None:
    parser = add_command(
        kinds,
        "check",
        "Check a corpus that is here, without a network: size, digest, tokens, vocabulary, first lines decoded.",
        "Examples:\n  sparseffn data check\n  sparseffn data check --corpus ptb --data-dir ptb/ --tokenizer chars",
        "data:check_command",
    )
    parser.add_argument("--corpus", help="one that `data list` shows (default: all that are here)")
    _tokens(parser)
    _places(parser)
