"""One run in 1, 2 and 4 processes, by DDP and by FSDP2: writes results/processes.json and docs/processes.svg.

    python tools/processes.py [--steps 200]

The processes are on this machine and join by gloo. With more of them than cores they share cores: their tokens per second say
what communication costs, not what more machines would give.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from sparseffn.cli.process import leave
from sparseffn.comparison import match_methods, parse_methods
from sparseffn.data import load_corpus
from sparseffn.distribution import joined
from sparseffn.models.presets import get_preset
from sparseffn.report.plotting import Line, line_plot, method_style, standalone_svg
from sparseffn.results.processes_result import ProcessesResult, ProcessesRun
from sparseffn.storage import environment, write_json, write_text
from sparseffn.training import RunFolder, from_preset, train

ROOT = Path(__file__).resolve().parent.parent
METHOD, PRESET = "sigma-moe", "tiny"
EVALUATED = 4097
"""Tokens of a split: the steps are what is looked at."""
WAYS = [(1, "alone"), (2, "ddp"), (4, "ddp"), (2, "fsdp"), (4, "fsdp")]


def work(out: str, steps: int, strategy: str) -> None:
    """One process of a run."""
    torch.set_num_threads(1)
    preset, corpus = get_preset(PRESET), load_corpus("stdlib")
    corpus = dataclasses.replace(corpus, valid=corpus.valid[:EVALUATED], test=corpus.test[:EVALUATED])
    model = match_methods(parse_methods([METHOD]), preset, corpus.tokenizer.vocab_size)[0].model
    with joined("cpu"):
        train(
            model, from_preset(preset, steps=steps), corpus, out, device="cpu", strategy="fsdp" if strategy == "fsdp" else "ddp"
        )


def measure(n: int, strategy: str, steps: int, folder: Path) -> ProcessesRun:
    """Train in n processes; losses, and tokens per second of the median step after the first tenth."""
    out = folder / f"{n}-{strategy}"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)] if n > 1 else []
    worker = [str(Path(__file__)), "--worker", str(out), "--steps", str(steps), "--strategy", strategy]
    subprocess.run([sys.executable, *launcher, *worker], check=True)
    records = [record for record in RunFolder(out).read_metrics() if "loss" in record]
    times = [b["time_s"] - a["time_s"] for a, b in itertools.pairwise(records[steps // 10 :])]
    tokens = json.loads((out / "config.json").read_text())["train"]
    speed = tokens["batch"] * tokens["context"] / statistics.median(times)
    return ProcessesRun(processes=n, strategy=strategy, losses=[r["loss"] for r in records], tokens_per_s=speed)


def draw(result: ProcessesResult) -> None:
    """The losses of all ways, one over the other."""
    lines = []
    for i, run in enumerate(result.runs):
        label = "1 process" if run.processes == 1 else f"{run.processes}, {run.strategy}"
        steps = [float(step) for step in range(1, len(run.losses) + 1)]
        lines.append(Line(label, steps, run.losses, method_style(i)))
    plot = line_plot(
        lines,
        name="processes",
        title="One run in 1, 2 and 4 processes",
        caption="Training loss by step; the lines lie over one another.",
        axes_names=("step", "loss, nats a byte"),
        below=(result.difference_in_words(),),
    )
    write_text(ROOT / "docs" / "processes.svg", standalone_svg(plot))


def main() -> int:
    """Measure all ways, or be a process of one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--strategy", default="ddp", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.steps, options.strategy)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        runs = [measure(n, strategy, options.steps, Path(folder)) for n, strategy in WAYS]
    here = environment("cpu")
    result = ProcessesResult(method=METHOD, preset=PRESET, environment=here, runs=runs)
    write_json(ROOT / "results" / "processes.json", result)
    draw(result)
    return 0


if __name__ == "__main__":
    sys.exit(leave(main()))
