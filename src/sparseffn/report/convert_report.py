"""Tables, drawing and page of a conversion, made from its `convert.json` alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import to_builtins

from sparseffn.report import formats
from sparseffn.report.page import Page, Section, page_html, write_texts
from sparseffn.report.plotting import Line, Plot, line_plot, log_heights, pointed_style, write_plots
from sparseffn.report.table import Table
from sparseffn.results.convert_result import ConvertedBlock, ConvertFacts, ConvertResult, Loss
from sparseffn.stats import mean_std

_READING = (
    "Perplexity is that of the held-out text, every window on its own; the interval says how far another text of the same kind "
    "could have changed the ratio. The error of a block is the square of what its output deviates by from the dense block's, "
    "over the square of that, a mean over tokens, on the dense model's own inputs. Active pairs are those that a token uses. "
    "Both models are timed in turns on one sequence; FLOPs are those of the feedforward blocks alone."
)

# Options of the ways to fill as they are where nobody chooses (`sparseffn.hf`, which needs the extra).
USUAL_FILL: Mapping[str, Any] = {"by": "coactivation", "rounds": 10, "router_steps": 200, "redraw": 0.0}


def write_conversion(result: ConvertResult, folder: Path, *, drawn: bool = True) -> list[Path]:
    """Write `page.html` and, where matplotlib is there, the drawing as SVG and PNG; returns what a reader opens."""
    plots = conversion_plots(result) if drawn else []
    written = write_texts({folder / "page.html": conversion_page(result, plots)})
    write_plots(plots, folder)
    return [folder / "convert.json", *written]


def facts_line(result: ConvertResult) -> str:
    text, facts = result.calibration, result.facts
    fits = facts.fill == "split" or facts.distill or facts.end_to_end
    return (
        f"{result.model}, {formats.count(result.params_before)} parameters before, {formats.count(result.params_after)} after; "
        f"{f'fitted on {formats.integer(text.tokens)} tokens of {text.name}, ' if fits else ''}"
        f"measured on {formats.integer(result.held_out.tokens)} of {result.held_out.name}"
    )


def described(facts: ConvertFacts) -> str:
    """Method and way to fill with their options, as one types them: `sigma-moe n_experts=2 k=1 from upcycle redraw=0.5`."""
    unusual = {key: value for key, value in facts.fill_options.items() if value != USUAL_FILL.get(key)}
    options, of_fill = (
        [f"{key}={formats.setting(value)}" for key, value in given.items()] for given in (facts.options, unusual)
    )
    return " ".join([facts.method, *options, "from", facts.fill, *of_fill])


def conversion_tables(result: ConvertResult) -> list[Table]:
    """The model, its speed, its blocks."""
    return [_model_table(result), _speed_table(result), _blocks_table(result.blocks)]


def change(loss: Loss) -> str:
    """`+2.4% [+2.1%, +2.8%]`, of the perplexity against the dense model's."""
    if loss.difference is None or loss.change is None:
        return formats.NOT_MEASURED
    found = loss.difference
    low, middle, high = (formats.signed_percent(100 * share) for share in _shares(found.low, found.difference, found.high))
    return f"{middle} [{low}, {high}]"


def _shares(*nats: float) -> list[float]:
    return [math.expm1(value) for value in nats]


def _model_table(result: ConvertResult) -> Table:
    facts = result.facts
    losses: dict[str, Loss] = {"dense": result.dense, "filled, not trained": result.filled}
    if facts.distill or facts.end_to_end:
        losses[f"distilled, {facts.distill} + {facts.end_to_end} steps"] = result.converted
    rows = [
        (
            label,
            formats.loss(loss.perplexity, "perplexity"),
            change(loss),
            formats.percent(1.0 if loss.difference is None else result.active_share),
            formats.percent(1.0 if loss.difference is None else result.flops_share),
        )
        for label, loss in losses.items()
    ]
    head = ("model", "perplexity", "against dense", "active pairs", "FLOPs of the blocks")
    return Table.of(head, rows, title=described(facts), notes=("in brackets: 95% interval over windows of the text",))


def _speed_table(result: ConvertResult) -> Table:
    rows = [
        (
            f"{speed.what}, {speed.tokens} tokens",
            f"{speed.before:,.1f}",
            f"{speed.after:,.1f}",
            formats.times(speed.times_faster),
        )
        for speed in result.speeds
    ]
    threads = result.environment.get("threads")
    title = f"Tokens per second of one sequence, {threads} thread{'' if threads == 1 else 's'}, {result.facts.dtype}"
    return Table.of(("pass", "dense", "converted", "times as fast"), rows, title=title)


def _blocks_table(blocks: Sequence[ConvertedBlock]) -> Table:
    trained = any(block.error != block.filled_error for block in blocks)
    errors = ("error, filled", "error, distilled") if trained else ("error",)
    head = ("block", "pairs", "active", *errors, "parameters", "dense", "MFLOPs a token", "of dense")
    rows = [
        (
            block.name,
            formats.integer(block.n_pairs),
            formats.percent(block.n_active / block.n_pairs),
            *(formats.significant(e) for e in ((block.filled_error, block.error) if trained else (block.error,))),
            formats.integer(block.params_after),
            formats.integer(block.params_before),
            formats.fixed(block.flops_after / 1e6),
            formats.fixed(block.flops_before / 1e6),
        )
        for block in blocks
    ]
    return Table.of(head, rows, title="Blocks")


