"""The blocks of docs/results.md, from the files of `sparseffn reproduce evidence` alone.

What is concluded from a result stands in a block too, as more runs may change it; prose between the blocks has settings alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from sparseffn.report import formats
from sparseffn.report.markdown import markdown_table
from sparseffn.report.study_report import read_study
from sparseffn.report.table import Table
from sparseffn.results.evidence_result import ClaimsResult, DecidedClaim, EvidenceResult
from sparseffn.results.table_result import Cell, TableResult
from sparseffn.stats import Difference
from sparseffn.storage import read

TABLES = ("table10", "table1", "table6", "table3")
"""A row that more tables have is shown from the first: the one whose scatter is pooled over most rows."""
_THROUGH = "through dense"
_FIX = "run `make evidence` again"


Cells = Mapping[tuple[str, str], Cell]
"""By label and settings of the row."""


def evidence_blocks(folder: Path) -> dict[str, str]:
    """Text of every block by name, from the files that `make evidence` writes.

    Raises:
        UserError: one is not there or is damaged.
    """
    runs = read(folder / "evidence.json", EvidenceResult, fix=_FIX)
    claims = read(folder / "claims.json", ClaimsResult, fix=_FIX)
    tables = {name: read(folder / f"{name}.json", TableResult, fix=_FIX) for name in TABLES}
    cells: dict[tuple[str, str], Cell] = {}
    for table in tables.values():
        for cell in table.cells:
            row = table.rows[cell.row]
            cells.setdefault((row.label, row.settings or ""), cell)
    return {
        "setup": _setup(runs, tables["table3"], cells),
        "stated": _stated(claims),
        "losses": _losses(claims, released=False),
        "loads": _figures(claims, "load"),
        "speeds": _figures(claims, "speed"),
        "released": _losses(claims, released=True),
        "compute": _compute(tables["table3"]),
        "rows": _rows(cells),
        "disagree": _disagreement(cells, folder.parent),
    }


def _setup(evidence: EvidenceResult, table: TableResult, cells: Cells) -> str:
    column, params = table.columns[0], cells["dense", "paper"].params
    done, failed = (sum(run.status == status for run in evidence.runs) for status in ("finished", "failed"))
    lines = (
        f"- corpus: {column.corpus}, digest {(column.digest or '')[:12]}; the figures are {column.metric} of the test split",
        f"- models: {formats.count(None if params is None else round(params))} parameters; {column.sizes}",
        f"- training: {table.notes[0].partition(': ')[2]}",
        f"- runs: {done} of {len(evidence.runs)} finished" + (f", {failed} failed" if failed else ""),
    )
    return "\n".join(lines) + "\n"


def _rows(cells: Cells) -> str:
    """By the difference from sigma-MoE over common seeds, then, in tables without it, from dense: means do not rank."""
    measured = [(label, cell) for (label, _), cell in cells.items() if cell.status == "measured"]
    lacking = [label for (label, _), cell in cells.items() if cell.status != "measured"]
    rows = [
        (
            label,
            str(cell.n),
            f"{cell.mean:.3f}" + ("" if cell.spread is None else f" ± {cell.spread:.3f}"),
            *(_interval(found, cell.n) for found in (cell.against_dense, cell.against_sigma_moe)),
            "-" if cell.load is None else f"{cell.load.training:.2f}; {cell.load.valid:.2f}",
        )
        for label, cell in sorted(measured, key=_behind)
    ]
    head = ("row", "seeds", "test", "minus dense", "minus sigma-MoE", "largest over mean load, training; validation")
    notes = (f"Without a result: {'; '.join(lacking)}.",) if lacking else ()
    return markdown_table(Table.of(head, rows, notes=notes))


# Rows that both pages have: label here, study there, variant.
_SHARED = (
    ("softmax before top-k (no renorm.)", "competition", "softmax before top-k"),
    ("softmax after top-k (renorm.)", "competition", "softmax after top-k"),
    ("standard init", "init", "standard, equal-norm"),
    ("no reg (gamma=0, delta=0)", "balance", "neither"),
)


def _disagreement(cells: Cells, results: Path) -> str:
    """The same comparison in the tables of the evidence and in the studies: loss in percent, load as each has it."""
    sigma, rows = cells["sigma-moe", "paper"], []
    for label, name, variant_name in _SHARED:
        cell, study = cells[label, "paper"], read_study(results / f"study-{name}.json")
        first, variant = study.variants[0], next(one for one in study.variants if one.name == variant_name)
        here, there = cell.against_sigma_moe, variant.against_first
        if here is None or cell.load is None or not there or sigma.load is None or sigma.mean is None or first.test is None:
            continue
        unit = sigma.mean / 100
        rows.append(
            (
                label,
                f"{here.difference / unit:+.2f}% [{here.low / unit:+.2f}%, {here.high / unit:+.2f}%]",
                _plus_minus(there["test"].in_unit(first.test.mean / 100), 2, "%"),
                f"{cell.load.valid - sigma.load.valid:+.2f}",
                _plus_minus(there["largest_over_mean"], 2),
                _plus_minus(there["load_entropy"], 3),
            )
        )
    head = ("less sigma-MoE", "loss here", "loss there", "busiest expert here", "busiest expert there", "entropy there")
    notes = ("Test losses in percent of sigma-MoE's. Busiest expert: largest over mean load. Intervals are not corrected.",)
    return markdown_table(Table.of(head, rows, notes=notes))


def _plus_minus(found: Difference, digits: int, unit: str = "") -> str:
    return f"{found.difference:+.{digits}f}{unit} ± {found.half_width:.{digits}f}{unit}"


def _behind(labelled: tuple[str, Cell]) -> tuple[bool, float]:
    label, cell = labelled
    if label == "sigma-moe":
        return False, 0.0
    if cell.against_sigma_moe is not None:
        return False, cell.against_sigma_moe.difference
    return True, math.inf if cell.against_dense is None else cell.against_dense.difference


def _interval(found: Difference | None, n: int) -> str:
    if found is None:
        return "-"
    seeds = "" if found.n_seeds == n else f", {found.n_seeds} common seeds"
    return f"{found.difference:+.3f} [{found.low:+.3f}, {found.high:+.3f}]{seeds}"


def _losses(found: ClaimsResult, *, released: bool) -> str:
    """Of claims, or of released forms against the paper's."""
    claims = [claim for claim in found.claims if claim.topic == "loss" and (claim.numbers == "-") == released]
    rows = [
        (
            ("" if released else f"{claim.numbers}: ")
            + short_words(claim.words)
            + (f" ({_THROUGH})" if claim.through_dense else ""),
            # Why stands below.
            "no verdict" if claim.claimed == "equal or better" and claim.reason else _verdict(claim),
            *(() if released else (formats.signed_percent(claim.published_percent),)),
            *_percent(claim),
            formats.NOT_MEASURED if claim.p_corrected is None else _p(claim.p_corrected),
            str(claim.seeds[0]),
        )
        for claim in claims
    ]
    n_tested = sum(claim.p is not None for claim in claims)
    notes = [
        f"First row less second in percent of the second row's loss (in {found.unit} below); negative is better. p is "
        f"corrected for the {n_tested} comparisons that are tested (Holm), the intervals are not. Decided: p below 5%.",
    ]
    if not released:
        notes.append(
            "Published: column WT-S, logarithms of perplexities; sigma-MoE's is that of table 3 for claim 1, of table 10 for "
            "the others. 'Equals or is better' has no verdict here, as no margin stood before the runs: the control tests "
            "sigma-MoE again.",
        )
        notes.append(
            f"'{_THROUGH.capitalize()}': the difference of two differences from dense, with the widths of both intervals, "
            "hence too wide.",
        )
    head = ("in words", "verdict", *(() if released else ("published",)), "measured", "interval", "p", "seeds")
    return markdown_table(Table.of(head, rows, n_words=2, notes=notes))


