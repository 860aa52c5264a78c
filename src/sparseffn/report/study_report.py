"""Tables, page and drawings' files of `sparseffn study`, made from its JSON alone: predictions beside measurements."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sparseffn.errors import UserError
from sparseffn.report.bench_report import measured_page
from sparseffn.report.formats import NOT_MEASURED, ranged, significant
from sparseffn.report.markdown import markdown_table
from sparseffn.report.page import write_texts
from sparseffn.report.plotting import Plot, write_plots
from sparseffn.report.study_contrasts import contrast_table, drift_table
from sparseffn.report.study_plots import AXES, along, base_sizes, pick, study_plots
from sparseffn.report.table import Table
from sparseffn.results.study_result import StartRow, StudyResult, Variant
from sparseffn.stats import MeanStd
from sparseffn.storage import read

_FIX = "run `sparseffn study` again: finished runs are kept"
TITLES = {
    "study-init": "Why this selector, why this initialisation",
    "study-competition": "Competition between experts: sigmoid against softmax",
    "study-balance": "Balance: entropy loss and expert dropout",
}


def read_study(path: str | Path) -> StudyResult:
    """Read a `study-NAME.json`.

    Raises:
        UserError: the file is absent, is not JSON, is not a study's result, or is of version 0.1, which stored no comparisons.
    """
    result = read(Path(path), StudyResult, fix=_FIX)
    if any(variant.runs and variant.valid is None for variant in result.variants):
        raise UserError(f"`{path}` must hold `valid` and `against_first` of every variant; got neither in one; fix: {_FIX}")
    return result


def write_study(result: StudyResult, folder: Path, *, drawn: bool = True) -> list[Path]:
    """Write tables as Markdown, the page and, where matplotlib is there, each drawing as SVG and PNG; returns the files."""
    plots = study_plots(result) if drawn else []
    text, page = study_markdown(result), study_page(result, plots)
    written = write_texts({folder / f"{result.kind}.md": text, folder / f"{result.kind}.html": page})
    return written + write_plots(plots, folder)


def study_markdown(result: StudyResult) -> str:
    """Every table as Markdown."""
    return "\n".join(markdown_table(table) for table in study_tables(result).values())


def study_page(result: StudyResult, plots: Sequence[Plot] = ()) -> str:
    """The page as text, with these drawings."""
    title, reading, tables = TITLES[result.kind], _READING[result.kind], list(study_tables(result).values())
    return measured_page(result, title, f"study {result.settings.study}", reading, tables, plots)


def study_tables(result: StudyResult) -> dict[str, Table]:
    """Every table of a study by name."""
    tables: dict[str, Table] = {}
    for axis in AXES:
        if rows := along(result, axis):
            tables[f"scale {axis}"] = _scale_table(result, axis, rows)
            tables[f"load {axis}"] = _load_table(result, axis, rows)
    tables["loss"] = _loss_table(result)
    tables["contrasts"] = contrast_table([result])
    tables["load over training"] = drift_table([result])
    tables["selectors"] = _selector_table(result)
    tables["selector differences"] = _selector_differences_table(result)
    if result.kind == "study-competition":
        tables["gates"] = _gate_table(result)
    return tables


def _fixed(result: StudyResult, axis: str) -> str:
    return ", ".join(f"{AXES[key]} {value}" for key, value in base_sizes(result).items() if key != axis)


def _scale_table(result: StudyResult, axis: str, rows: Sequence[StartRow]) -> Table:
    """Output variance and squared gradients over the dense block's; rows with equal norms."""
    table = []
    for row in pick(rows, input="gaussian", selector="equal-norm"):
        (text,) = pick(rows, input="text", selector="equal-norm", init=row.init, **{axis: getattr(row, axis)})
        cells = [str(getattr(row, axis)), row.init]
        for key in ("output", "keys", "values", "input"):
            cells += [significant(row.predicted[key]), ranged(row.measured.get(key)), ranged(text.measured[key])]
        table.append(cells)
    names = ("output", "d keys", "d values", "d x")
    return Table.of(
        (AXES[axis], "init", *(f"{name}: {what}" for name in names for what in ("predicted", "Gaussian", "text"))),
        table,
        title=f"At initialisation, mean square over the dense block's, over {AXES[axis]}; {_fixed(result, axis)}",
        n_words=2,
        n_labels=2,
        notes=(_seeds_note(result), "Selector rows of equal norm; free rows are alike here."),
    )


