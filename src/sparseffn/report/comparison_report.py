"""Table and page of a comparison, made from its `comparison.json` alone.

The order of rows is that of the file and no winner is marked: which column decides is the reader's question.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

from sparseffn.report import formats
from sparseffn.report.comparison_plots import active_plots, cooccurrence_plots, curve_plots, usage_plots
from sparseffn.report.markdown import markdown_table
from sparseffn.report.page import Page, Section, page_html, write_texts
from sparseffn.report.plotting import Plot
from sparseffn.report.table import Cell, Column, Footnotes, Row, Table
from sparseffn.report.usage_plots import DEAD
from sparseffn.results.comparison_result import ComparisonResult, MethodResult

# A column, and what writes a method's cell.
Quantity = tuple[Column, Callable[[MethodResult], str]]


def write_comparison(result: ComparisonResult, folder: str | Path, *, drawn: bool = True) -> list[Path]:
    """Write `table.md` and `page.html`, with figures where `drawn`; the same result gives the same bytes.

    Raises:
        UserError: something is to be drawn and matplotlib is not installed, or a file cannot be written.
    """
    table, page = markdown_table(comparison_table(result)), comparison_page(result, drawn=drawn)
    return write_texts({Path(folder) / "table.md": table, Path(folder) / "page.html": page})


def comparison_table(result: ComparisonResult) -> Table:
    """One row for each method, then one for each method without any result."""
    quantities, footnotes, missing = _quantities(result), Footnotes(), list(_missing_runs(result))
    rows = []
    for method in result.methods:
        texts = [*method.marks, *(words for label, words in missing if label == method.label)]
        cells = (Cell(write(method)) for _, write in quantities)
        rows.append(Row(cells=(Cell(method.label, footnotes.mark(*texts)), *cells)))
    present = {method.label for method in result.methods}
    for absent in dict.fromkeys(label for label, _ in missing if label not in present):
        reasons = "; ".join(words for label, words in missing if label == absent)
        rows.append(Row(cells=(Cell(absent),), missing=reasons))
    return Table(
        title=result.title,
        name="Results",
        columns=(Column(name="method", is_words=True), *(column for column, _ in quantities)),
        rows=tuple(rows),
        incomplete=_incomplete(result),
        footnotes=footnotes.texts(),
        notes=tuple(_notes(result, rows)),
        facts=(_settings_line(result), _corpus_line(result)),
    )


def _missing_runs(result: ComparisonResult) -> Iterator[tuple[str, str]]:
    """The runs that gave no number, as pairs of label and words: ("switch", "seed 1 missing: out of memory")."""
    for run in result.missing:
        where = "" if run.seed is None else f"seed {run.seed} "
        yield run.label, f"{where}missing: {run.reason or 'no reason was recorded'}"


def _incomplete(result: ComparisonResult) -> str:
    lacks = [f"{label} {words}" for label, words in _missing_runs(result)]
    if not result.finished:
        lacks.append("the comparison had not finished when its file was written")
    return f"incomplete: {'; '.join(lacks)}" if lacks else ""


def _seed_numbers(result: ComparisonResult) -> set[int]:
    statistics = (statistic for method in result.methods for statistic in (method.valid, method.test))
    return {statistic.n for statistic in statistics if statistic}


def _seeds_words(result: ComparisonResult) -> str:
    """As "n = 1", "mean ± std, n = 3", or "mean ± std" where rows differ in n; only the space after the comma may break."""
    numbers = _seed_numbers(result)
    words = [] if numbers == {1} else ["mean ± std"]
    words += [f"n = {n}" for n in numbers if len(numbers) == 1]
    return ", ".join(text.replace(" ", "\u00a0") for text in words)


def _quantities(result: ComparisonResult) -> list[Quantity]:
    metric = result.metric
    say_n = len(_seed_numbers(result)) > 1
    after = "" if result.equal_time_s is None else f" ({formats.seconds(result.equal_time_s)})"
    counts, cost, training = "parameters", "cost relative to dense", "training"
    losses = f"{metric}, {_seeds_words(result)}"
    equal = f"validation at equal time{after}"
    both = "layer time, forward + backward"
    rows: tuple[tuple[str, str, str, Callable[[MethodResult], str]], ...] = (
        (counts, "total", "total parameters", lambda m: formats.count(m.total_params)),
        (counts, "residual", "parameter residual", lambda m: formats.signed_percent(m.residual_percent)),
        (counts, "active", "active parameters", lambda m: formats.count(m.active_params)),
        (cost, "FLOPs", "FLOPs vs dense", lambda m: formats.percent(m.ffn_flops_vs_dense)),
        (cost, "K/N_E", "K/N_E", lambda m: formats.percent(m.ffn_flops_convention)),
        (cost, "saved bytes", "saved bytes vs dense", lambda m: formats.percent(m.saved_bytes_vs_dense)),
        (cost, "layer time, forward", "layer forward vs dense", lambda m: formats.times(m.layer_time_forward_vs_dense)),
        (cost, both, "layer forward + backward vs dense", lambda m: formats.times(m.layer_time_training_vs_dense)),
        (losses, "validation", f"validation, {losses}", lambda m: formats.spread(m.valid, metric, say_n=say_n)),
        (losses, "test", f"test, {losses}", lambda m: formats.spread(m.test, metric, say_n=say_n)),
        (losses, equal, equal, lambda m: formats.loss(m.valid_at_equal_time, metric)),
        (training, "tokens/s", "tokens/s", lambda m: formats.integer(m.tokens_per_s)),
        (training, "dead units", "dead units", lambda m: formats.percent(m.dead_share)),
    )
    return [(Column(group=group, name=name, standalone=alone), write) for group, name, alone, write in rows]


def _notes(result: ComparisonResult, rows: list[Row]) -> Iterator[str]:
    if any(cell.text == formats.NOT_MEASURED for row in rows for cell in row.cells):
        yield f"{formats.NOT_MEASURED}: not measured, or without meaning for the method."
    if _seed_numbers(result) == {1}:
        yield "n = 1: one seed, so the spread between seeds is not known."
    if result.evaluated_tokens is not None:
        yield (
            f"Validation and test are of at most the first {formats.integer(result.evaluated_tokens)} tokens of each split, "
            "as many as the budget allowed."
        )
    if result.equal_time_s is not None:
        yield (
            f"Validation at equal time: after {formats.seconds(result.equal_time_s)} of training, "
            f"on the first {formats.integer(result.curve_tokens)} tokens of the validation split."
        )
    if any(m.ffn_flops_convention is not None for m in result.methods):
        yield "FLOPs are counted, selection included; K/N_E, the paper's convention, is the share of active channels."
    units = {m.unit for m in result.methods if m.dead_share is not None and m.unit}
    if units:
        yield f"Dead units: {', '.join(sorted(units))} that receive under 1% of the mean load."


# How often something is evaluated or stored does not change what is learnt; the page's list has these too.
_UNSAID = ("steps", "seed", "eval_every", "eval_tokens", "checkpoint_every")


def _settings_line(result: ComparisonResult) -> str:
    """The hyperparameters that all methods share."""
    settings = {key: value for key, value in result.settings.items() if key not in _UNSAID}
    length = f"{formats.integer(result.steps)} steps of {formats.integer(result.tokens_per_step)} tokens"
    return f"Settings: {length}, {_seeds(result)}" + (f"; {formats.setting(settings)}" if settings else "")


def _seeds(result: ComparisonResult) -> str:
    return f"seed{'s' if len(result.seeds) > 1 else ''} {formats.setting(result.seeds)}"


def _corpus_line(result: ComparisonResult) -> str:
    """What was read: the text by its digest, the Python that it may come from, and its sizes."""
    corpus = result.corpus
    python = corpus.get("python_version") or result.environment.get("python")
    facts = [
        corpus.get("name", ""),
        f"tokenizer {corpus.get('tokenizer', 'unknown')}",
        f"digest {corpus['digest'][:12]}" if corpus.get("digest") else "",
        f"Python {python}" if python else "",
    ]
    sizes = [
        f"{name} {formats.integer(split.get('files'))} files, {formats.integer(split.get('bytes'))} bytes"
        for name, split in (corpus.get("splits") or {}).items()
    ]
    return "; ".join([f"Corpus: {', '.join(filter(None, facts))}", *sizes])


_READING = (
    "All models have nearly the same number of parameters (the residual says how nearly), the same data and the same "
    "settings; they differ in their feedforward block. Loss is in {metric}, and lower is better. Costs are ratios to the "
    "dense block: FLOPs are counted, with the selection of units, and K/N_E beside them is the share of channels that are "
    "active, the paper's way to state them; saved bytes are what the forward pass keeps for the backward pass; layer times "
    "were measured, so they hold for the machine named below. At equal steps a method is judged by what it learns from the "
    "same text, at equal time also by its speed on this machine. A difference no larger than the spread between seeds says "
    "nothing."
)


_IN_A_DECODER = (
    " The models are decoders as Llama's: RMS norms, rotary positions, grouped-query attention. Their dense block is gated by "
    "SiLU, and so is every method that can be, unless its row says otherwise; the details below have each configuration. A "
    "decoder hands nothing on from window to window: each is read without the text before it, in evaluation too."
)


def _reading(result: ComparisonResult) -> str:
    return _READING.format(metric=result.metric) + (_IN_A_DECODER if result.backbone == "llama" else "")


def comparison_page(result: ComparisonResult, *, drawn: bool = True) -> str:
    """The page as text."""
    table = comparison_table(result)
    # Title and warning are the page's, and the settings stand at its end.
    shown = dataclasses.replace(table, title="", incomplete="", facts=())
    return page_html(
        Page(
            title=table.title,
            summary=_summary(result),
            warnings=(table.incomplete,) if table.incomplete else (),
            sections=(
                Section(name="reading", title="How to read this", text=_reading(result)),
                Section(name="results", title="Results", tables=(shown,)),
                *(_figure_sections(result) if drawn else ()),
                _details(result),
            ),
            made_by="compare",
            source="comparison.json",
        )
    )


def _summary(result: ComparisonResult) -> str:
    """What was trained on what, for how long."""
    corpus, model, tokens = result.corpus, result.model, result.tokens_per_step
    size = f" with {model['n_layers']} layers of width {model['d_model']}" if "n_layers" in model else ""
    facts = [f"tokenizer {corpus['tokenizer']}"] if "tokenizer" in corpus else []
    facts += [f"vocabulary {corpus['vocab_size']:,}"] if "vocab_size" in corpus else []
    length = f" of {tokens:,} tokens, {formats.count(result.steps * tokens)} in all" if tokens else ""
    preset = f"; preset {result.preset}" if result.preset else ""
    kind = "Decoders as Llama's" if result.backbone == "llama" else "Language models"
    return (
        f"{kind}{size}, trained on {corpus.get('name', 'a text')} ({', '.join(facts)}) for "
        f"{result.steps:,} steps{length}; {_seeds(result)}{preset}."
    )


# Figures, field of a method, title, who is expected to have it, what it is called where it is absent, how figures are read.
_FIGURES: tuple[tuple[Callable[[ComparisonResult], list[Plot]], str, str, Callable[[MethodResult], bool], str, str], ...] = (
    (curve_plots, "curves", "Learning curves", lambda m: True, "Learning curves", ""),
    (
        usage_plots,
        "usage",
        "Use of experts, values and channels",
        lambda m: m.method != "dense",
        "Use per layer",
        f"Each line is a layer. A flat line at 1 is even use; a line that falls below {DEAD:g} or stops early shows units that "
        "are hardly ever selected, parameters that do no work. All frames have the same vertical scale.",
    ),
    (active_plots, "active", "Active channels", lambda m: m.method == "dense", "Active channels", ""),
    (
        cooccurrence_plots,
        "cooccurrence",
        "Experts selected together",
        lambda m: m.unit == "experts",
        "Co-occurrence",
        "Dark cells are pairs that are often chosen for the same token; an even tint means that pairs form freely. The "
        "diagonal, a unit with itself, is left out (grey).",
    ),
)


def _figure_sections(result: ComparisonResult) -> list[Section]:
    """The figures by subject; a subject that no method of this comparison has is left out."""
    sections = []
    for draw, name, title, expected, subject, reading in _FIGURES:
        plots = draw(result)
        labels = [method.label for method in result.methods if expected(method) and not getattr(method, name)]
        absent = f"{subject} not measured for {', '.join(labels)}; no figure is drawn for it." if labels else ""
        if plots or absent:
            text = reading if plots else ""
            sections.append(Section(name=name, title=title, plots=tuple(plots), text=text, absent=absent))
    return sections


def _details(result: ComparisonResult) -> Section:
    """What each method is, beyond the results, and everything that all of them share."""
    methods = Table.by_column(
        [
            ("method", lambda m: m.label),
            ("configuration", lambda m: f"{m.method}: {formats.setting(m.config)}"),
            ("block parameters", lambda m: formats.integer(m.ffn_params)),
            ("model residual", lambda m: formats.integer(m.residual_params)),
            ("active channels K·G", lambda m: formats.integer(m.active_channels)),
            ("step time", lambda m: formats.seconds(m.step_time_s)),
        ],
        result.methods,
        n_words=2,
        title="Methods",
    )
    found = result.corpus.get("splits") or {}
    splits = Table.of(
        ("split", "files", "bytes", "tokens"),
        [(name, *(formats.integer(split.get(key)) for key in ("files", "bytes", "tokens"))) for name, split in found.items()],
        title="Splits of the corpus",
    )
    return Section(
        name="details",
        title="Settings, corpus and machine",
        tables=(methods, splits) if found else (methods,),
        facts={
            "Training": result.settings,
            "Model": result.model,
            "Corpus": {key: value for key, value in result.corpus.items() if key != "splits"},
            "Machine and software": result.environment,
        },
        folds=True,
    )
