"""Do one run of the pool, or go on with it: train, evaluate, count the experts' load. A failure is recorded, not raised."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from itertools import islice

import torch

from sparseffn.analysis import UsageCounter
from sparseffn.comparison.outcome import count_usage
from sparseffn.data import Corpus, evaluation_windows
from sparseffn.devices import find_device, to_device
from sparseffn.errors import NonFiniteError, UserError
from sparseffn.ffn import collect_stats
from sparseffn.models import TransformerXL
from sparseffn.paper.pool import FORMAT, Pool, RunSpec, RunSummary, Status
from sparseffn.results.table_result import Load
from sparseffn.storage import write_json
from sparseffn.training import TrainConfig, load_run_model, train
from sparseffn.training.loop import OnStep

logger = logging.getLogger(__name__)

# Windows whose routing is looked at in training mode, where batch-wide methods route otherwise.
_LOAD_WINDOWS = 16


def execute(pool: Pool, spec: RunSpec, on_step: OnStep | None = None, *, device: str = "auto") -> Status:
    """Do a run on a device unless it is finished, failed for good, or another process is at it; returns how it then stands."""
    with pool.claimed(spec) as ours:
        if not ours:
            return Status(kind="missing", reason="another process is running it")
        status = pool.status(spec)
        if not status.wanted:
            return status
        if status.stale:
            pool.set_aside(spec)
        pool.failure_path(spec).unlink(missing_ok=True)
        unrecorded = _guarded(pool, spec, lambda: _run(pool, spec, on_step, device))
        return unrecorded or pool.status(spec)


def _guarded(pool: Pool, spec: RunSpec, work: Callable[[], None]) -> Status | None:
    """Record an error, so that it costs this run alone; returns the failure where even that could not be written."""
    try:
        work()
    except NonFiniteError as error:
        steps = [record["step"] for record in pool.folder(spec).read_metrics()]
        at = f"diverged at step {steps[-1] + 1}" if steps else "diverged"
        # The same settings diverge again.
        return _recorded(pool, spec, f"{at}: {error}", permanent=True)
    except Exception as error:
        # Whatever it is, a full disk or a connection that dropped, the runs after it may do.
        if not isinstance(error, UserError | OSError):
            logger.exception("a run failed as none should")
        return _recorded(pool, spec, f"{type(error).__name__}: {error}", permanent=False)
    return None


def _recorded(pool: Pool, spec: RunSpec, reason: str, *, permanent: bool) -> Status | None:
    try:
        pool.record_failure(spec, reason, permanent=permanent)
    except UserError as error:
        return Status(kind="failed", reason=f"{reason} (not recorded: {error})", permanent=permanent)
    return None


def _run(pool: Pool, spec: RunSpec, on_step: OnStep | None, device: str) -> None:
    started, before = time.perf_counter(), _trained_s(pool, spec)
    folder = pool.folder(spec)
    result = train(spec.model, spec.train, spec.corpus, folder.path, device=device, on_step=on_step)
    load = None
    if spec.model.ffn.unit == "experts":
        model, _ = load_run_model(folder.path, device=find_device(device))
        usage = count_usage(model, spec.train, spec.corpus, folder.path)
        load = Load(valid=_worst(usage), training=training_load(model, spec.train, spec.corpus))
    wall_s = before + time.perf_counter() - started
    summary = RunSummary(format=FORMAT, wall_s=max(wall_s, result.seconds), load=load)
    write_json(folder.path / "paper.json", summary)


def _trained_s(pool: Pool, spec: RunSpec) -> float:
    """Seconds of training that an interrupted run has behind it."""
    times = [record["time_s"] for record in pool.folder(spec).read_metrics() if "time_s" in record]
    return times[-1] if times else 0.0


@torch.no_grad()
def training_load(model: TransformerXL, config: TrainConfig, corpus: Corpus) -> float:
    """Largest over mean load on the first windows of validation, routed as in training; the worst layer's."""
    windows = evaluation_windows(corpus.valid, batch=config.batch, context=config.context)
    counter, memory = UsageCounter(), None
    was_training, device = model.training, next(model.parameters()).device
    model.train()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            for window in islice(windows, _LOAD_WINDOWS):
                with collect_stats(model) as stats:
                    memory = model(to_device(window.inputs, device), memory, memory_length=config.memory).memory
                counter.observe(stats)
    finally:
        model.train(was_training)
    return _worst(counter)


def _worst(counter: UsageCounter) -> float:
    loads = [layer.counts.double() for layer in counter.layers.values()]
    return max(float(load.max() / load.mean()) for load in loads)
