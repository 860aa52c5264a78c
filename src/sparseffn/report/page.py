"""The page of a comparison: one HTML file with the table, the figures and every setting, that loads nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from markupsafe import Markup

from sparseffn.report import figures, formats
from sparseffn.report.figures import Plot
from sparseffn.report.pages import fill_template
from sparseffn.report.result import Method, Result
from sparseffn.report.sheet import Sheet
from sparseffn.report.table import build_table
from sparseffn.storage import write_text


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A heading, how its figures are read where they are several alike, the figures, and what cannot be drawn."""

    name: str
    title: str
    lead: str | None = None
    plots: list[Plot]
    absent: str | None


def write_page(result: Result, path: str | Path) -> None:
    """Write the comparison as one self-contained HTML page.

    Args:
        result: the parsed `comparison.json`.
        path: the file to write; the same result gives the same bytes.

    Raises:
        UserError: matplotlib is not installed, the file has an unknown format, or the page cannot be written.
    """
    write_text(Path(path), page_html(result))


def page_html(result: Result) -> str:
    """The page as text.

    Args:
        result: the parsed `comparison.json`.

    Raises:
        UserError: matplotlib is not installed, or the file has an unknown format.
    """
    table = build_table(result)
    return fill_template(
        "page.html.j2",
        result=result,
        table=table,
        groups=[(name, len(list(columns))) for name, columns in groupby(table.columns, key=lambda column: column.group)],
        summary=_summary(result),
        sections=_sections(result),
        methods=_methods(result),
        corpus={key: value for key, value in result["corpus"].items() if key != "splits"},
        splits=_splits(result),
        formats=formats,
        markup=Markup,
    )


def _summary(result: Result) -> str:
    """What was trained on what, for how long."""
    corpus, model = result["corpus"], result.get("model") or {}
    size = f" with {model['n_layers']} layers of width {model['d_model']}" if "n_layers" in model else ""
    steps, per_step = result["steps"], result["tokens_per_step"]
    seeds = ", ".join(map(str, result["seeds"]))
    return (
        f"Language models{size}, trained on {corpus['name']} (tokenizer {corpus['tokenizer']}, vocabulary "
        f"{corpus['vocab_size']:,}) for {steps:,} steps of {per_step:,} tokens, {formats.count(steps * per_step)} in "
        f"all; seed{'s' if len(result['seeds']) > 1 else ''} {seeds}; preset {result['preset']}."
    )


def _sections(result: Result) -> list[Section]:
    """The figures by subject; a subject that no method of this comparison has is left out."""
    sections = [
        Section(
            name="curves",
            title="Learning curves",
            plots=figures.curve_plots(result),
            absent=_absent(result, "curves", "Learning curves", lambda method: True),
        ),
        Section(
            name="usage",
            title="Use of experts, values and channels",
            lead="Each line is a layer. A flat line at 1 is even use; a line that falls below "
            f"{figures.DEAD:g} or stops early shows units that are hardly ever selected, parameters that do no work. "
            "All frames have the same vertical scale.",
            plots=figures.usage_plots(result),
            absent=_absent(result, "usage", "Use per layer", lambda method: method["method"] != "dense"),
        ),
        Section(
            name="active",
            title="Active channels",
            plots=figures.active_plots(result),
            absent=_absent(result, "active", "Active channels", lambda method: method["method"] == "dense"),
        ),
        Section(
            name="cooccurrence",
            title="Experts selected together",
            lead="Dark cells are pairs that are often chosen for the same token; an even tint means that pairs form "
            "freely. The diagonal, a unit with itself, is left out (grey).",
            plots=figures.cooccurrence_plots(result),
            absent=_absent(result, "cooccurrence", "Co-occurrence", lambda method: method.get("unit") == "experts"),
        ),
    ]
    return [section for section in sections if section.plots or section.absent]


def _absent(result: Result, key: str, subject: str, expected: Callable[[Method], bool]) -> str | None:
    """The sentence that names the methods whose figure is expected but was not measured, or None."""
    labels = [method["label"] for method in result["methods"] if expected(method) and not method.get(key)]
    return f"{subject} not measured for {', '.join(labels)}; no figure is drawn for it." if labels else None


def _methods(result: Result) -> Sheet:
    """What each method is, beyond the results."""
    rows = [
        (
            method["label"],
            f"{method['method']}: {formats.setting(method.get('config') or {})}",
            formats.integer(method.get("ffn_params")),
            formats.integer(method.get("residual_params")),
            formats.integer(method.get("active_channels")),
            formats.seconds(method.get("step_time_s")),
        )
        for method in result["methods"]
    ]
    numbers = ("block parameters", "model residual", "active channels K·G", "step time")
    return Sheet(head=("method", "configuration", *numbers), rows=rows, n_words=2)


def _splits(result: Result) -> Sheet:
    """How much text each split holds."""
    keys = ("files", "bytes", "tokens")
    rows = [
        (name, *(formats.integer(split.get(key)) for key in keys))
        for name, split in (result["corpus"].get("splits") or {}).items()
    ]
    return Sheet(head=("split", *keys), rows=rows, n_words=1)
