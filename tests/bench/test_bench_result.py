"""Files of the benchmark: those of version 0.1 are read, damaged ones are refused by field."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sparseffn.errors import UserError
from sparseffn.results.bench_result import BenchResult, LayerResult
from sparseffn.storage import read

COMMITTED = Path(__file__).parents[2] / "results" / "bench-layer-paper-2-cores.json"


def test_file_of_0_1_is_read_whole() -> None:
    """Every field of the committed measurement comes back under its name."""
    found = read(COMMITTED, BenchResult, fix="")
    assert isinstance(found, LayerResult) and found.kind == "layer" and len(found.rows) == 99
    assert found.rows[0].check.tokens == 1 and found.expert_counts is not None
    before, after = json.loads(COMMITTED.read_text()), json.loads(msgspec.json.encode(found))
    assert before == after


def median_as_text(data: dict[str, Any]) -> None:
    data["rows"][3]["forward"]["median_s"] = "0.1"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (median_as_text, "`rows[3].forward.median_s`, a float"),
        (lambda data: data.update(format=2), "`format` of the result must be 1; got 2"),
        (lambda data: data.update(kind="compare"), "compare"),
        (lambda data: data.pop("roof"), "`roof`; got nothing"),
    ],
    ids=["field", "format", "kind", "absent"],
)
def test_damaged_file_is_refused(damage: Callable[[dict[str, Any]], object], message: str, tmp_path: Path) -> None:
    """By path and field."""
    data = json.loads(COMMITTED.read_text())
    damage(data)
    path = tmp_path / "layer.json"
    path.write_text(json.dumps(data))
    with pytest.raises(UserError) as error:
        read(path, BenchResult, fix="measure again")
    assert message in str(error.value) and str(path) in str(error.value)
