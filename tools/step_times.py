"""Measure one training step of sigma-MoE against dense blocks at scale `cpu`: what results/step-times.json says of equal time.

    tools/step_times.py results/step-times.json      # under two minutes; nothing else should run

One thread, as the runs of the control have; the models' steps in turn, medians over rounds.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from sparseffn.bench.machine import measured_on
from sparseffn.bench.step import Step, StepShape
from sparseffn.bench.timing import interleaved, medians
from sparseffn.ffn import FFNConfig
from sparseffn.ffn.dense import DenseConfig
from sparseffn.paper.scales import SCALES
from sparseffn.paper.table_rows import sized
from sparseffn.paper.tables import DENSE, SIGMA
from sparseffn.storage import write_json

ROUNDS, WARMUP = 60, 3
# Of `ptb` characters.
VOCABULARY = 50
WIDTHS = (257, 32)


def main(out: Path) -> None:
    torch.set_num_threads(1)
    column = SCALES["cpu"].column("WT-S")
    preset, device = column.preset, torch.device("cpu")
    blocks: dict[str, FFNConfig] = {row.key: sized(row, column, VOCABULARY).ffn for row in (SIGMA, DENSE)}
    blocks |= {f"dense, d_ff {width}": DenseConfig.from_shape(column.shape).replace(d_ff=width) for width in WIDTHS}
    shape = StepShape(batch=preset.batch, context=preset.context, memory=preset.memory, device=device)
    steps = {name: Step(column.model(block, VOCABULARY), shape).run for name, block in blocks.items()}
    seconds = medians(interleaved(steps, rounds=ROUNDS, warmup=WARMUP))
    result = {
        "what": "median seconds of a training step, one thread, the models' steps in turn",
        "sizes": column.sizes,
        "tokens_per_step": shape.config().tokens_per_step,
        "rounds": ROUNDS,
        "seconds": seconds,
        "over_dense": {name: value / seconds["dense"] for name, value in seconds.items()},
        "environment": measured_on(device),
    }
    write_json(out, result)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
