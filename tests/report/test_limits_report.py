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


def test_missed_aims_are_listed() -> None:
    """Ratios at the limit are those of a time that is the limit; an aim that is reached is not listed."""
    layers, experts = measured()
    row = next(r for r in layers[1].rows if (r.shape, r.tokens, r.label) == ("wt-b", 1024, "sigma-moe"))

    def listed(value: float) -> dict[tuple[str, ...], list[str]]:
        """The table if that row's time over dense were another."""
        time = msgspec.structs.replace(row.forward, over_dense_over_share=value)
        rows = tuple(msgspec.structs.replace(r, forward=time) if r is row else r for r in layers[1].rows)
        table = limits_table([layers[0], msgspec.structs.replace(layers[1], rows=rows)], experts)
        return {tuple(c.text for c in made.cells[:3]): [c.text for c in made.cells] for made in table.rows}

    missed, reached = listed(1.53), listed(1.29)
    key = ("wt-b, bfloat16, 1,024", "forward", "over dense x K/N_E")
    assert missed.keys() - reached.keys() == {key}
    assert missed[key][3] == f"{1e6 * row.forward.median_s:,.0f}" and missed[key][8:10] == ["1.3", "1.53"]
    assert float(missed[key][10]) == pytest.approx(1.53 / row.forward.over_limit, abs=0.005)


def test_every_aim_has_a_row() -> None:
    """None names a shape, a type or a number of tokens that the files lack."""
    layers, experts = measured()
    found = {(row.shape, result.settings.dtype, row.tokens, row.label) for result in layers for row in result.rows}
    found |= {(row.shape, row.dtype, row.tokens, "sigma-moe") for row in experts.rows if not row.peer}
    assert {(aim.shape, aim.dtype, aim.tokens, aim.label) for aim in AIMS} <= found