def short_words(words: str) -> str:
    """Of a claim, without what the whole column has."""
    words = words.replace("pkm, parameters,", "pkm").replace("(no top-K, as released)", "(released)")
    return words.replace(" (renorm.)", "").replace(" (no renorm.)", "").replace("no reg (gamma=0, delta=0)", "no entropy loss")


def _percent(claim: DecidedClaim) -> tuple[str, str]:
    percent = claim.percent
    if percent is None:
        return formats.NOT_MEASURED, formats.NOT_MEASURED
    low, high = map(formats.signed_percent, (percent.low, percent.high))
    return formats.signed_percent(percent.difference), f"[{low}, {high}]"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _figures(found: ClaimsResult, topic: str) -> str:
    """Claims of load or of speed."""
    claims = [claim for claim in found.claims if claim.topic == topic]
    if topic == "load":
        head = ("claims", "in words", "verdict", "largest over mean load", "seeds")
        note = (
            "Of the worst layer on validation, means over seeds. 'Collapse': nearer to the most that there can be, N_E / K, "
            f"than to even; nothing is said where N_E / K is below {found.room:g}. The paper's is 32."
        )
    else:
        head = ("claims", "in words", "verdict", "times", "seeds")
        note = (
            f"On a CPU. 'Almost flat': time grows by a power of N_E below {found.flat:g}; contradicted above {found.steep:g}. "
            "All else is undecided."
        )
    rows = [(c.numbers, c.words, _verdict(c), _figure(c), ", ".join(map(str, c.seeds)) or "-") for c in claims]
    return markdown_table(Table.of(head, rows, n_words=4, notes=(note,)))


def _verdict(claim: DecidedClaim) -> str:
    if claim.verdict is None:
        return "not run yet"
    if claim.claimed == "different" and claim.verdict == "confirmed":
        return "differs"
    return claim.verdict if claim.reason is None else f"{claim.verdict} ({claim.reason})"


def _figure(claim: DecidedClaim) -> str:
    """The numbers that a verdict rests on."""
    if claim.loads:
        if claim.largest_possible_load is None:
            return " against ".join(f"{load:.2f}" for load in claim.loads)
        return f"{', '.join(f'{load:.2f}' for load in claim.loads)} of {claim.largest_possible_load:g} at most"
    if (growth := claim.growth) is not None:
        span = f"N_E {growth.few} to {growth.many}"
        return f"{span}: {growth.forward:.2f} times the forward, {growth.training:.2f} times with backward"
    if claim.times_over_dense is not None:
        least, greatest = claim.times_over_dense
        return f"{least:.2f} to {greatest:.2f} of its time"
    return "-"


def _compute(table: TableResult) -> str:
    sigma = table.cells[1]
    return (
        f"sigma-MoE computes {sigma.flops_percent:.1f}% of the dense blocks' FLOPs (K/N_E; "
        f"{sigma.counted_flops_percent:.1f}% with the selector).\n"
    )


def _stated(found: ClaimsResult) -> str:
    """The paper's claims, decided here or not."""
    rows = [(claim.numbers, claim.claim, claim.decided_by) for claim in found.stated]
    return markdown_table(Table.of(("claims", "in our words", "decided by"), rows, n_words=3))
