"""Do one run of the pool, or go on with it: train, evaluate, count the experts' load. A failure is recorded, not raised."""

from __future__ import annotations

import logging
import time
from itertools import islice

import torch

from sparseffn.analysis import UsageCounter
from sparseffn.comparison.outcome import count_usage
from sparseffn.data import Corpus, evaluation_windows
from sparseffn.devices import find_device, to_device
from sparseffn.distribution import LostProcessError
from sparseffn.errors import NonFiniteError, UserError
from sparseffn.ffn import collect_stats
from sparseffn.models import LanguageModel
from sparseffn.paper.pool import FORMAT, Pool, RunSpec, RunSummary, Status
from sparseffn.results.table_result import Load
from sparseffn.storage import write_json
from sparseffn.training import TrainConfig, load_run_model, train
from sparseffn.training.journal import OnStep
from sparseffn.training.layout import Strategy

logger = logging.getLogger(__name__)

# Windows whose routing is looked at in training mode, where batch-wide methods route otherwise.
_LOAD_WINDOWS = 16


def execute(
    pool: Pool, spec: RunSpec, on_step: OnStep | None = None, *, device: str = "auto", strategy: Strategy = "ddp"
) -> Status:
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
        try:
            _run(pool, spec, on_step, device, strategy)
        except LostProcessError:
            raise
        except Exception as error:
            # Whatever it is, a full disk or a connection that dropped, the runs after it may do.
            return _recorded(pool, spec, error)
        return pool.status(spec)


def _recorded(pool: Pool, spec: RunSpec, error: Exception) -> Status:
    """How a run stands after an error, which is written down."""
    # The same settings diverge again.
    diverged = isinstance(error, NonFiniteError)
    if diverged:
        steps = [record["step"] for record in pool.folder(spec).read_metrics()]
        reason = f"diverged at step {steps[-1] + 1}: {error}" if steps else f"diverged: {error}"
    else:
        if not isinstance(error, UserError | OSError):
            logger.exception("a run failed as none should")
        reason = f"{type(error).__name__}: {error}"
    try:
        pool.record_failure(spec, reason, permanent=diverged)
    except UserError as unwritten:
        return Status(kind="failed", reason=f"{reason} (not recorded: {unwritten})", permanent=diverged)
    return pool.status(spec)


def _run(pool: Pool, spec: RunSpec, on_step: OnStep | None, device: str, strategy: Strategy) -> None:
    folder, started = pool.folder(spec), time.perf_counter()
    # An interrupted run has seconds of training behind it.
    before = max((record["time_s"] for record in folder.read_metrics() if "time_s" in record), default=0.0)
    result = train(spec.model, spec.train, spec.corpus, folder.path, device=device, strategy=strategy, on_step=on_step)
    load = None
    if spec.model.ffn.unit == "experts":
        model, _ = load_run_model(folder.path, device=find_device(device))
        usage = count_usage(model, spec.train, spec.corpus, folder.path)
        load = Load(valid=_worst(usage), training=training_load(model, spec.train, spec.corpus))
    wall_s = before + time.perf_counter() - started
    summary = RunSummary(format=FORMAT, wall_s=max(wall_s, result.seconds), load=load)
    write_json(folder.path / "paper.json", summary, seal=True)


@torch.no_grad()
def training_load(model: LanguageModel, config: TrainConfig, corpus: Corpus) -> float:
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