def conversion_plots(result: ConvertResult) -> list[Plot]:
    """The error of each block along the depth."""
    blocks = result.blocks
    if len(blocks) < 2:
        return []
    curves: Mapping[str, list[float]] = {"filled": [block.filled_error for block in blocks]}
    if result.facts.distill or result.facts.end_to_end:
        curves = {**curves, "distilled": [block.error for block in blocks]}
    depth = [float(index) for index in range(len(blocks))]
    # A block that is the dense one to rounding has no place on a logarithmic axis.
    lines = [Line(label, depth, y, pointed_style(index)) for index, (label, y) in enumerate(curves.items()) if min(y) > 0]
    if not lines:
        return []
    return [
        line_plot(
            lines,
            name="block-errors",
            title="Error of each block",
            caption="Squared deviation from the dense block's output over its square, mean over held-out tokens.",
            axes_names=("block", "relative error"),
            adjust=lambda axes: log_heights(axes, ticks=(1, 2, 5)),
        )
    ]


def conversion_page(result: ConvertResult, plots: Sequence[Plot] = ()) -> str:
    """The page as text."""
    model, speed, blocks = conversion_tables(result)
    sections = [
        Section(name="reading", title="How to read this", text=_READING),
        Section(name="model", title="The model", tables=(model, speed)),
        Section(name="blocks", title="Its feedforward blocks", plots=tuple(plots), tables=(blocks,)),
        Section(
            name="details",
            title="Settings and machine",
            facts={
                "Settings": to_builtins(result.facts),
                "Texts": {"calibration": result.calibration.name, "held out": result.held_out.name},
                "Machine and software": result.environment,
            },
            folds=True,
        ),
    ]
    return page_html(
        Page(
            kicker="A cheaper feedforward block",
            title=f"{result.model}: {described(result.facts)}",
            summary=facts_line(result),
            sections=tuple(sections),
            made_by="convert",
            source="convert.json",
            cites_paper=False,
        )
    )


def conversions_table(results: Sequence[ConvertResult], *, upcycled: bool = False) -> Table:
    """A row for each way to convert, over its seeds; upcycled models apart, as they compute no less than the dense one."""
    groups: dict[tuple[str, int, int, int], list[ConvertResult]] = {}
    for result in results:
        if (result.facts.fill == "upcycle") == upcycled:
            facts = result.facts
            key = (described(facts), facts.distill, facts.end_to_end, facts.context)
            groups.setdefault(key, []).append(result)
    return Table.by_column(
        [
            ("converted", lambda of: of[0]),
            ("steps", lambda of: f"{of[1][0].facts.distill} + {of[1][0].facts.end_to_end}"),
            ("held out", lambda of: f"{formats.integer(of[1][0].held_out.tokens)} / {of[1][0].facts.context}"),
            ("active pairs", lambda of: formats.percent(of[1][0].active_share)),
            ("FLOPs of the blocks", lambda of: formats.percent(of[1][0].flops_share)),
            ("parameters", lambda of: formats.count(of[1][0].params_after)),
            ("dense", lambda of: formats.loss(of[1][0].dense.perplexity, "perplexity")),
            ("filled", lambda of: _over_seeds([r.filled for r in of[1]])),
            (
                "distilled",
                lambda of: _over_seeds([r.converted for r in of[1]]) if _trains(of[1][0].facts) else formats.NOT_MEASURED,
            ),
            ("prompt", lambda of: _faster(of[1], "prompt")),
            ("decoding", lambda of: _faster(of[1], "decoding")),
            ("seeds", lambda of: str(len(of[1]))),
        ],
        [(name, found) for (name, *_), found in sorted(groups.items(), key=_order)],
        notes=(
            "steps: of each block, then of the whole model; held out: tokens / tokens of a window; "
            "filled and distilled: perplexity, mean and standard deviation over seeds, and its change against dense, or how "
            "many times dense it is; prompt and decoding: times as fast as the dense model",
        ),
    )


def _order(item: tuple[tuple[str, int, int, int], list[ConvertResult]]) -> tuple[bool, float, str]:
    """What needs no training first, then by the share that is computed."""
    result = item[1][0]
    return _trains(result.facts), -result.flops_share, item[0][0]


def _trains(facts: ConvertFacts) -> bool:
    return facts.distill + facts.end_to_end > 0


def _over_seeds(losses: Sequence[Loss]) -> str:
    """`79.73 ± 0.12, +3.4%`; `2,008 ± 150, 15×` where it is more than ten times the dense model's."""
    change = sum(loss.change or 0.0 for loss in losses) / len(losses)
    against = f"{100 * change:+.1f}%" if change < 9 else f"{1 + change:,.0f}\u00d7"
    against = "0.0%" if against in ("+0.0%", "-0.0%") else against
    return f"{formats.spread(mean_std([loss.perplexity for loss in losses]), 'perplexity')}, {against}"


def _faster(results: Sequence[ConvertResult], what: str) -> str:
    """The median over seeds."""
    return formats.times(statistics.median(s.times_faster for r in results for s in r.speeds if s.what == what))
