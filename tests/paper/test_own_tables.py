"""Tables that the paper has not: sizes, shared runs, sweeps and their curves."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from sparseffn.paper.corpus_choice import Corpora
from sparseffn.paper.execution import execute
from sparseffn.paper.measured import table_result
from sparseffn.paper.planned import NOT_PUBLISHED, PlannedTable, Request, plan_table, residual_percent
from sparseffn.paper.pool import Pool
from sparseffn.paper.scales import Scale, get_scale
from sparseffn.paper.tables import OWN_TABLES
from sparseffn.report.paper_plots import sweep_plots


def plan(name: str, micro: Scale, corpora: Corpora, columns: list[str], rows: list[str] | None = None) -> PlannedTable:
    """A table at the micro scale."""
    table = OWN_TABLES[name].selected(columns=columns, rows=rows, settings="paper")
    return plan_table(table, Request(scale=micro, corpora=corpora))


@pytest.mark.parametrize("name", list(OWN_TABLES))
def test_rows_are_of_our_own(name: str, micro: Scale) -> None:
    """None is left out as unpublished at the published scale, and no table shows a label as the paper's."""
    table, scales = OWN_TABLES[name], (micro, get_scale("paper"))
    for planned in (plan_table(table, Request(scale=s, corpora=Corpora(scale=s, closed=True))) for s in scales):
        assert NOT_PUBLISHED not in {cell.reason for cell in planned.cells}
        result = table_result(planned, Pool("."))
        assert {row.published_label for row in result.rows} == {None}
        assert {cell.published for cell in result.cells} == {None}
    assert len({row.key for row in table.rows}) == len(table.rows)


def test_column_without_its_corpus_says_why(micro: Scale, corpora: Corpora, tmp_path: Path) -> None:
    """PTB is wanted whatever corpus the other columns have; the song is no PTB."""
    cells = table_result(plan("ptb", micro, corpora, ["PTB-char"], ["dense"]), Pool(tmp_path)).cells
    assert cells[0].status == "missing" and "simple-examples.tgz must be the published file" in (cells[0].reason or "")


def test_shared_layers_are_parameter_equal(micro: Scale, corpora: Corpora, tmp_path: Path) -> None:
    """Dense and sigma-MoE within 0.5%, one block with all layers' pairs, and it trains."""
    planned = plan("universal", micro, corpora, ["WT-S shared"])
    dense, sigma = planned.cells
    assert dense.model.shared_layers and sigma.model.shared_layers
    assert abs(residual_percent(sigma, planned.columns[0])) < 0.5
    assert execute(Pool(tmp_path), sigma.specs[0]).kind == "finished"


def test_sweeps_keep_what_they_say(micro: Scale, corpora: Corpora) -> None:
    """K G and N_E G, or N_E, or K and G."""
    sizes = {}
    for name in ("sweep-k", "sweep-size", "sweep-experts"):
        mixtures = [cell.sized.ffn for cell in plan(name, micro, corpora, ["WT-S"]).cells[1:]]
        sizes[name] = [(ffn.n_channels, ffn.active_channels) for ffn in mixtures]
    assert sizes["sweep-k"] == [(128, 8 * k) for k in (1, 2, 4, 8, 16)]
    assert sizes["sweep-size"] == [(128, 32)] * 5
    assert sizes["sweep-experts"] == [(8 * n, 32) for n in (8, 16, 32, 64, 128)]


def test_sweep_is_drawn_from_its_json(micro: Scale, corpora: Corpora, tmp_path: Path) -> None:
    """The measured points, the dense level, and nothing where too few are measured."""
    planned = plan("sweep-k", micro, corpora, ["WT-S"], ["dense", "K=1", "K=4"])
    pool = Pool(tmp_path)
    assert sweep_plots(table_result(planned, pool)) == []
    for _, _, spec in planned.runs():
        execute(pool, spec)
    result = table_result(planned, pool)
    assert result.sweep is not None and (result.sweep.axis, result.sweep.x) == ("K", [None, 1.0, 4.0])
    (plot,) = sweep_plots(result)
    ElementTree.fromstring(plot.svg)
    assert plot.name == "sweep-k-wt-s" and "2 values of K between 1 and 4" in plot.caption and plot.png[:4] == b"\x89PNG"
