"""Experiments whose rules stood before their runs: `rules.toml`, checked."""

from __future__ import annotations

import functools
import itertools
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Literal

import msgspec

from sparseffn.errors import UserError
from sparseffn.paper.published import PublishedPair


class Candidate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model with its schedule."""

    name: str
    row: str
    """Key in table 10, whose settings it has."""
    d_model: int | None = None
    """In place of the column's; see `Column.resized` for what follows it."""
    d_ff: int | None = None
    """Of a dense block, in place of the column's."""
    n_experts: int | None = None
    """Of a mixture with the column's K and G; one of other G has as many pairs."""
    lr: float | None = None
    """In place of the column's."""
    steps_share: float = 1.0
    """Of the column's steps; the learning rate decays over those that are left."""
    later: bool = False
    """Whether its runs come after those of the others, for all seeds up to a look."""


class Contrast(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A sum of candidates' losses, one for each seed."""

    name: str
    words: str
    weights: Mapping[str, float]
    claimed: Literal["better", "worse"] | None = None
    """Below 0, above 0, or nothing: only the interval is asked for."""
    needs: str | None = None
    """Contrast that must be confirmed before this one says anything."""
    published: Sequence[PublishedPair] = ()
    """Whose weighted sum the paper gives for it."""


class Rule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An experiment: what is trained, which seeds, when it is looked at, and what decides."""

    claims: str
    question: str
    scale: str
    column: str
    reference: str
    """Candidate whose loss percentages are of."""
    seeds: Sequence[int]
    shares: str | None = None
    """Experiment that has some of its runs too, with the same seeds."""
    looks: Sequence[int]
    alpha: float
    power: float
    bounds: Sequence[float]
    candidates: Sequence[Candidate]
    contrasts: Sequence[Contrast] = ()
    collapse: Sequence[str] = ()
    """Candidates that are claimed to collapse; see `paper.collapse`."""

    def __post_init__(self) -> None:
        names = {candidate.name for candidate in self.candidates}
        wanted = {self.reference, *self.collapse, *(name for contrast in self.contrasts for name in contrast.weights)}
        if unknown := sorted(wanted - names):
            raise UserError(
                f"`weights`, `collapse` and `reference` must name candidates; got {unknown}; fix: one of {sorted(names)}"
            )
        if len(self.looks) != len(self.bounds) or list(self.looks) != sorted(set(self.looks)):
            raise UserError(f"`looks` must ascend, with a bound each; got {list(self.looks)}, bounds {list(self.bounds)}")
        if self.looks[-1] != len(self.seeds) or len(set(self.seeds)) != len(self.seeds):
            raise UserError(f"`seeds` must be as many different ones as the last look has; got {list(self.seeds)}")
        before: set[str] = set()
        for contrast in self.contrasts:
            if abs(sum(contrast.weights.values())) > 1e-9:
                raise UserError(f"`weights` must sum to 0; got {dict(contrast.weights)} of {contrast.name!r}")
            if contrast.needs is not None and contrast.needs not in before:
                raise UserError(f"`needs` must name a contrast that stands before; got {contrast.needs!r}")
            before.add(contrast.name)


@functools.cache
def rules() -> Mapping[str, Rule]:
    """Every experiment by name, the most decisive first."""
    text = resources.files("sparseffn.paper").joinpath("rules.toml").read_text(encoding="utf-8")
    return {name: msgspec.convert(found, Rule) for name, found in tomllib.loads(text).items()}


def in_order(rule: Rule) -> list[tuple[int, Candidate]]:
    """Seeds and candidates as they are trained: up to each look all of a seed before the next, then those that come later."""
    order: list[tuple[int, Candidate]] = []
    for start, end in itertools.pairwise([0, *rule.looks]):
        for later in (False, True):
            chosen = [candidate for candidate in rule.candidates if candidate.later == later]
            order += [(seed, candidate) for seed in rule.seeds[start:end] for candidate in chosen]
    return order
