"""The head that every result file has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sparseffn.bench.machine import measured_on

FORMAT = 1
"""Layout of the files; `report` refuses another."""


def result(kind: str, device: torch.device, settings: Mapping[str, Any], **content: Any) -> dict[str, Any]:
    """A JSON-able result: what it is, where it was measured, how, and what was found."""
    return {"format": FORMAT, "kind": kind, "environment": measured_on(device), "settings": dict(settings), **content}
