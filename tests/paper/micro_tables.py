"""The type of the fixture that plans tables."""

from __future__ import annotations

from collections.abc import Callable

from sparseffn.paper.planned import PlannedTable

MakeTable = Callable[..., PlannedTable]
