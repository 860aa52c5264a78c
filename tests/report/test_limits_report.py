"""What stands against the aims that were missed, from result files alone."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from sparseffn.report.limits_report import AIMS, limits_table
from sparseffn.results.bench_result import ExpertsResult, LayerResult
from sparseffn.storage import read

RESULTS = Path(__file__).parents[2] / "results"


def measured() -> tuple[list[LayerResult], ExpertsResult]:
    """The repository's files."""
    paths = (RESULTS / f"bench-layer-paper-2-cores{dtype}.json" for dtype in ("", "-bfloat16"))
    return [read(p, LayerResult, fix="") for p in paths], read(RESULTS / "bench-experts-2-cores.json", ExpertsResult, fix="")


def test_every_aim_was_measured_and_the_missed_ones_are_listed() -> None:
    """Ratios at the limit are those of a time that is the limit; an aim that is reached is not listed."""
    layers, experts = measured()
    row = next(r for r in layers[1].rows if (r.shape, r.tokens, r.label) == ("wt-b", 1024, "sigma-moe"))
    cells = {tuple(c.text for c in made.cells[:3]): [c.text for c in made.cells] for made in limits_table(layers, experts).rows}
    own = cells["wt-b, bfloat16, 1,024", "forward", "over dense x K/N_E"]
    assert own[3] == f"{1e6 * row.forward.median_s:,.0f}" and own[8] == "1.3"
    at_limit = row.forward.over_dense_over_share / row.forward.over_limit
    assert float(own[10]) == pytest.approx(at_limit, abs=0.005)
    faster = msgspec.structs.replace(row, forward=msgspec.structs.replace(row.forward, over_dense_over_share=1.29))
    better = msgspec.structs.replace(layers[1], rows=tuple(faster if r is row else r for r in layers[1].rows))
    left = [tuple(c.text for c in made.cells[:3]) for made in limits_table([layers[0], better], experts).rows]
    assert set(cells) - set(left) == {("wt-b, bfloat16, 1,024", "forward", "over dense x K/N_E")}


def test_every_aim_has_a_row() -> None:
    """None names a shape, a type or a number of tokens that the files lack."""
    layers, experts = measured()
    found = {
        (row.shape, result.settings.dtype, row.tokens) for result in layers for row in result.rows if row.label == "sigma-moe"
    }
    found |= {(row.shape, row.dtype, row.tokens) for row in experts.rows if not row.peer}
    assert {(aim.shape, aim.dtype, aim.tokens) for aim in AIMS} <= found
