"""Fixtures of the report's tests: made-up comparisons."""

from __future__ import annotations

from typing import Any

import pytest

from .synthetic import comparison


@pytest.fixture
def result() -> dict[str, Any]:
    """Five methods, one seed."""
    return comparison()


@pytest.fixture
def seeded() -> dict[str, Any]:
    """Five methods, three seeds."""
    return comparison(seeds=(0, 1, 2))
