"""`--dry-run`: every run of some tables with what it costs, each distinct run once; nothing is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparseffn.paper.costs import GPU_NAME, GPU_PEAK, GPU_SHARE, Speed, costs
from sparseffn.paper.planned import NOT_PUBLISHED, PlannedTable, is_unequal, residual_percent
from sparseffn.paper.table_rows import convention_percent, counted_percent


def dry_run(tables: Sequence[PlannedTable], speed: Speed, counted: Sequence[str] = ()) -> dict[str, Any]:
    """The runs of all tables; a run that several tables share is listed with the first and counted once.

    Args:
        tables: those that are trained.
        speed: of this machine.
        counted: names of the tables that were asked for with them and need no run.
    """
    runs, seen = [], set()
    for planned in tables:
        for cell in planned.cells:
            if cell.reason == NOT_PUBLISHED:
                continue
            column = planned.columns[cell.column]
            percent = residual_percent(cell, column)
            # Where the corpus is not there yet, the model and its training tell runs apart, with the corpus's name.
            identity = repr((cell.model, cell.train, planned.request.corpora.wanted(column.column)))
            runs.append(
                {
                    "table": planned.table.name,
                    "row": cell.sized.label,
                    "column": column.column.name,
                    "published": cell.published,
                    "n_seeds": len(planned.request.seeds),
                    "residual_percent": percent,
                    "unequal": is_unequal(percent),
                    "flops_percent": convention_percent(cell.model.ffn, column.column),
                    "counted_flops_percent": counted_percent(cell.model.ffn, column.dense.ffn),
                    "shared": identity in seen,
                    "corpus": planned.request.corpora.wanted(column.column)[0],
                    "corpus_missing": column.reason,
                    **costs(cell.model, cell.train, speed),
                }
            )
            seen.add(identity)
    own = [run for run in runs if not run["shared"]]
    return {
        "kind": "paper-dry-run",
        "version": 1,
        "scale": tables[0].request.scale.name if tables else None,
        "runs": runs,
        "without_runs": list(counted),
        "n_distinct": sum(run["n_seeds"] for run in own),
        "totals": {
            key: sum(run[key] * run["n_seeds"] for run in own) for key in ("training_flops", "seconds_here", "seconds_gpu")
        },
        "here": f"estimate: FLOPs / {speed.basis}",
        "gpu": f"estimate: FLOPs / ({GPU_PEAK / 1e12:.0f} TFLOP/s, peak of an {GPU_NAME} in bfloat16, x {GPU_SHARE:.0%} "
        "assumed utilisation)",
        "memory": "estimate: 16 bytes a parameter, and what a step keeps for backward in float32",
    }
