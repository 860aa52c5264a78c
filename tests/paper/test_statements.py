"""The paper's statements on its figures, and what is said of measurements beside them."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest
from msgspec import structs

from sparseffn.paper.statements import active_words, bench_words, pair_words, share_words, source, statements
from sparseffn.report.paper_report import figures_markdown
from sparseffn.results.analysis_result import AnalysisResult
from sparseffn.results.bench_result import FiguresResult
from sparseffn.results.figures_result import FiguresOfPaper, ReproducedFigure

ALL = ("sigma-moe", "switch", "softmax-renorm-moe")
RUN = {
    "name": "run",
    "params": 2_400_000,
    "d_model": 64,
    "n_layers": 4,
    "n_channels": 2048,
    "active_channels": 512,
    "corpus": "stdlib",
    "digest": "0",
    "steps": 150,
    "valid_nats": 2.0,
}


def analysis(method: str = "sigma-moe", *, active: float = 0.05, steps: int = 150) -> AnalysisResult:
    """Four layers of sixteen experts, each used less evenly than the one before, three of which are dead in the last.

    A share `active` of the channels is active in the first layer, a tenth less in each further one. Experts go with one another
    alike, but for the fourth, which prefers the second.
    """
    even = [[0.0 if i == j else 1 / 15 for j in range(16)] for i in range(16)]
    even[3] = [0.0 if j == 3 else 8 / 15 if j == 1 else 0.5 / 15 for j in range(16)]
    loads = {"n_units": 16, "entropy": 0.9, "largest_over_mean": 2.0}
    return msgspec.convert(
        {
            "run": {**RUN, "method": method, "steps": steps},
            "splits": ["valid"],
            "n_tokens": 1000,
            "unit": "experts",
            "usage": [{"layer": n, "share": [0.125, *[0.875 / 15] * 15], "uniform": 1 / 16} for n in range(4)],
            "active": [{"layer": n, "mean": 2048 * active * 0.9**n, "std": 1.0, "total": 2048} for n in range(4)],
            "load": [{**loads, "layer": n, "weight_entropy": 0.9 - n / 100, "n_dead": 3 * (n == 3)} for n in range(4)],
            "cooccurrence": [even] * 4,
        },
        AnalysisResult,
    )


def test_statements_are_the_eleven_of_the_paper() -> None:
    """With the source; each says what is drawn."""
    assert "arXiv 2310.10837" in source()
    assert list(statements()) == [f"fig{n}" for n in range(1, 12)]
    assert {statements()[f"fig{n}"].shows for n in (2, 8, 9, 10, 11)} == {"bench"}
    assert "below 200 of 2053 in every layer" in statements()["fig1"].statement


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
    runs = {"sigma-moe": analysis(), "switch": analysis("switch", steps=60)}
    words = share_words(statements()["fig7"], runs, None)
    assert words[0].startswith(
        "sigma-moe (2.40 M, stdlib, 150 steps): in its least even layer, 3, the most used expert takes 2.0"
    )
    assert "dead (selected under 1% of the mean): 3 of 16" in words[1]
    assert words[2] == "No run of softmax-renorm-moe was given: nothing is said of its collapse."
    assert words[3] == "The runs are of different numbers of steps: 150, 60."
    assert len(share_words(statements()["fig3"], {method: analysis(method) for method in ALL}, 1)) == 3


def test_pairs_in_words() -> None:
    """Fifteen partners alike but for one row of sixteen, which prefers one."""
    words = pair_words("sigma-moe", analysis(), 3)
    assert "takes 53.3% of its row (expert 3 with 1; even would be 6.7%)" in words
    assert re.search(r"goes with 14\.\d of 15 others", words)


def benchmark(*points: tuple[int, float, float]) -> FiguresResult:
    """Figure 9 with the seconds of the dense block and the mixture at some N_E; bytes are a hundred times as many."""

    def layer(seconds: float) -> dict[str, Any]:
        timed = {"median_s": seconds, "q1_s": seconds, "q3_s": seconds, "n": 5}
        timed |= dict.fromkeys(("limit_s", "limit_arithmetic_s", "limit_bytes_s", "gradient_s", "over_limit"), 1.0)
        sizes = dict.fromkeys(("saved_bytes", "selection_bytes", "input_bytes", "output_bytes", "gradient_bytes"), 1)
        return {"forward": timed, "training": timed, "memory_bytes": round(100 * seconds), **sizes}

    kept = [
        {"figure": 9, "value": n, "variable": "N_E", "blocks": {}, "layers": {"dense": layer(dense), "sigma-moe": layer(moe)}}
        for n, dense, moe in points
    ]
    texts = ("sparseffn", "python", "torch", "numpy", "cpu", "platform", "device", "blas", "cpu_capability", "date")
    counts = ("last_level_cache_bytes", "memory_bytes", "cpus")
    environment: dict[str, Any] = {**dict.fromkeys(texts, "x"), **dict.fromkeys(counts, 1), "load_average": 0.0, "threads": 2}
    settings = {"tokens": 2048, "dtype": "float32", "device": "cpu", "backend": "auto", "rounds": 5}
    return msgspec.convert(
        {
            "kind": "figures",
            "format": 1,
            "environment": environment | {"last_level_cache_source": "x"},
            "settings": settings,
            "figures": [9],
            "points": kept,
            "left_out": [],
            "sweeps": {
                number: {"variable": name, "values": [], "fixed": ""} for number, name in (("9", "N_E"), ("2", "d_model"))
            },
        },
        FiguresResult,
    )


def test_benchmark_in_words() -> None:
    """Ratios at both ends and growth of both; nothing measured is said so."""
    words = bench_words(benchmark((8, 1.0, 0.5), (256, 30.0, 0.6)), 9)
    assert words[0] == (
        "Time of sigma-MoE over the dense block: 0.50× to 0.020× for N_E 8 to 256; over these 32 times the dense block's grows "  # noqa: RUF001
        "30.0 times, sigma-MoE's 1.2 times."
    )
    assert words[2] == "Measured with 2,048 tokens, float32, 2 threads."
    nothing = bench_words(benchmark(), 2)
    assert nothing == ["Nothing was measured: 0 points fit neither the time limit nor half of the memory."]


def test_markdown_sets_statement_and_measurement_beside_the_picture() -> None:
    """And says where nothing was drawn."""
    drawn = ReproducedFigure(
        name="fig1", statement="S.", measured=["M."], runs=[], files=["fig1.png", "fig1.svg"], captions=["C."]
    )
    not_drawn = structs.replace(drawn, name="fig3", files=[], captions=[], not_drawn="of N")
    text = figures_markdown(FiguresOfPaper(source="here", figures=[drawn, not_drawn]))
    assert "![fig1](fig1.png)\n\n**Paper:** S.\n\n**Here:**\n\n- M.\n\n*C.*" in text
    assert "## fig3\n\nNot drawn: of N." in text
