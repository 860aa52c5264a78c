"""Figures and words of analyses, from made-up ones: what is drawn, what is said, in which form."""

from __future__ import annotations

import re
import xml.dom.minidom
from typing import Any

import msgspec
import pytest

from sparseffn.report.analysis_plots import analysis_plots
from sparseffn.report.analysis_report import analysis_tables, facts_line
from sparseffn.report.paper_plots import shares_panels, shares_plot
from sparseffn.report.plotting import standalone_svg
from sparseffn.report.statements import active_words, bench_words, markdown, pair_words, share_words, statements
from sparseffn.results.analysis_result import AnalysisResult
from sparseffn.results.bench_result import FiguresResult

from .synthetic_analysis import analysis as raw
from .synthetic_analysis import typed
from .synthetic_bench import figures_result


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


def test_statements_are_the_eleven_of_the_paper() -> None:
    """With the source; each says what is drawn."""
    found = statements()
    assert "arXiv 2310.10837" in found["source"]
    assert [name for name in found if name != "source"] == [f"fig{n}" for n in range(1, 12)]
    assert {found[f"fig{n}"]["shows"] for n in (2, 8, 9, 10, 11)} == {"bench"}
    assert "below 200 of 2053 in every layer" in found["fig1"]["statement"]


@pytest.mark.parametrize(
    ("name", "active", "words"),
    [
        ("fig1", 0.05, "at most 102 of 2,048 channels active (5.0%, layer 0)"),
        ("fig1", 0.05, "below the paper's bound (200 of 2,053, 9.7%) in every layer"),
        ("fig1", 0.11, "not below the paper's bound (200 of 2,053, 9.7%) in 2 of 4 layers"),
        ("fig4", 0.05, "not below the paper's bound (about 5%) in 1 of 4 layers"),
    ],
    ids=["numbers", "holds", "fails", "at-the-bound"],
)
def test_active_channels_are_held_against_the_bound(name: str, active: float, words: str) -> None:
    """Layers fall by a tenth: 11%, 9.9%, 8.9%, 8.0%."""
    assert words in active_words(statements()[name], "dense", analysis("dense", active=active))


def test_shares_in_words_name_what_is_missing_and_what_differs() -> None:
    """The least even layer for all; no word on the collapse of a method without a run; another number of steps is said."""
    other = raw("switch", skew=3)
    other["run"]["steps"] = 60
    words = share_words(statements()["fig7"], {"sigma-moe": analysis(), "switch": typed(other)}, None)
    assert "in its least even layer, 3" in words[1] and "dead (selected under 1% of the mean): 3 of 16" in words[1]
    assert words[2] == "No run of softmax-renorm-moe was given: nothing is said of its collapse."
    assert words[3] == "The runs are of different numbers of steps: 150, 60."
    assert len(share_words(statements()["fig3"], {method: analysis(method) for method in ALL}, 1)) == 3


def test_pairs_in_words() -> None:
    """Fifteen partners alike but for one row of sixteen, which prefers one."""
    words = pair_words("sigma-moe", analysis(), 3)
    assert "takes 53.3% of its row (expert 3 with 1; even would be 6.7%)" in words
    assert re.search(r"goes with 14\.\d of 15 others", words)


def test_benchmark_in_words() -> None:
    """Ratios at both ends and growth of both; nothing measured is said so."""
    result = figures_result()
    time, memory, measured = bench_words(figures(result), 9)
    assert time.startswith(
        "Time of sigma-MoE over the dense block: 0.40\u00d7 to 0.40\u00d7 for N_E 8 to 256; over these 32 times"
    )
    assert memory.endswith("over these 32 times the dense block's grows 32.0 times, sigma-MoE's 32.0 times.")
    assert measured == "Measured with 2,048 tokens, float32, 2 threads."
    assert bench_words(figures(result | {"points": []}), 2)[0].startswith("Nothing was measured: 2 points fit neither")


def figures(result: dict[str, Any]) -> FiguresResult:
    """As it is read from its file."""
    return msgspec.convert(result, FiguresResult)


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


def test_markdown_sets_statement_and_measurement_beside_the_picture() -> None:
    """And says where nothing was drawn."""
    entry = {"name": "fig1", "statement": "S.", "measured": ["M."], "files": ["fig1.png", "fig1.svg"], "captions": ["C."]}
    text = markdown([entry, {**entry, "name": "fig3", "files": [], "captions": [], "not_drawn": "of N"}])
    assert "![fig1](fig1.png)\n\n**Paper:** S.\n\n**Here:**\n\n- M.\n\n*C.*" in text
    assert "## fig3\n\nNot drawn: of N." in text
