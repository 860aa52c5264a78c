"""A table at a scale: every cell with its model and its runs, before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from sparseffn.data import Corpus
from sparseffn.errors import UserError
from sparseffn.matching import TOLERANCE
from sparseffn.models import TransformerXLConfig
from sparseffn.paper.corpus_choice import Corpora
from sparseffn.paper.pool import RunSpec
from sparseffn.paper.scales import Column, Scale, Settings, released_clip
from sparseffn.paper.table_rows import Sized, sized
from sparseffn.paper.tables import DENSE, Table
from sparseffn.training import TrainConfig
from sparseffn.training.config import CURVE_TOKENS, from_preset

NOT_PUBLISHED = "not evaluated in the paper"


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """What is common to all tables of a reproduction."""

    scale: Scale
    corpora: Corpora
    settings: Settings = "paper"
    seeds: tuple[int, ...] = (0,)
    steps: int | None = None
    """None: the scale's."""

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"`seeds` must be different from one another; got {list(self.seeds)}; fix: --seeds N")
        if min(self.seeds) < 0:
            raise UserError(f"`seeds` must be at least 0; got {min(self.seeds)}; fix: --seeds N")
        if self.steps is not None and self.steps < 1:
            raise UserError(f"`steps` must be at least 1; got {self.steps}; fix: leave it out for the scale's")


@dataclass(frozen=True, kw_only=True, eq=False)
class PlannedColumn:
    """A column with its corpus, or the reason why it has none."""

    column: Column
    corpus: Corpus | None
    reason: str | None
    vocab_size: int
    dense: TransformerXLConfig
    """What the others are compared with."""
    steps: int


@dataclass(frozen=True, kw_only=True, eq=False)
class PlannedCell:
    """A row in a column."""

    row: int
    column: int
    sized: Sized
    model: TransformerXLConfig
    published: float | None
    reason: str | None
    """Why it is not run; None where it is."""
    specs: dict[int, RunSpec] = field(default_factory=dict)
    """Runs by seed; empty where there is no corpus or the cell is not run."""
    train: TrainConfig

    @property
    def key(self) -> str:
        """The row's key."""
        return self.sized.row.key


@dataclass(frozen=True, kw_only=True, eq=False)
class PlannedTable:
    """All cells, row by row."""

    table: Table
    request: Request
    columns: Sequence[PlannedColumn]
    cells: Sequence[PlannedCell]

    def runs(self) -> Iterator[tuple[PlannedCell, int, RunSpec]]:
        """Every run, one seed after the other."""
        for seed in self.request.seeds:
            for cell in self.cells:
                if seed in cell.specs:
                    yield cell, seed, cell.specs[seed]


def plan_table(table: Table, request: Request) -> PlannedTable:
    """Size every cell of a table."""
    columns = [_column(name, request) for name in table.columns]
    cells = [_cell(table, request, r, c, row_column) for r, _ in enumerate(table.rows) for c, row_column in enumerate(columns)]
    return PlannedTable(table=table, request=request, columns=columns, cells=cells)


def _column(name: str, request: Request) -> PlannedColumn:
    column = request.scale.column(name, request.settings)
    corpus, reason = None, None
    try:
        corpus = request.corpora.of(column)
    except UserError as error:
        reason = str(error)
    vocab_size = request.corpora.expected_vocabulary(column) if corpus is None else corpus.tokenizer.vocab_size
    dense = column.model(sized(DENSE, column, vocab_size).ffn, vocab_size)
    steps = column.preset.steps if request.steps is None else request.steps
    return PlannedColumn(column=column, corpus=corpus, reason=reason, vocab_size=vocab_size, dense=dense, steps=steps)


def _cell(table: Table, request: Request, r: int, c: int, planned: PlannedColumn) -> PlannedCell:
    row, column = table.rows[r], planned.column
    published = table.values.get((row.published, column.name))
    # At the small scales a row that the paper left out costs little; at the published one it is not the paper's.
    left_out = request.scale.is_published and published is None and not row.own and not column.is_own
    reason = NOT_PUBLISHED if left_out else planned.reason
    own = sized(row, column, planned.vocab_size)
    model = column.model(own.ffn, planned.vocab_size)
    trains = {seed: train_settings(planned, row.method, request, seed) for seed in request.seeds}
    specs = {}
    if reason is None and planned.corpus is not None:
        specs = {seed: RunSpec(model=model, train=train, corpus=planned.corpus) for seed, train in trains.items()}
    return PlannedCell(
        row=r,
        column=c,
        sized=own,
        model=model,
        published=published,
        reason=reason,
        specs=specs,
        train=trains[request.seeds[0]],
    )


def train_settings(planned: PlannedColumn, method: str, request: Request, seed: int) -> TrainConfig:
    """Hyperparameters of a run: the preset's, for all methods alike but where the released runs are not."""
    preset = planned.column.preset
    clip = released_clip(planned.column.name, method) if request.settings == "released" else None
    return from_preset(
        preset,
        steps=planned.steps,
        seed=seed,
        clip=preset.clip if clip is None else clip,
        # The paper's mixed precision; float16 there, bfloat16 here.
        precision="bfloat16" if request.scale.is_published else "float32",
        eval_tokens=2 * CURVE_TOKENS,
    )


def residual_percent(cell: PlannedCell, planned: PlannedColumn) -> float:
    """Parameters against the column's dense model."""
    dense = planned.dense.num_params()
    return 100.0 * (cell.model.num_params() - dense) / dense


def is_unequal(percent: float) -> bool:
    """Whether a residual must be marked: published sizes are printed as they are."""
    return abs(percent) > 100 * TOLERANCE
