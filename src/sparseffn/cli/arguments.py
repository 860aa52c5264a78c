"""What the parsers of all commands share: short errors that offer the nearest names, help that tells what defaults there are.

Nothing here needs PyTorch.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from sparseffn.errors import nearest_names, unknown_name


class Help(argparse.RawDescriptionHelpFormatter):
    """Descriptions as written; a default is told where there is one and the text does not say it already."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default, text = action.default, action.help
        # A flag's False and an option's None are the absence of a value.
        if default is None or default is False or default is argparse.SUPPRESS or text is None or "(default" in text:
            return text
        return f"{text} (default: {_shown(default)})".replace("%", "%%")


def _shown(default: object) -> str:
    """A default as one would type it."""
    if isinstance(default, list | tuple):
        return " ".join(map(str, default))
    text = str(default)
    return text if text.isprintable() and text else repr(text)


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one line with a remedy. The exit code is 2."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **{"formatter_class": Help, **settings})

    # Typed loosely: the base has overloads, which differ between versions of Python.
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Parse; unlike the base's, an argument that is not known is an error."""
        words = list(sys.argv[1:] if args is None else args)
        # Before the base looks: it would first complain of the required argument that a misspelt one stands for.
        for name in _options(words, until_command=self._subparsers is not None):
            if not any(known.startswith(name) for known in self._option_string_actions):
                self.error(self._unknown_option(name))
        options, rest = super().parse_known_args(words, namespace)
        if rest:
            self.error(f"unexpected argument {rest[0]!r}")
        return options, rest

    def _unknown_option(self, name: str) -> str:
        near = nearest_names(name, set(self._option_string_actions) - {"-h", "--help"})
        hint = f"; fix: did you mean {' or '.join(near)}?" if near else ""
        return f"unknown option {name}{hint}"

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuse a value that is not among an argument's choices, offering the nearest."""
        if action.choices is not None and value not in action.choices:
            kind = action.option_strings[0] if action.option_strings else "command"
            self.error(str(unknown_name(kind, str(value), map(str, action.choices))))

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line and exit with 2."""
        remedy = "" if "; fix: " in message else f"; fix: see `{self.prog} --help`"
        self.exit(2, f"{self.prog.split()[0]}: {message}{remedy}\n")


def _options(words: Sequence[str], *, until_command: bool) -> Iterable[str]:
    """The names of long options among the words, up to the command's name where a command follows."""
    for word in words:
        if word == "--" or (until_command and not word.startswith("-")):
            return
        if word.startswith("--"):
            yield word.partition("=")[0]


def add_command(commands: Any, name: str, summary: str, text: str, function: str) -> Parser:
    """A command that runs `module:function` of this package."""
    parser = commands.add_parser(name, help=summary, description=f"{summary}\n\n{text}")
    parser.set_defaults(run=_lazy(function))
    return parser


def _lazy(function: str) -> Callable[[argparse.Namespace], int]:
    """The command's function, imported when it runs."""
    module, name = function.split(":")

    def run(options: argparse.Namespace) -> int:
        return getattr(importlib.import_module(f"sparseffn.cli.{module}"), name)(options)

    return run


def add_json(parser: Parser) -> None:
    """`--json`."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def add_machine(parser: Parser) -> None:
    """`--threads`."""
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
