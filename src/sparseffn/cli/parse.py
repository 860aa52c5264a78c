"""Words of the command line into a command's settings: which commands there are, errors in one line, help.

Nothing here needs PyTorch: a command's module is imported when it runs.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn, TypeVar

import tyro
from tyro import _errors as rejected
from tyro._arguments import ArgumentDefinition

from sparseffn.cli import bench_settings as bench
from sparseffn.cli import reproduce_settings as reproduce
from sparseffn.cli import run_settings, settings
from sparseffn.cli.process import launched_processes, share_cores
from sparseffn.errors import UserError, nearest_names, unknown_name

Settings = TypeVar("Settings")

# Commands by name: the class of their settings, and the function that runs them.
COMMANDS: dict[str, tuple[type[Any], str]] = {
    "methods": (settings.Methods, "describe:methods"),
    "match": (settings.Matched, "describe:match"),
    "compare": (run_settings.Compare, "runs:compare_methods"),
    "train": (run_settings.Train, "runs:train_run"),
    "plan": (run_settings.Plan, "plan:plan_run"),
    "eval": (run_settings.Eval, "runs:evaluate_run"),
    "generate": (run_settings.Generate, "runs:generate"),
    "export": (run_settings.Export, "export:export"),
    "analyze": (run_settings.Analyze, "analyze:analyze"),
    "convert": (run_settings.Convert, "convert:convert_model"),
    "bench layer": (bench.BenchLayer, "bench:layer"),
    "bench experts": (bench.BenchExperts, "bench:experts"),
    "bench hf": (bench.BenchHf, "bench:hf"),
    "bench step": (bench.BenchStep, "bench:step"),
    "bench memory": (bench.BenchMemory, "bench:memory"),
    "bench roofline": (bench.BenchRoofline, "bench:roofline"),
    "bench figures": (bench.BenchFigures, "bench:figures"),
    "bench kernels": (bench.BenchKernels, "bench:kernels"),
    "bench gpu": (bench.BenchGpu, "bench:gpu"),
    "reproduce table": (reproduce.ReproduceTable, "reproduce:tables"),
    "reproduce figure": (reproduce.ReproduceFigure, "reproduce_figures:figures"),
    "reproduce evidence": (reproduce.ReproduceEvidence, "reproduce:evidence"),
    "study": (run_settings.Study, "analyze:study_selectors"),
    "data list": (settings.DataList, "data:list_all"),
    "data prepare": (settings.DataPrepare, "data:prepare"),
    "data check": (settings.DataCheck, "data:check"),
    "doctor": (settings.Doctor, "describe:doctor"),
}

SEVERAL = ("train", "eval", "compare", "study", "reproduce table", "reproduce figure", "reproduce evidence")
"""Commands that several processes, started by torchrun, may run together."""

TRAINING = (*SEVERAL, "convert")
"""Commands that run for long, beside other work; a benchmark has the machine alone, and times single tokens."""

GROUPS = {
    "": """Compare Transformer feedforward blocks at equal parameter count: Top-K, product keys, mixtures of experts.

  sparseffn methods                        what there is
  sparseffn compare --methods dense topk pkm sigma-moe --budget 8m --out runs/first""",
    "bench": """Measure speed and memory, interleaved in one run.

Nothing is flattered: candidates alternate in one run, every ratio is within that run, few tokens are timed with weights that
come from memory, and no speed is reported for a layer that disagrees with float64.

Example:
  sparseffn bench layer --preset paper     one layer of each method against dense and installed peers""",
    "reproduce": """Reproduce tables, figures and claims of arXiv 2310.10837.

Examples:
  sparseffn reproduce table all --scale paper --dry-run    every run of the paper with its cost
  sparseffn reproduce evidence --budget 60m                the runs that decide the claims""",
    "data": """List, download, prepare and check corpora. Nothing else downloads files.

Examples:
  sparseffn data list                          every corpus: whether it is here, size, digest
  sparseffn data prepare --corpus enwik8       download, check, unpack, tokenise; goes on where it broke off
  sparseffn data check --corpus stdlib         tokens, vocabulary, first lines of one corpus""",
}
"""Help of what has commands below it."""

_HELP = ("-h", "--help")
# The command of a group that is named alone.
_ALONE = {"data": "data list"}


def run(words: Sequence[str]) -> int:
    """Run the command that the words name; returns the exit code.

    Raises:
        UserError: the words name no command or no option, or a value cannot be used.
        SystemExit: help was asked for and is printed.
    """
    name, rest = _command(list(words))
    n = launched_processes()
    if name not in SEVERAL and n != "1":
        raise UserError(f"`{name}` must run in one process; got {n} of a launcher; fix: start it without torchrun")
    chosen, function = COMMANDS[name]
    parsed = parse(name, chosen, rest)
    if name in TRAINING:
        share_cores()
    module, function_name = function.split(":")
    return getattr(importlib.import_module(f"sparseffn.cli.{module}"), function_name)(parsed)


def _command(words: list[str]) -> tuple[str, list[str]]:
    """The command's name and the words behind it."""
    group = words[0] if words and words[0] in GROUPS else ""
    depth = 1 if group else 0
    below = dict.fromkeys(_below(group))
    if len(words) == depth:
        if group in _ALONE:
            return _ALONE[group], []
        raise UserError(f"a command must follow; got none; fix: see `{_prog(group)} --help`")
    word = words[depth]
    if word in _HELP:
        _print_overview(group)
    if word not in below:
        raise _unknown_command(group, word, below)
    return f"{group} {word}".strip(), words[depth + 1 :]


