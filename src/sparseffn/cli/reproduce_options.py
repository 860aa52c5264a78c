"""Which options of `sparseffn reproduce` change something for which targets, and what is taken where none is given.

An option that would change nothing is refused: left in, it would let a user believe that it was heeded.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from sparseffn.errors import UserError
from sparseffn.report.statements import statements

Kind = Literal["trained", "counted", "sized", "mixed", "evidence", "drawn", "timed"]

_WORDS: Mapping[Kind, str] = {
    "trained": "tables that are trained",
    "counted": "table 7",
    "sized": "table 8",
    "mixed": "table 9",
    "evidence": "evidence",
    "drawn": "figures 1 and 3 to 7",
    "timed": "figures 2 and 8 to 11",
}

_TABLES: tuple[Kind, ...] = ("trained", "counted", "sized", "mixed")
_RUNS: tuple[Kind, ...] = ("trained", "evidence")
# Table 8 has the vocabulary and the parameters of the corpus where a small scale has one.
_CORPUS: tuple[Kind, ...] = ("trained", "sized", "evidence")

_COUNTED: Mapping[str, Kind] = {"table7": "counted", "table8": "sized", "table9": "mixed"}

USED_BY: Mapping[str, tuple[Kind, ...]] = {
    "scale": (*_TABLES, "evidence"),
    # Tables 7 and 8 have nothing of what the released runs do otherwise; table 9 has balancing and expert dropout.
    "settings": ("trained", "mixed"),
    "columns": _TABLES,
    "rows": ("trained",),
    "seeds": ("trained",),
    "steps": _RUNS,
    "corpus": _CORPUS,
    "tokenizer": _CORPUS,
    "vocab_size": _CORPUS,
    "data_dir": (*_CORPUS, "drawn"),
    "cache_dir": (*_CORPUS, "drawn"),
    "pool": _RUNS,
    "out": (*_TABLES, "evidence", "drawn", "timed"),
    # Evidence says itself why it runs one at a time.
    "jobs": _RUNS,
    "dry_run": _RUNS,
    "view": _RUNS,
    "budget": ("evidence",),
    "list": ("evidence",),
    "from_": ("drawn",),
    "max_tokens": ("drawn",),
    "tokens": ("timed",),
    "time_limit": ("timed",),
}
"""Kinds of targets that an option changes something for, by its name in the parsed options; the others hold for all."""

# What `reproduce_parser` tells as defaults; there they are None, so that what was typed can be told from what was not.
_DEFAULTS: Mapping[str, Any] = {
    "scale": "paper",
    "settings": "paper",
    "seeds": ["1"],
    "jobs": 1,
    "tokens": 2048,
    "time_limit": "20m",
}
_DEFAULTS_OF: Mapping[Kind, Mapping[str, Any]] = {
    # Evidence is what minutes on a few cores can give; `--scale base` is there for more.
    "evidence": {"scale": "cpu"},
    "drawn": {"out": "runs/figures"},
    "timed": {"out": "runs/figures"},
}


def kind_of(target: str) -> Kind:
    """What a target is to its options."""
    if target == "evidence":
        return "evidence"
    if target in statements():
        return "timed" if statements()[target]["shows"] == "bench" else "drawn"
    if target in _COUNTED:
        return _COUNTED[target]
    return "trained"


def checked(options: argparse.Namespace, targets: Sequence[str]) -> argparse.Namespace:
    """The options with the defaults of the targets.

    Raises:
        UserError: an option is given that changes nothing for any of the targets.
    """
    kinds: set[Kind] = {kind_of(target) for target in targets}
    for name, users in USED_BY.items():
        value = getattr(options, name)
        if value is not None and value is not False and not kinds.intersection(users):
            raise UserError(
                f"`{_flag(name)}` must be left out for {', '.join(targets)}, where it changes nothing; "
                f"got {_typed(name, value)}; fix: leave it out, as it is for {', '.join(_WORDS[kind] for kind in users)}"
            )
    defaults = dict(_DEFAULTS)
    for kind in kinds:
        defaults |= _DEFAULTS_OF.get(kind, {})
    given = {name: value for name, value in vars(options).items() if value is not None}
    return argparse.Namespace(**{**vars(options), **defaults, **given})


def typed(options: argparse.Namespace, names: Sequence[str]) -> str:
    """Some options as one would type them; those without a value are left out."""
    given = [(name, getattr(options, name)) for name in names]
    return " ".join(_typed(name, value) for name, value in given if value is not None and value is not False)


def _flag(name: str) -> str:
    return f"--{name.rstrip('_').replace('_', '-')}"


def _typed(name: str, value: object) -> str:
    words = [] if value is True else value if isinstance(value, list) else [value]
    return shlex.join([_flag(name), *map(str, words)])
