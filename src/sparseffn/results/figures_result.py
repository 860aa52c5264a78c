"""`reproduced.json` of `sparseffn reproduce figure`: the paper's statement on each figure beside what was measured here."""

from __future__ import annotations

from typing import Literal

import msgspec


class ReproducedFigure(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    statement: str
    measured: list[str]
    """In words; empty where nothing was."""
    runs: list[str]
    """Labels of the finished runs that it is drawn from."""
    files: list[str]
    captions: list[str]
    not_drawn: str | None = None
    """Why there is no picture."""


class FiguresOfPaper(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="paper-figures"):
    format: Literal[1] = 1
    source: str
    """Of the statements."""
    figures: list[ReproducedFigure]