def _below(group: str) -> Iterable[str]:
    """Names of the commands of a group; of "", the first words of all."""
    for name in COMMANDS:
        first, _, second = name.partition(" ")
        if not group:
            yield first
        elif first == group:
            yield second


def _unknown_command(group: str, word: str, known: Iterable[str]) -> UserError:
    if group == "reproduce" and (kind := re.fullmatch(r"(table|fig)\d+|all|ptb|universal|inner|sweep-\w+", word)):
        kind = "figure" if kind[1] == "fig" else "table"
        return UserError(f"`reproduce {word}` must name what to reproduce first; fix: sparseffn reproduce {kind} {word}")
    return unknown_name("command", word, known)


def _prog(name: str) -> str:
    return f"sparseffn {name}".strip()


def _print_overview(group: str) -> NoReturn:
    """What a group is for, and its commands."""
    print(f"usage: {_prog(group)} COMMAND ...\n\n{GROUPS[group]}\n\ncommands:")
    for name in dict.fromkeys(_below(group)):
        full = f"{group} {name}".strip()
        text = GROUPS[full] if full in GROUPS else inspect.getdoc(COMMANDS[full][0]) or ""
        print(f"    {name:<10}{text.splitlines()[0]}")
    print(f"\n`{_prog(group)} COMMAND --help` has the options of a command and examples")
    raise SystemExit(0)


def parse(name: str, chosen: type[Settings], words: Sequence[str]) -> Settings:
    """The settings that a command's words say.

    Raises:
        UserError: an option or a value that the command does not know.
        SystemExit: help was asked for and is printed.
    """

    def refuse(event: rejected.ParseErrorEvent) -> NoReturn:
        message = _message(event, chosen)
        raise UserError(message if "; fix: " in message else f"{message}; fix: see `{_prog(name)} --help`")

    if any(word in _HELP for word in words):
        print("\n\n".join(map(_wrapped, (inspect.getdoc(chosen) or "").split("\n\n"))), end="\n\n")
    markers = (tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone, tyro.conf.HelptextFromCommentsOff)
    with rejected.on_parse_error(refuse):
        parsed = tyro.cli(chosen, args=words, prog=_prog(name), description="", config=markers)
    for field in dataclasses.fields(chosen):  # pyright: ignore[reportArgumentType]
        # A list may be left out, but not be named and left empty; nor may one that is required be empty.
        given = _flag(field.name) in words or field.default is dataclasses.MISSING
        if given and getattr(parsed, field.name) == ():
            shown = field.name.upper() if _is_positional(field) else _flag(field.name)
            raise UserError(f"`{shown}` must have at least one value; got none; fix: see `{_prog(name)} --help`")
    return parsed


def _wrapped(paragraph: str) -> str:
    """A paragraph in lines of the terminal's width; examples stay as they are."""
    if "\n " in paragraph:
        return paragraph
    return textwrap.fill(paragraph, min(shutil.get_terminal_size().columns, 110), break_on_hyphens=False)


def _is_positional(field: dataclasses.Field[Any]) -> bool:
    return "Positional" in str(field.type) or field.type == "Run"


def _flag(field: str) -> str:
    return f"--{field.rstrip('_').replace('_', '-')}"


def _message(event: rejected.ParseErrorEvent, chosen: type[Any]) -> str:
    """What is wrong, in one line."""
    match event:
        # A misspelt option may stand for a required one, which would then be reported as missing.
        case rejected.UnrecognizedArgs(tokens=words) | rejected.MissingArgs(unrecognized_tokens=[_, *_] as words):
            return _unknown_option(words, chosen)
        case rejected.MissingArgs(missing_arguments=missing):
            return f"`{'`, `'.join(_shown(found.arg) for found in missing)}` must be given; got none"
        case rejected.MissingMutexGroup(groups=[members, *_]):
            return f"`{'` or `'.join(_shown(found.arg) for found in members)}` must be given; got neither"
        case rejected.MutexConflict(first_token=first, second_token=second):
            return f"`{first}` and `{second}` must not both be given; got both; fix: leave out one of them"
        case rejected.InvalidChoice(argument=argument, value=value, choices=choices):
            return str(unknown_name(_shown(argument), value, choices))
        case rejected.BadValue(argument=argument):
            return f"`{_shown(argument)}` must have a value; got none"
        case rejected.InstantiationFailure(message=message, argument=argument) if argument is not None:
            kind = "a whole number" if str(argument.lowered.metavar).startswith(("INT", "N ")) else "a number"
            value = re.findall(r"'([^']*)'", message)
            return f"`{_shown(argument)}` must be {kind}; got {(value or [message])[-1]!r}"
    return f"cannot be understood: {event}"


def _shown(argument: ArgumentDefinition) -> str:
    """An option's name, or what help calls a word without one."""
    return str(argument.lowered.metavar) if argument.is_positional() else argument.lowered.name_or_flags[0]


def _unknown_option(words: Sequence[str], chosen: type[Any]) -> str:
    named = [word.partition("=")[0] for word in words if word.startswith("--")]
    if not named:
        return f"unexpected argument {words[0]!r}"
    near = nearest_names(named[0], [_flag(field.name) for field in dataclasses.fields(chosen) if not _is_positional(field)])
    return f"unknown option {named[0]}" + (f"; fix: did you mean {' or '.join(near)}?" if near else "")
