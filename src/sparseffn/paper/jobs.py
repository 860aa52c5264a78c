"""Runs of the pool, one after the other here, or several side by side in processes that share the threads."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import torch

from sparseffn.comparison import Progress
from sparseffn.data import CorpusOrigin
from sparseffn.distribution import World
from sparseffn.errors import UserError
from sparseffn.models import TransformerXLConfig
from sparseffn.paper.costs import training_flops
from sparseffn.paper.execution import execute
from sparseffn.paper.pool import Pool, RunSpec
from sparseffn.training import Layout, TrainConfig
from sparseffn.training.layout import Strategy

# As the command sets it for itself: glibc keeps freed memory, see malloc's mallopt.
_KEEP_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}


@dataclass(frozen=True, kw_only=True)
class NamedRun:
    """A run with what a table calls it."""

    label: str
    seed: int
    spec: RunSpec


def run_all(
    runs: Sequence[NamedRun], pool: Pool, *, jobs: int, device: str, progress: Progress, strategy: Strategy = "ddp"
) -> None:
    """Do every run that may give a result; what fails is reported and does not stop the rest.

    Raises:
        UserError: `jobs` is not positive, or not 1 in one of several processes; or `check_layouts` refuses a run.
    """
    if jobs < 1:
        raise UserError(f"`--jobs` must be at least 1; got {jobs}; fix: --jobs 1")
    if jobs > 1 and not World.here().is_alone:
        raise UserError(f"`--jobs` must be 1 where several processes share each run; got {jobs}; fix: leave one of both out")
    wanted = [run for run in runs if pool.status(run.spec).wanted]
    check_layouts(wanted, device=device, strategy=strategy)
    if len(wanted) < len(runs):
        progress.log(f"{len(runs) - len(wanted)} of {len(runs)} runs are there already, or failed for good")
    if wanted:
        flops = sum(training_flops(run.spec.model, run.spec.train) for run in wanted)
        progress.log(f"{len(wanted)} to do, {flops:.1e} FLOPs of training; --dry-run estimates how long that takes")
    if jobs == 1:
        for position, run in enumerate(wanted):
            run_here(run, pool, position, len(wanted), device=device, progress=progress, strategy=strategy)
    else:
        _run_in_processes(wanted, pool, jobs, device, progress)


def check_layouts(runs: Sequence[NamedRun], *, device: str, strategy: Strategy) -> None:
    """Refuse runs of which one cannot be spread over the processes of this command, before any of them is trained.

    Raises:
        UserError: there is such a run; it is named.
    """
    n = World.here().size
    layout = Layout.of(n, strategy, torch.device(device).type)
    for run in runs:
        try:
            layout.check(run.spec.model, run.spec.train)
        except UserError as error:
            # The remedy of one run, another batch say, is none of a table's.
            why, *_ = str(error).split("; fix:")
            raise UserError(
                f"every run must be one that {n} processes can share by --strategy {strategy}; got {run.label!r}: {why}; "
                "fix: leave its row out, or choose another --strategy or number of processes"
            ) from None


def run_here(
    run: NamedRun, pool: Pool, position: int, n_runs: int, *, device: str, progress: Progress, strategy: Strategy = "ddp"
) -> None:
    on_step = progress.run(run.label, run.seed, position, n_runs)
    status = execute(pool, run.spec, on_step, device=device, strategy=strategy)
    if status.reason is not None:
        progress.log(f"{run.label}, seed {run.seed}: {status.reason}")


def _run_in_processes(wanted: Sequence[NamedRun], pool: Pool, jobs: int, device: str, progress: Progress) -> None:
    threads = max(1, torch.get_num_threads() // jobs)
    processes: list[subprocess.Popen[bytes]] = []

    def work_on(spec: RunSpec) -> str | None:
        """Why the run has no result."""
        task = {"pool": str(pool.path), "threads": threads, "device": device, "identity": spec.identity}
        task["corpus"] = dataclasses.asdict(spec.corpus.origin)
        command = [sys.executable, "-m", __name__]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, env={**os.environ, **_KEEP_FREED_MEMORY})
        processes.append(process)
        process.communicate(json.dumps(task).encode())
        reason = pool.status(spec).reason
        return reason if process.returncode == 0 else f"its process ended with code {process.returncode}; {reason}"

    with ThreadPoolExecutor(jobs) as executor:
        started = {executor.submit(work_on, run.spec): f"{run.label}, seed {run.seed}" for run in wanted}
        try:
            for n_done, future in enumerate(as_completed(started), 1):
                progress.log(f"{started[future]}: {future.result() or 'done'} ({len(started) - n_done} to go)")
        finally:
            executor.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.terminate()


def _work(task: dict[str, Any]) -> None:
    """What a process does: the run that its standard input names."""
    torch.set_num_threads(task["threads"])
    spec = RunSpec(
        model=TransformerXLConfig.from_json(task["identity"]["model"]),
        train=TrainConfig.from_json(task["identity"]["train"]),
        corpus=CorpusOrigin(**task["corpus"]).load(),
    )
    assert spec.identity == task["identity"], "the corpus changed between two processes"
    execute(Pool(task["pool"]), spec, device=task["device"])


if __name__ == "__main__":
    _work(json.load(sys.stdin))
