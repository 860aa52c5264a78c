"""Figures and words of analyses, from made-up ones: what is drawn, what is said, in which form."""

from __future__ import annotations

import re
import xml.dom.minidom
from typing import Any

from sparseffn.report.analysis_plots import analysis_plots
from sparseffn.report.analysis_report import analysis_tables, facts_line
from sparseffn.report.paper_plots import shares_panels, shares_plot
from sparseffn.report.plotting import standalone_svg
from sparseffn.results.analysis_result import AnalysisResult

from .synthetic_analysis import analysis as raw
from .synthetic_analysis import typed


def analysis(method: str = "sigma-moe", **traits: Any) -> AnalysisResult:
    """A made-up one."""
    return typed(raw(method, **traits))


ALL = ("sigma-moe", "switch", "softmax-renorm-moe")


def test_every_drawing_is_a_picture_and_a_vector() -> None:
    """PNG and well-formed SVG, with text as text, for a mixture of 2 layers; hostile tokens stay text."""
    plots = analysis_plots(analysis(n_layers=2))
    names = [plot.name for plot in plots]
    tokens = [f"tokens-{layer}" for layer in range(2)]
    assert names == ["active", "usage", "cooccurrence", *tokens, "load-entropy", "largest-load", "stability"]
    for plot in plots:
        svg = standalone_svg(plot)
        xml.dom.minidom.parseString(svg.encode())
        assert plot.png.startswith(b"\x89PNG") and "<text" in svg and plot.caption.endswith(".")
    assert "$x$" in plots[3].svg and "&lt;b&gt;&amp;" in plots[3].svg


def test_dense_run_has_no_drawing_of_experts() -> None:
    """Active channels, and the use of channels."""
    assert [plot.name for plot in analysis_plots(analysis("dense"))] == ["active", "usage"]


def test_lines_are_told_apart_without_colour() -> None:
    """Each run of figures 3 and 7 has its own dashes; every layer has its panel."""
    runs = {method: analysis(method, n_layers=16, skew=i) for i, method in enumerate(ALL)}
    plot, grid = shares_plot(runs, 8, name="fig3"), shares_panels(runs, name="fig7")
    for drawn in (plot, grid):
        dashes = {re.search(r"stroke-dasharray: [^;]*", path) for path in re.findall(r'style="fill: none[^"]*"', drawn.svg)}
        assert len({match[0] for match in dashes if match}) >= 3
        assert all(f">{method}<" in drawn.svg for method in ALL)
    assert re.findall(r">layer (\d+)<", grid.svg) == [str(i) for i in range(16)]


def test_runs_of_different_sizes_share_an_axis_in_percent() -> None:
    """8 experts beside 16; a run with fewer layers is left out of the panels that it lacks."""
    runs = {"sigma-moe": analysis(), "switch": analysis("switch", n_experts=8, n_layers=2)}
    assert "percent of 8 or 16" in shares_plot(runs, 1, name="fig3").svg
    assert shares_panels(runs, name="fig7").svg.count(">layer ") == 4


def test_tables_of_an_analysis() -> None:
    """A row a layer, sixteen experts at most."""
    found = analysis(n_experts=20)
    layers, experts = analysis_tables(found)
    assert len(layers.rows) == 4
    assert len(experts.rows) == 16 and "the 16 most used of 20" in experts.notes[1]
    assert "600,000 tokens of valid of stdlib" in facts_line(found)


def test_stability_is_not_that_of_the_rest_at_the_end() -> None:
    """The last snapshot comes with the last step, however near the one before is."""
    found = raw()
    last = found["training"]["stability"][-1]
    rest = {"from": last["to"], "to": last["to"] + 4, "layers": [{"jaccard": 1.0, "overlap": 1.0}] * len(last["layers"])}
    (full, _), (with_rest, _) = (
        analysis_tables(typed({**found, "training": {**found["training"], "stability": stability}}))
        for stability in (found["training"]["stability"], [*found["training"]["stability"], rest])
    )
    assert with_rest == full and f"from step {last['from']} to {last['to']}" in full.notes[1]
