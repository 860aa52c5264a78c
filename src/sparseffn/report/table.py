"""The table of a comparison: one row per method, the same cells in the terminal, in Markdown and on the page.

The order of rows is that of the file and no winner is marked: which column decides is the reader's question.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from sparseffn.report import formats
from sparseffn.report.grid import (
    Footnotes,
    markdown_footnote,
    markdown_line,
    markdown_marked,
    markdown_text,
    terminal_marked,
    terminal_parts,
)
from sparseffn.report.result import Method, Result, check_format, incomplete_line, missing_runs


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One quantity of the table.

    Attributes:
        group: the heading it shares with its neighbours.
        name: its own heading below that of the group.
        header: a heading that can stand without the group's.
        cell: writes the number of one method.
    """

    group: str
    name: str
    header: str
    cell: Callable[[Method], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One method: its label, the letters of its footnotes, and its cells, or the reason why it has none."""

    label: str
    marks: tuple[str, ...]
    cells: tuple[str, ...]
    missing: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Everything a table says.

    Attributes:
        title: the comparison's title.
        incomplete: what is lacking, or None.
        columns: the quantities, the method's label not among them.
        rows: one per method, then one per method without any result.
        notes: pairs of footnote letter ("" for a note to the whole table) and text.
        facts: what the numbers depend on, a line for the settings and one for the corpus; the page has sheets of them.
    """

    title: str
    incomplete: str | None
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[tuple[str, str], ...]
    facts: tuple[str, ...]


def build_table(result: Result) -> Table:
    """Arrange a comparison as rows and columns.

    Args:
        result: the parsed `comparison.json`.

    Raises:
        UserError: the file has an unknown format.
    """
    check_format(result)
    columns = _columns(result)
    footnotes = Footnotes()
    rows = [_row(method, result, columns, footnotes) for method in result["methods"]]
    present = {method["label"] for method in result["methods"]}
    absent: dict[str, list[str]] = {}
    for label, words in missing_runs(result):
        if label not in present:
            absent.setdefault(label, []).append(words)
    rows += [Row(label=label, marks=(), cells=(), missing="; ".join(words)) for label, words in absent.items()]
    notes = [*footnotes.texts().items(), *_general_notes(result, rows)]
    return Table(
        title=result["title"],
        incomplete=incomplete_line(result),
        columns=columns,
        rows=tuple(rows),
        notes=tuple(notes),
        facts=(_settings_line(result), _corpus_line(result)),
    )


def print_table(result: Result, console: Console | None = None) -> None:
    """Print the comparison as a terminal table, in as many parts as the terminal's width asks for.

    Args:
        result: the parsed `comparison.json`.
        console: where to print; standard output by default.
    """
    console = console or Console()
    table = build_table(result)
    console.print(Text(table.title))
    if table.incomplete:
        console.print(Text(table.incomplete))
    headings = [(column.group, column.header) for column in table.columns]
    lines = [(terminal_marked(row.label, row.marks), row.cells) for row in table.rows]
    for part in terminal_parts("method", headings, lines, console):
        console.print(part)
    for row in table.rows:
        if row.missing:
            console.print(Text(f"{row.label}: {row.missing}"))
    for letter, text in table.notes:
        console.print(Text(f"({letter}) {text}" if letter else text))
    for fact in table.facts:
        console.print(Text(fact))


def markdown_table(result: Result) -> str:
    """Write the comparison as a Markdown table with its footnotes below.

    Args:
        result: the parsed `comparison.json`.

    Returns:
        The text, ending in a newline; labels and reasons are escaped.
    """
    table = build_table(result)
    lines = [markdown_text(table.title), ""]
    if table.incomplete:
        lines += [markdown_text(table.incomplete), ""]
    lines.append(markdown_line(["method", *(markdown_text(column.header) for column in table.columns)]))
    lines.append(markdown_line([":--", *("--:" for _ in table.columns)]))
    for row in table.rows:
        cells = [markdown_text(row.missing), *("" for _ in table.columns[1:])] if row.missing else row.cells
        lines.append(markdown_line([markdown_marked(row.label, row.marks), *cells]))
    for letter, text in table.notes:
        lines += ["", markdown_footnote(letter, text) if letter else markdown_text(text)]
    for fact in table.facts:
        lines += ["", markdown_text(fact)]
    return "\n".join(lines) + "\n"


def equal_time_name(result: Result) -> str:
    """The name of the loss after equal training time, with the seconds it means."""
    duration = result.get("equal_time_s")
    return "validation at equal time" + ("" if duration is None else f" ({formats.seconds(duration)})")


def seeds_words(result: Result) -> str:
    """How losses were taken over seeds: "n = 1", "mean ± std, n = 3", or "mean ± std" where rows differ in n.

    Its spaces do not break, except the one after the comma.
    """
    numbers = _seed_numbers(result)
    n = f"n = {min(numbers)}" if len(numbers) == 1 else ""
    words = n if numbers == {1} else ", ".join(filter(None, ("mean ± std", n)))
    return words.replace(" ", "\u00a0").replace(",\u00a0", ", ")


def _seed_numbers(result: Result) -> set[int]:
    statistics = (method.get(split) for method in result["methods"] for split in ("valid", "test"))
    return {statistic["n"] for statistic in statistics if statistic}


def _columns(result: Result) -> tuple[Column, ...]:
    metric = result["metric"]
    say_n = len(_seed_numbers(result)) > 1
    counts, cost, training = "parameters", "cost relative to dense", "training"
    losses = f"{metric}, {seeds_words(result)}"
    rows: tuple[tuple[str, str, str, Callable[[Method], str]], ...] = (
        (counts, "total", "total parameters", lambda m: formats.count(m["total_params"])),
        (counts, "residual", "parameter residual", lambda m: formats.signed_percent(m.get("residual_percent"))),
        (counts, "active", "active parameters", lambda m: formats.count(m["active_params"])),
        (cost, "FLOPs", "FLOPs vs dense", lambda m: formats.percent(m.get("ffn_flops_vs_dense"))),
        (cost, "K/N_E", "K/N_E", lambda m: formats.percent(m.get("ffn_flops_convention"))),
        (cost, "saved bytes", "saved bytes vs dense", lambda m: formats.percent(m.get("saved_bytes_vs_dense"))),
        (
            cost,
            "layer time, forward",
            "layer forward vs dense",
            lambda m: formats.times(m.get("layer_time_forward_vs_dense")),
        ),
        (
            cost,
            "layer time, forward + backward",
            "layer forward + backward vs dense",
            lambda m: formats.times(m.get("layer_time_training_vs_dense")),
        ),
        (
            losses,
            "validation",
            f"validation, {losses}",
            lambda m: formats.spread(m.get("valid"), metric, say_n=say_n),
        ),
        (losses, "test", f"test, {losses}", lambda m: formats.spread(m.get("test"), metric, say_n=say_n)),
        (
            losses,
            equal_time_name(result),
            equal_time_name(result),
            lambda m: formats.loss(m.get("valid_at_equal_time"), metric),
        ),
        (training, "tokens/s", "tokens/s", lambda m: formats.integer(m.get("tokens_per_s"))),
        (training, "dead units", "dead units", lambda m: formats.percent(m.get("dead_share"))),
    )
    return tuple(Column(group=group, name=name, header=header, cell=cell) for group, name, header, cell in rows)


def _row(method: Method, result: Result, columns: tuple[Column, ...], footnotes: Footnotes) -> Row:
    texts = list(method.get("marks") or ())
    texts += [words for label, words in missing_runs(result) if label == method["label"]]
    return Row(label=method["label"], marks=footnotes.mark(*texts), cells=tuple(column.cell(method) for column in columns))


def _general_notes(result: Result, rows: list[Row]) -> list[tuple[str, str]]:
    notes = []
    if any(formats.NOT_MEASURED in row.cells for row in rows):
        notes.append(f"{formats.NOT_MEASURED}: not measured, or without meaning for the method.")
    if _seed_numbers(result) == {1}:
        notes.append("n = 1: one seed, so the spread between seeds is not known.")
    if result.get("equal_time_s") is not None:
        notes.append(
            f"Validation at equal time: after {formats.seconds(result['equal_time_s'])} of training, "
            f"on the first {formats.integer(result.get('curve_tokens'))} tokens of the validation split."
        )
    if any(m.get("ffn_flops_convention") is not None for m in result["methods"]):
        notes.append("FLOPs are counted, selection included; K/N_E, the paper's convention, is the share of active channels.")
    units = {m["unit"] for m in result["methods"] if m.get("dead_share") is not None and m.get("unit")}
    if units:
        notes.append(f"Dead units: {', '.join(sorted(units))} that receive under 1% of the mean load.")
    return [("", note) for note in notes]


# How often something is evaluated or stored does not change what is learnt; the page's sheet has these too.
_UNSAID = ("steps", "seed", "eval_every", "eval_tokens", "checkpoint_every")


def _settings_line(result: Result) -> str:
    """The hyperparameters that all methods share."""
    settings = {key: value for key, value in (result.get("settings") or {}).items() if key not in _UNSAID}
    seeds = f"seed{'s' if len(result['seeds']) > 1 else ''} {formats.setting(result['seeds'])}"
    length = f"{formats.integer(result['steps'])} steps of {formats.integer(result['tokens_per_step'])} tokens, {seeds}"
    return f"Settings: {length}" + (f"; {formats.setting(settings)}" if settings else "")


def _corpus_line(result: Result) -> str:
    """What was read: the text by its digest, the Python that it may come from, and its sizes."""
    corpus = result["corpus"]
    python = corpus.get("python_version") or (result.get("environment") or {}).get("python")
    facts = [
        corpus["name"],
        f"tokenizer {corpus['tokenizer']}",
        f"digest {corpus['digest'][:12]}" if corpus.get("digest") else "",
        f"Python {python}" if python else "",
    ]
    sizes = [
        f"{name} {formats.integer(split.get('files'))} files, {formats.integer(split.get('bytes'))} bytes"
        for name, split in (corpus.get("splits") or {}).items()
    ]
    return "; ".join([f"Corpus: {', '.join(filter(None, facts))}", *sizes])
