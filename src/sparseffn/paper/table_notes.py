"""What one must know to read a table's numbers: settings, code, clipping, forms, text."""

from __future__ import annotations

from collections.abc import Sequence

from sparseffn.paper.planned import PlannedCell, PlannedColumn, PlannedTable
from sparseffn.paper.pool import Finished, makers_note
from sparseffn.paper.published import SCALED_COLUMNS, facts
from sparseffn.paper.table_rows import RELEASED_FORMS
from sparseffn.paper.tables import get_table
from sparseffn.results.table_result import Load
from sparseffn.training.config import CURVE_TOKENS

# Methods whose balance the paper's statements are about.
_BALANCING = ("s-base", "softmax-renorm-moe", "switch")


def table_notes(
    planned: PlannedTable, runs: Sequence[Finished], loads: Sequence[tuple[PlannedColumn, PlannedCell, Load]]
) -> list[str]:
    """Notes to a whole table.

    Args:
        planned: the table.
        runs: those that are finished.
        loads: of the cells that have one.
    """
    request = planned.request
    notes = [
        *_settings_notes(planned),
        _choice_note(planned),
        makers_note(runs) or "",
        f"validation at equal time is of the first {2 * CURVE_TOKENS:,} tokens, as during training" if runs else "",
        "hyperparameters are the same for all methods of a column" if request.settings == "paper" else "",
        request.scale.note,
        "training time is steps x the median step of the runs themselves, as the machine was then",
        *_published_notes(planned),
    ]
    if request.settings == "released":
        notes.append(
            "gamma of WT-S is 1e-4 here, and 1e-3 occurs among the released runs too; gamma of C4-S and "
            "peS2o-S is 0 (paper: 1e-3); delta of WT-B, C4-B and peS2o-B is 0.1 (paper: 0.2); Switch starts at standard scale "
            "with rows of equal norm on C4-B and peS2o-B, elsewhere at a tenth of the variance with free rows"
        )
    for column, cell, load in loads:
        if cell.sized.row.method in _BALANCING:
            notes.append(
                f"{column.column.name}, {cell.sized.label}: largest over mean load {load.training:.2f} as in training, "
                f"{load.valid:.2f} on validation"
            )
    return [note for note in notes if note]


def _choice_note(planned: PlannedTable) -> str:
    """How much of the table was asked for."""
    chosen = planned.table
    whole = get_table(chosen.name).selected(columns=None, rows=None, settings=planned.request.settings)
    if (len(chosen.rows), len(chosen.columns)) == (len(whole.rows), len(whole.columns)):
        return ""
    return (
        f"a part of the table: {len(chosen.rows)} of {len(whole.rows)} rows and {len(chosen.columns)} of "
        f"{len(whole.columns)} columns were asked for"
    )


def _published_notes(planned: PlannedTable) -> list[str]:
    """In what the published values differ from one another, and from what is measured here."""
    own = facts().get(planned.table.name, {}).get("note", "")
    notes = [f"of the published values: {own}" if own else ""]
    if any(cell.published is not None for cell in planned.cells):
        notes.append(
            "the published runs mix two clippings of the gradient: 0.1 for the small dense and Top-K models on words, 0.25 for "
            "all others" + (", and so do these" if planned.request.settings == "released" else "; here a column has one")
        )
    forms = {cell.sized.row.method for cell in planned.cells if cell.published is not None} & RELEASED_FORMS.keys()
    if forms:
        beside = "; both forms stand beside the same published value" if planned.request.settings == "paper" else ""
        notes.append(
            f"the published rows of {', '.join(sorted(forms))} come from the released code, whose form differs from the "
            f"paper's ({'; '.join(RELEASED_FORMS[method] for method in sorted(forms))}){beside}"
        )
    if planned.request.scale.is_published:
        names = [planned.columns[cell.column].column.name for cell in planned.cells]
        if any(name.startswith("WT") for name in names):
            notes.append(
                "the published WikiText-103 runs encoded the text line by line without an end-of-line token; here line ends "
                "are kept and predicted"
            )
        if any(name in SCALED_COLUMNS for name in names):
            notes.append("C4 and peS2o: what separates documents, and the part of peS2o that is evaluated, are chosen here")
    return notes


def _settings_notes(planned: PlannedTable) -> list[str]:
    """Length, batch and optimiser of the columns; those that share them on one line."""
    columns: dict[str, list[str]] = {}
    for c, column in enumerate(planned.columns):
        train = next(cell.train for cell in planned.cells if cell.column == c)
        # Released runs clip some methods otherwise, which a note of its own says.
        clip = f", clip {train.clip:g}" if planned.request.settings == "paper" else ""
        words = (
            f"{train.steps:,} steps of {train.tokens_per_step:,} tokens, lr {train.lr:g}, warm-up {train.warmup}{clip}, "
            f"dropout {column.column.shape.dropout:g}, {train.precision}"
        )
        columns.setdefault(words, []).append(column.column.name)
    return [f"{', '.join(names)}: {words}" for words, names in columns.items()]
