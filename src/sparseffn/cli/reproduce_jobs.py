"""Runs of `sparseffn reproduce`, one after the other here or several at once in processes that share the threads."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sparseffn.cli.output import Progress
from sparseffn.cli.process import keep_freed_memory
from sparseffn.cli.reproduce_settings import Runs
from sparseffn.data import load_corpus
from sparseffn.errors import UserError
from sparseffn.models import TransformerXLConfig
from sparseffn.paper.costs import training_flops
from sparseffn.paper.execution import execute
from sparseffn.paper.pool import Pool, RunSpec
from sparseffn.training import TrainConfig

# What a table calls the run, its seed, and the run.
Named = tuple[str, int, RunSpec]

_POLL_S = 0.2


def run_all(runs: Sequence[Named], pool: Pool, *, jobs: int, choice: Runs, progress: Progress) -> None:
    """Do every run that may give a result; what fails is said and does not stop the rest.

    Raises:
        UserError: `jobs` is not positive.
    """
    if jobs < 1:
        raise UserError(f"`--jobs` must be at least 1; got {jobs}; fix: --jobs 1")
    wanted = [run for run in runs if pool.status(run[2]).wanted]
    if len(wanted) < len(runs):
        progress.log(f"{len(runs) - len(wanted)} of {len(runs)} runs are there already, or failed for good")
    if wanted:
        flops = sum(training_flops(spec.model, spec.train) for _, _, spec in wanted)
        progress.log(f"{len(wanted)} to do, {flops:.1e} FLOPs of training; --dry-run says how long that takes")
    if jobs == 1:
        for position, run in enumerate(wanted):
            run_here(run, pool, position, len(wanted), progress)
    else:
        _run_in_processes(wanted, pool, jobs, choice, progress)


def run_here(run: Named, pool: Pool, position: int, n_runs: int, progress: Progress) -> None:
    """One run in this process."""
    name, seed, spec = run
    _say_failure(run, pool, execute(pool, spec, progress.run(name, seed, position, n_runs)).reason, progress)


def _say_failure(run: Named, pool: Pool, reason: str | None, progress: Progress) -> None:
    if reason is not None:
        progress.log(f"{run[0]}, seed {run[1]}: {reason}")


@dataclass(frozen=True)
class _Job:
    """A process and what it does."""

    process: subprocess.Popen[bytes]
    run: Named


def _run_in_processes(wanted: Sequence[Named], pool: Pool, jobs: int, choice: Runs, progress: Progress) -> None:
    threads = max(1, torch.get_num_threads() // jobs)
    left, at_work = list(wanted), []
    try:
        while left or at_work:
            while left and len(at_work) < jobs:
                at_work.append(_start(left.pop(0), pool, threads, choice))
            time.sleep(_POLL_S)
            for job in [job for job in at_work if job.process.poll() is not None]:
                at_work.remove(job)
                reason = pool.status(job.run[2]).reason
                if job.process.returncode != 0:
                    reason = f"its process ended with code {job.process.returncode}; {reason}"
                progress.log(f"{job.run[0]}, seed {job.run[1]}: {reason or 'done'} ({len(left) + len(at_work)} to go)")
    finally:
        for job in at_work:
            job.process.terminate()
            job.process.wait()


def _start(run: Named, pool: Pool, threads: int, choice: Runs) -> _Job:
    spec = run[2]
    task = {
        "pool": str(pool.path),
        "threads": threads,
        "identity": spec.identity,
        "corpus": {
            "name": spec.corpus.name,
            "tokenizer": spec.corpus.tokenizer.name,
            "vocab_size": spec.corpus.tokenizer.vocab_size if spec.corpus.tokenizer.name == "bpe" else None,
            "data_dir": choice.data_dir,
            "cache_dir": choice.cache_dir,
        },
    }
    process = subprocess.Popen([sys.executable, "-m", __name__], stdin=subprocess.PIPE)
    assert process.stdin is not None, "a pipe was asked for"
    # A process that ended before it read this is told of by its code, and the rest goes on.
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(json.dumps(task).encode())
        process.stdin.close()
    return _Job(process, run)


def work(task: dict[str, Any]) -> None:
    """What a process does: the run that its standard input names."""
    keep_freed_memory()
    torch.set_num_threads(task["threads"])
    spec = RunSpec(
        model=TransformerXLConfig.from_json(task["identity"]["model"]),
        train=TrainConfig.from_json(task["identity"]["train"]),
        corpus=load_corpus(**task["corpus"]),
    )
    assert spec.identity == task["identity"], "the corpus changed between two processes"
    execute(Pool(task["pool"]), spec)


if __name__ == "__main__":
    work(json.load(sys.stdin))