def _load_table(result: StudyResult, axis: str, rows: Sequence[StartRow]) -> Table:
    """Load over experts, on both inputs; it does not depend on how the experts' values start."""
    table = []
    for row in pick(rows, input="gaussian", init="shared"):
        (text,) = pick(rows, input="text", init="shared", selector=row.selector, **{axis: getattr(row, axis)})
        cells = [str(getattr(row, axis)), row.selector]
        for source in (row, text):
            for key in ("variation", "norm_correlation", "largest_over_mean"):
                cells += [significant(source.predicted[key]), ranged(source.measured[key])]
        table.append([*cells, ranged(text.measured.get("dead"))])
    quantities = ("std / mean", "correlation with norm", "largest / mean")
    head = [f"{source}{name}{what}" for source in ("", "text ") for name in quantities for what in (", predicted", "")]
    return Table.of(
        (AXES[axis], "rows", *head, "text dead"),
        table,
        title=f"Load of the experts at initialisation over {AXES[axis]}; {_fixed(result, axis)}",
        n_words=2,
        n_labels=2,
        notes=(_load_seeds_note(result, rows), "Gaussian tokens where not said otherwise; shared initialisation."),
    )


def _seeds_note(result: StudyResult) -> str:
    grid = result.settings.grid
    return (
        f"Median [least, greatest] of {result.settings.start_seeds} seeds; d_model {grid.d_model}; {grid.n_gradients:,} tokens."
    )


def _load_seeds_note(result: StudyResult, rows: Sequence[StartRow]) -> str:
    """Sizes off the base's depth may have fewer seeds than the others, as a model on text takes longest."""
    counts = sorted({row.load_seeds or result.settings.start_seeds for row in rows})
    grid = result.settings.grid
    numbers = " or ".join(map(str, counts))
    return f"Median [least, greatest] of {numbers} seeds; d_model {grid.d_model}; {grid.n_tokens:,} tokens."


def _loss_table(result: StudyResult) -> Table:
    """Losses after a short training, and paired differences from the first variant."""
    first, preset = result.variants[0].name, result.settings.preset
    size = f"{preset['steps']:,} steps of {preset['batch'] * preset['context']:,} tokens, {preset['doc']}"
    return Table.by_column(
        [
            ("variant", lambda variant: variant.name),
            ("method", lambda variant: variant.method),
            ("seeds", lambda variant: str(len(variant.runs))),
            ("validation", lambda variant: _mean_std(variant.valid)),
            ("test", lambda variant: _mean_std(variant.test)),
            (f"validation - {first}", lambda variant: _difference(variant, "valid")),
            (f"test - {first}", lambda variant: _difference(variant, "test")),
        ],
        result.variants,
        n_words=2,
        title=f"Loss after a short training, nats a {result.corpus['unit']}: {size}, corpus {result.corpus['corpus']}",
        notes=(
            f"Mean ± standard deviation over seeds, on the first {result.settings.eval_tokens:,} tokens of each split. "
            f"Differences from {first} are paired by seed, with the 95% interval of Student's t over seeds.",
            *_missing_lines(result),
        ),
    )


