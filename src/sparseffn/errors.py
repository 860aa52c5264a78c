"""Errors meant for users: what was expected, what came, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Input that cannot be used. The message names the value and the remedy; the command line prints it and exits with 2."""


class UnmatchedError(UserError):
    """A method cannot be brought to the parameters that it is to have. The command line prints it and exits with 1."""


class NonFiniteError(UserError):
    """A tensor that must be finite holds NaN or infinity: a model that diverged, mostly."""


class Interrupted(KeyboardInterrupt):
    """A run was asked to end by a signal; the text says where it stands and how it goes on."""

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text)
        self.exit_code = 128 + number
        """As a shell gives it for a process that ends by the signal."""


def nearest_names(name: str, known: Iterable[str]) -> list[str]:
    """At most three of the accepted names, those that a misspelt one may stand for, the nearest first."""
    return difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.5)


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not among `known`, offering the nearest ones.

    Args:
        kind: what is being named, in the singular ("method", "corpus").
        name: what the user wrote.
        known: every accepted name.
    """
    names = sorted(known)
    near = nearest_names(name, names)
    hint = f"did you mean {' or '.join(repr(n) for n in near)}?" if near else f"choose one of {', '.join(names)}"
    return UserError(f"unknown {kind} {name!r}; fix: {hint}")
