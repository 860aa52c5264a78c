"""Tables of `sparseffn study`, made from its JSON alone: what was predicted beside what was measured."""

from __future__ import annotations

import math
import operator
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sparseffn.errors import UserError
from sparseffn.report.formats import NOT_MEASURED
from sparseffn.report.result import FORMAT, Result
from sparseffn.report.sheet import Sheet
from sparseffn.stats import student_quantile

TITLES = {
    "study-init": "Why this selector, why this initialisation",
    "study-competition": "Competition between experts: sigmoid against softmax",
    "study-balance": "Balance: entropy loss and expert dropout",
}

AXES = {"n_experts": "N_E", "n_layers": "layers", "expert_size": "G", "k": "K"}
INITS = ("shared", "standard", "switch")
SELECTORS = ("equal-norm", "free")


def check_study(result: Result) -> None:
    """Refuse what is not a study's result.

    Raises:
        UserError: it is of another kind or format.
    """
    found = (result.get("kind"), result.get("format")) if isinstance(result, Mapping) else (None, None)
    if found[0] not in TITLES or found[1] != FORMAT:
        raise UserError(
            f"`kind` of the result must be one of {', '.join(TITLES)} in format {FORMAT}; got {found[0]!r} in format "
            f"{found[1]!r}; fix: run `sparseffn study` again"
        )


def study_sheets(result: Result) -> dict[str, Sheet]:
    """Every table of a study by name.

    Raises:
        UserError: it is not a study's result.
    """
    check_study(result)
    sheets: dict[str, Sheet] = {}
    if "start" in result:
        for axis in AXES:
            rows = along(result, axis)
            if rows:
                sheets[f"scale {axis}"] = _scale_sheet(result, axis, rows)
                sheets[f"load {axis}"] = _load_sheet(result, axis, rows)
    sheets["loss"] = _loss_sheet(result)
    sheets["selectors"] = _selector_sheet(result)
    sheets["selector differences"] = _selector_differences_sheet(result)
    if result["kind"] == "study-competition":
        sheets["gates"] = _gate_sheet(result)
    return sheets


def along(result: Result, axis: str) -> list[dict[str, Any]]:
    """Rows of the sizes that differ from the base in one axis at most, in its order."""
    base = dict(zip(("n_layers", "n_experts", "expert_size", "k"), result["settings"]["grid"]["base"], strict=True))
    rows = [row for row in result["start"] if all(row[key] == value for key, value in base.items() if key != axis)]
    return sorted(rows, key=lambda row: row[axis])


def pick(rows: Sequence[Mapping[str, Any]], **wanted: object) -> list[Mapping[str, Any]]:
    """The rows with these values."""
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def _fixed(result: Result, axis: str) -> str:
    base = dict(zip(("n_layers", "n_experts", "expert_size", "k"), result["settings"]["grid"]["base"], strict=True))
    return ", ".join(f"{AXES[key]} {value}" for key, value in base.items() if key != axis)


def _scale_sheet(result: Result, axis: str, rows: Sequence[Mapping[str, Any]]) -> Sheet:
    """Output variance and squared gradients over the dense block's; rows with equal norms."""
    table = []
    for row in pick(rows, input="gaussian", selector="equal-norm"):
        (text,) = pick(rows, input="text", selector="equal-norm", init=row["init"], **{axis: row[axis]})
        cells = [str(row[axis]), row["init"]]
        for key in ("output", "keys", "values", "input"):
            cells += [number(row["predicted"][key]), ranged(row["measured"][key]), ranged(text["measured"][key])]
        table.append(tuple(cells))
    names = ("output", "d keys", "d values", "d x")
    head = [AXES[axis], "init"] + [f"{name}: {what}" for name in names for what in ("predicted", "Gaussian", "text")]
    return Sheet(
        title=f"At initialisation, mean square over the dense block's, over {AXES[axis]}; {_fixed(result, axis)}",
        head=tuple(head),
        rows=table,
        n_words=2,
        notes=(_seeds_note(result), "Selector rows of equal norm; free rows are alike here."),
    )


