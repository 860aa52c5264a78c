"""A plain table, for the terminal and for the page."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Sheet:
    """Its head, its rows, and how many leading columns hold words instead of numbers."""

    head: tuple[str, ...]
    rows: list[tuple[str, ...]]
    n_words: int
    title: str = ""
    """What the table shows; empty where a heading says so."""
    notes: tuple[str, ...] = ()
    """Lines below the table."""
