"""A cache and texts of one's own for every test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .loopback import Loopback, loopback


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The default cache of this test."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("SPARSEFFN_CACHE", str(folder))
    return folder


@pytest.fixture
def book(tmp_path: Path) -> Path:
    """A file of 2000 lines of words and numbers."""
    path = tmp_path / "book.txt"
    path.write_text("".join(f"line {i} has {i * 7919 % 1000} words\n" for i in range(2000)))
    return path


@pytest.fixture
def server() -> Iterator[Loopback]:
    """A server without files."""
    with loopback() as served:
        yield served