def _load_sheet(result: Result, axis: str, rows: Sequence[Mapping[str, Any]]) -> Sheet:
    """Load over experts, on both inputs; it does not depend on how the experts' values start."""
    table = []
    for row in pick(rows, input="gaussian", init="shared"):
        (text,) = pick(rows, input="text", init="shared", selector=row["selector"], **{axis: row[axis]})
        cells = [str(row[axis]), row["selector"]]
        for source in (row, text):
            for key in ("variation", "norm_correlation", "largest_over_mean"):
                cells += [number(source["predicted"][key]), ranged(source["measured"][key])]
        table.append((*cells, ranged(text["measured"]["dead"])))
    quantities = ("std / mean", "correlation with norm", "largest / mean")
    head = [AXES[axis], "rows"]
    head += [f"{source} {name}{what}" for source in ("", "text") for name in quantities for what in (", predicted", "")]
    return Sheet(
        title=f"Load of the experts at initialisation over {AXES[axis]}; {_fixed(result, axis)}",
        head=tuple(name.strip() for name in (*head, "text dead")),
        rows=table,
        n_words=2,
        notes=(_seeds_note(result), "Gaussian tokens where not said otherwise; shared initialisation."),
    )


def _seeds_note(result: Result) -> str:
    settings = result["settings"]
    n, grid = settings["start_seeds"], settings["grid"]
    return (
        f"Median [least, greatest] of {n} seeds; d_model {grid['d_model']}; {grid['n_tokens']:,} tokens for the load, the "
        f"first {grid['n_gradients']:,} of them for output and gradients."
    )


def _loss_sheet(result: Result) -> Sheet:
    """Losses after a short training, and paired differences against the first variant."""
    variants = result["variants"]
    rows = []
    for variant in variants:
        cells = [variant["name"], variant["method"], str(len(variant["runs"]))]
        for split in ("valid", "test"):
            cells.append(mean_std([run[split] for run in variant["runs"]]))
        for split in ("valid", "test"):
            pairs = [] if variant is variants[0] else differences(variant, variants[0], operator.itemgetter(split))
            cells += [interval(pairs), verdict(pairs)]
        rows.append(tuple(cells))
    preset, first = result["settings"]["preset"], variants[0]["name"]
    size = f"{preset['steps']:,} steps of {preset['batch'] * preset['context']:,} tokens, {preset['doc']}"
    return Sheet(
        title=f"Loss after a short training, nats a {result['corpus']['unit']}: {size}, corpus {result['corpus']['corpus']}",
        head=(
            *("variant", "method", "seeds", "validation", "test"),
            *(f"validation - {first}", "is", f"test - {first}", "is"),
        ),
        rows=rows,
        n_words=2,
        notes=(
            f"Mean ± standard deviation over seeds, on the first {result['settings']['eval_tokens']:,} tokens of each split. "
            f"Differences from {first} are paired by seed, with the 95% interval of Student's t over seeds; undecided where it "
            "holds 0. Not corrected for the number of comparisons, and blind to which tokens were evaluated.",
            *missing_lines(result),
        ),
    )


def missing_lines(result: Result) -> list[str]:
    """A line that names what was not run, if anything."""
    seeds: dict[tuple[str, str], list[str]] = {}
    for run in result["missing"]:
        seeds.setdefault((run["label"], run["reason"]), []).append(str(run["seed"]))
    lines = [f"{label}, seed {', '.join(numbers)}: {reason}" for (label, reason), numbers in seeds.items()]
    lines += [f"size {name}: not measured yet" for name in result.get("missing_sizes", ())]
    return [f"Missing: {'; '.join(lines)}."] if lines else []


_STATES: tuple[tuple[str, str], ...] = (
    ("load_entropy", "load entropy / log N_E"),
    ("largest_over_mean", "largest / mean load"),
    ("dead", "dead experts"),
    ("norm", "row norm"),
    ("norm_spread", "spread of row norms"),
)


def _selector_sheet(result: Result) -> Sheet:
    """What the selectors do at the start and at the end."""
    rows = []
    for variant in result["variants"]:
        first, last = ends(variant)
        rows.append((variant["name"], *(arrow(first, last, key) for key, _ in _STATES)))
    return Sheet(
        title="Selectors before and after the short training (start → end), means over layers and seeds",
        head=("variant", *(name for _, name in _STATES)),
        rows=rows,
        n_words=1,
        notes=("Load over 8,192 tokens of validation; an expert is dead with under 1% of the mean load.",),
    )


