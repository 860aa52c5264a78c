"""What a run costs, before it is run: FLOPs and memory in closed form, time as an estimate that says what it rests on.

Time on a GPU is FLOPs over the stated share of the stated peak, no more than that.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sparseffn.bench.step import Step, StepShape
from sparseffn.bench.timing import interleaved, medians
from sparseffn.models import TransformerXLConfig
from sparseffn.paper.planned import NOT_PUBLISHED, PlannedCell, PlannedTable, is_unequal, residual_percent
from sparseffn.paper.scales import SCALES
from sparseffn.paper.table_rows import convention_percent, counted_percent, sized
from sparseffn.paper.tables import DENSE, SIGMA
from sparseffn.results.table_result import DryRunResult, PlannedRun, Totals
from sparseffn.training import TrainConfig
from sparseffn.training.planner import plan
from sparseffn.training.step_costs import step_flops

# NVIDIA's data sheet of the A100 80GB SXM: 312 TFLOP/s in bfloat16, dense. The share is an assumption: matrix products of these
# widths keep a GPU less than half busy.
GPU_NAME, GPU_PEAK, GPU_SHARE = "A100 80GB", 312e12, 0.3
# Vocabulary of the timed models: about that of `ptb` characters, so small that it does not matter.
_TIMED_VOCABULARY = 64


def training_flops(model: TransformerXLConfig, train: TrainConfig) -> float:
    return step_flops(model, train) * train.steps


@dataclass(frozen=True, kw_only=True)
class Speed:
    """FLOP/s of training steps on this machine, by whether the blocks are mixtures."""

    dense: float
    mixture: float
    basis: str

    def step_s(self, model: TransformerXLConfig, train: TrainConfig) -> float:
        rate = self.mixture if model.ffn.unit == "experts" else self.dense
        return step_flops(model, train) / rate


def measure_speed(device: torch.device, rounds: int = 3) -> Speed:
    """Time training steps of the dense and the sigma-MoE model of scale cpu, column WT-S, in turn."""
    column = SCALES["cpu"].column("WT-S")
    preset = column.preset
    shape = StepShape(batch=preset.batch, context=preset.context, memory=preset.memory, device=device)
    models = {row.method: column.model(sized(row, column, _TIMED_VOCABULARY).ffn, _TIMED_VOCABULARY) for row in (DENSE, SIGMA)}
    steps = {name: Step(model, shape) for name, model in models.items()}
    seconds = medians(interleaved({name: step.run for name, step in steps.items()}, rounds=rounds, warmup=1))
    rates = {name: step_flops(model, shape.config()) / seconds[name] for name, model in models.items()}
    basis = "speed of a measured step of scale cpu, column WT-S: " + ", ".join(
        f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in rates.items()
    )
    return Speed(dense=rates["dense"], mixture=rates["sigma-moe"], basis=basis)


def measured_step_s(model: TransformerXLConfig, train: TrainConfig, device: torch.device, rounds: int = 3) -> float:
    """Median seconds of a few training steps of this very model."""
    shape = StepShape(batch=train.batch, context=train.context, memory=train.memory, precision=train.precision, device=device)
    step = Step(model, shape)
    times = interleaved({"step": step.run}, rounds=rounds, warmup=1)["step"]
    return statistics.median(times)


def dry_run(tables: Sequence[PlannedTable], speed: Speed, counted: Sequence[str] = ()) -> DryRunResult:
    """Every run of some tables with its costs, each distinct run counted once; nothing is trained.

    Args:
        tables: those that are trained.
        speed: of this machine.
        counted: names of the tables that were asked for with them and need no run.
    """
    runs: list[PlannedRun] = []
    seen: set[str] = set()
    for planned in tables:
        for cell in planned.cells:
            if cell.reason == NOT_PUBLISHED:
                continue
            corpus, *choice = planned.request.corpora.wanted(planned.columns[cell.column].column)
            # Where the corpus is not there yet, the model and its training tell runs apart, with the corpus's name.
            identity = repr((cell.model, cell.train, corpus, choice))
            runs.append(planned_run(planned, cell, speed, corpus, shared=identity in seen))
            seen.add(identity)
    own = [run for run in runs if not run.shared]
    return DryRunResult(
        scale=tables[0].request.scale.name if tables else None,
        runs=runs,
        without_runs=list(counted),
        n_distinct=sum(run.n_seeds for run in own),
        totals=Totals(
            training_flops=sum(run.training_flops * run.n_seeds for run in own),
            seconds_here=sum(run.seconds_here * run.n_seeds for run in own),
            seconds_gpu=sum(run.seconds_gpu * run.n_seeds for run in own),
        ),
        here=f"estimate: FLOPs / {speed.basis}",
        gpu=f"estimate: FLOPs / ({GPU_PEAK / 1e12:.0f} TFLOP/s, peak of an {GPU_NAME} in bfloat16, x {GPU_SHARE:.0%} "
        "assumed utilisation)",
        memory="estimate: the peak of a step on one GPU, as `sparseffn plan` prints it",
    )


def planned_run(planned: PlannedTable, cell: PlannedCell, speed: Speed, corpus: str, *, shared: bool) -> PlannedRun:
    column, model, train = planned.columns[cell.column], cell.model, cell.train
    flops, percent = training_flops(model, train), residual_percent(cell, column)
    return PlannedRun(
        table=planned.table.name,
        row=cell.sized.label,
        column=column.column.name,
        published=cell.published,
        n_seeds=len(planned.request.seeds),
        residual_percent=percent,
        unequal=is_unequal(percent),
        flops_percent=convention_percent(model.ffn, column.column),
        counted_flops_percent=counted_percent(model.ffn, column.dense.ffn),
        shared=shared,
        corpus=corpus,
        corpus_missing=column.reason,
        params=model.num_params(),
        training_flops=flops,
        memory_bytes=plan(model, train).memory.peak,
        tokens=train.steps * train.tokens_per_step,
        seconds_here=train.steps * speed.step_s(model, train),
        seconds_gpu=flops / (GPU_PEAK * GPU_SHARE),
    )