def _missing_lines(result: StudyResult) -> list[str]:
    """A line that names what was not run, if anything."""
    seeds: dict[tuple[str, str], list[str]] = {}
    for run in result.missing:
        seeds.setdefault((run.label, run.reason), []).append(str(run.seed))
    lines = [f"{label}, seed {', '.join(numbers)}: {reason}" for (label, reason), numbers in seeds.items()]
    lines += [f"size {name}: not measured yet" for name in result.missing_sizes]
    return [f"Missing: {'; '.join(lines)}."] if lines else []


_QUANTITIES = {
    "load_entropy": "load entropy / log N_E",
    "largest_over_mean": "largest / mean load",
    "dead": "dead experts",
    "norm": "row norm",
    "norm_spread": "spread of row norms",
}


def _selector_table(result: StudyResult) -> Table:
    """What the selectors do at the start and at the end."""
    return Table.of(
        ("variant", *_QUANTITIES.values()),
        [(variant.name, *(_start_to_end(variant, key) for key in _QUANTITIES)) for variant in result.variants],
        title="Selectors before and after the short training (start → end), means over layers and seeds",
        notes=("Load over 8,192 tokens of validation; an expert is dead with under 1% of the mean load.",),
    )


def _selector_differences_table(result: StudyResult) -> Table:
    """How the selectors differ at the end from those of the first variant."""
    first, *others = result.variants
    return Table.of(
        ("variant", *_QUANTITIES.values()),
        [(variant.name, *(_difference(variant, key) for key in _QUANTITIES)) for variant in others],
        title=f"Selectors at the end, differences from {first.name}",
        notes=("Paired by seed, with the 95% interval of Student's t over seeds. Not corrected for their number.",),
    )


def _gate_table(result: StudyResult) -> Table:
    """Gates and interference beside what was predicted of them before the first step."""
    return Table.by_column(
        [
            ("variant", lambda variant: variant.name),
            ("mean s² at the start, predicted", lambda variant: significant(variant.predicted.gate_square)),
            ("mean s², start → end", lambda variant: _start_to_end(variant, "gate_square")),
            ("interference at equal logits, predicted", lambda variant: _bounds(*variant.predicted.interference)),
            ("interference, start → end", lambda variant: _start_to_end(variant, "interference")),
        ],
        result.variants,
        title="Gates and interference before and after the short training, means over layers and seeds",
        notes=("Interference: share of the squared gradient of the logits that comes from other experts.",),
    )


def _bounds(low: float, high: float) -> str:
    return significant(low) if low == high else f"{significant(low)} to {significant(high)}"


def _start_to_end(variant: Variant, key: str) -> str:
    """`0.81 → 0.95`."""
    if not variant.start:
        return NOT_MEASURED
    return f"{significant(variant.start[key])} → {significant(variant.end[key])}"


def _difference(variant: Variant, key: str) -> str:
    """`+0.0120 ± 0.0300`; one seed has no interval."""
    found = variant.against_first.get(key)
    if found is None:
        return NOT_MEASURED
    return f"{found.difference:+.4f}" + (f" ± {found.half_width:.4f}" if found.covers_seeds else "")


def _mean_std(found: MeanStd | None) -> str:
    """`2.1234 ± 0.0012`."""
    if found is None:
        return NOT_MEASURED
    return f"{found.mean:.4f}" + ("" if found.std is None else f" ± {found.std:.4f}")


_TRAINING = (
    "Trainings share data, order, hyperparameters and the parameters outside the feedforward blocks; variants of a seed differ "
    "in one thing. Few seeds: what is undecided is undecided."
)
_READING = {
    "study-init": (
        "Predictions were derived from the framework before anything was measured (docs/why-this-selector.md). Gaussian tokens "
        f"are isotropic; text is what the last block of an untrained model receives. {_TRAINING}"
    ),
    "study-competition": (
        "A softmax couples its experts: what one contributes moves the logits of the others, which is called interference "
        f"here. {_TRAINING}"
    ),
    "study-balance": f"Two by two: entropy loss (weight 1e-3) and expert dropout (0.05), on and off. {_TRAINING}",
}