def _selector_differences_sheet(result: Result) -> Sheet:
    """How the selectors differ at the end from those of the first variant."""
    first, *others = result["variants"]
    rows = []
    for variant in others:
        found = (differences(variant, first, lambda run, key=key: run["probes"][-1][key]) for key, _ in _STATES)
        rows.append((variant["name"], *map(interval, found)))
    return Sheet(
        title=f"Selectors at the end, differences from {first['name']}",
        head=("variant", *(name for _, name in _STATES)),
        rows=rows,
        n_words=1,
        notes=("Paired by seed, with the 95% interval of Student's t over seeds. Not corrected for their number.",),
    )


def _gate_sheet(result: Result) -> Sheet:
    """Gates and interference beside what was predicted of them before the first step."""
    rows = []
    for variant in result["variants"]:
        first, last = ends(variant)
        low, high = variant["predicted"]["interference"]
        bounds = number(low) if low == high else f"{number(low)} to {number(high)}"
        cells = [number(variant["predicted"]["gate_square"]), arrow(first, last, "gate_square")]
        rows.append((variant["name"], *cells, bounds, arrow(first, last, "interference")))
    names = ("mean s² at the start, predicted", "mean s², start → end")
    return Sheet(
        title="Gates and interference before and after the short training, means over layers and seeds",
        head=("variant", *names, "interference at equal logits, predicted", "interference, start → end"),
        rows=rows,
        n_words=1,
        notes=("Interference: share of the squared gradient of the logits that comes from other experts.",),
    )


def ends(variant: Mapping[str, Any]) -> tuple[list[Mapping[str, float]], list[Mapping[str, float]]]:
    """The first and the last probe of every run."""
    return [run["probes"][0] for run in variant["runs"]], [run["probes"][-1] for run in variant["runs"]]


def arrow(first: Sequence[Mapping[str, float]], last: Sequence[Mapping[str, float]], key: str) -> str:
    """`0.81 → 0.95`."""
    if not first:
        return NOT_MEASURED
    return " → ".join(number(statistics.fmean(probe[key] for probe in probes)) for probes in (first, last))


def differences(
    variant: Mapping[str, Any], against: Mapping[str, Any], of: Callable[[Mapping[str, Any]], float]
) -> list[float]:
    """Differences between the runs that share a seed, in what `of` gives of a run."""
    base = {run["seed"]: of(run) for run in against["runs"]}
    return [of(run) - base[run["seed"]] for run in variant["runs"] if run["seed"] in base]


def half_width(values: Sequence[float]) -> float | None:
    """Half of the 95% interval of the mean; None for one value."""
    if len(values) < 2:
        return None
    return student_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def interval(values: Sequence[float]) -> str:
    """`+0.012 ± 0.030`."""
    if not values:
        return NOT_MEASURED
    half = half_width(values)
    return f"{statistics.fmean(values):+.4f}" + ("" if half is None else f" ± {half:.4f}")


def verdict(values: Sequence[float]) -> str:
    """Whether the interval leaves the sign open."""
    if not values:
        return NOT_MEASURED
    half = half_width(values)
    if half is None or abs(statistics.fmean(values)) <= half:
        return "undecided"
    return "better" if statistics.fmean(values) < 0 else "worse"


def mean_std(values: Sequence[float]) -> str:
    """`2.1234 ± 0.0012`."""
    if not values:
        return NOT_MEASURED
    std = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{std}"


def number(value: float | None) -> str:
    """Three significant digits, without an exponent: `0.0705`, `2.25`, `13.8`."""
    if value is None:
        return NOT_MEASURED
    # What a sum of rounding errors leaves is no number to look at.
    if abs(value) < 5e-7:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}"


def ranged(values: Sequence[float] | None) -> str:
    """`0.0712 [0.0660, 0.0748]`, or one number where all are alike."""
    if values is None:
        return NOT_MEASURED
    middle, low, high = map(number, values)
    return middle if low == high else f"{middle} [{low}, {high}]"


def reading(result: Result) -> str:
    """How the tables are read."""
    return _READING[result["kind"]]


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
