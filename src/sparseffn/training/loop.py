"""The training loop: read top to bottom, it is all that happens to a model.

A run is a function of its config: parameters and dropout come from the seed, the position in the corpus from the step. It goes
on from its last checkpoint when it is called again, with bit-identical losses. Equal bits are promised for one kind of device
and number of threads, which decide the order of sums and the draws of dropout; on a GPU some of PyTorch's sums have a fixed
order only under `torch.use_deterministic_algorithms(True)`. On another device a run goes on as well, and `metrics.jsonl` tells
from which step.

Several processes take the steps together where a launcher started them (see `distribution`), each with its own streams of the
batch. The mathematics is that of one process: a run goes on in any other number of them. The first one writes the files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sparseffn.data import Corpus, TrainingStreams
from sparseffn.devices import device_name, find_device
from sparseffn.distribution import World
from sparseffn.errors import Interrupted, NonFiniteError, UserError, unknown_name
from sparseffn.evaluation import Evaluation, NonFiniteLossError, evaluate
from sparseffn.ffn.mixture import MixtureConfig
from sparseffn.models import ModelConfig, build_model
from sparseffn.storage import file_digest, remove_unfinished, sole_writer, write_bytes
from sparseffn.training.checkpoint import KEPT, MANIFEST, Checkpoint, list_checkpoints, load_checkpoint, save_checkpoint
from sparseffn.training.config import TrainConfig
from sparseffn.training.failures import is_out_of_memory, out_of_memory, stopped_by_device
from sparseffn.training.generators import all_generators, restore_own_generators, seed_generators
from sparseffn.training.health import COLLAPSE_FROM, collapse, where_not_finite
from sparseffn.training.interruption import Interruption
from sparseffn.training.journal import Journal, OnMetrics, OnStep
from sparseffn.training.layout import Layout, Strategy
from sparseffn.training.replicas import replicate
from sparseffn.training.restore import load_weights
from sparseffn.training.result import TrainResult
from sparseffn.training.run_folder import RunFolder
from sparseffn.training.snapshots import routes_to_experts, save_snapshot, snapshot
from sparseffn.training.stepper import StepNumbers, Stepper, read_steps
from sparseffn.training.together import announce

_log = logging.getLogger(__name__)

# Steps between readings of what they did, 10 on other devices: reading waits for the device, which would then be idle.
READ_EVERY = {"cpu": 1}

# Steps in a row that may be skipped: parameters do not change by them, so that after so many nothing else is to be expected.
MAX_SKIPPED = 10

NonFinite = Literal["stop", "skip"]
"""What becomes of a run whose loss or gradient is not finite in a step, which is not taken either way."""


def train(
    model_config: ModelConfig,
    config: TrainConfig,
    corpus: Corpus,
    out: Path | str,
    *,
    device: str | torch.device = "auto",
    non_finite: NonFinite = "stop",
    keep: int = KEPT,
    world: World | None = None,
    strategy: Strategy = "ddp",
    on_step: OnStep | None = None,
    on_metrics: OnMetrics | None = None,
) -> TrainResult:
    """Train a model in a run folder, or go on where the folder's last checkpoint stands.

    SIGTERM and Ctrl-C end it after the step that is under way, saved.

    Args:
        model_config: the model.
        config: hyperparameters.
        corpus: its vocabulary must be the model's.
        out: the run folder; made when it is not there.
        device: a name for `find_device`; no part of what identifies the run, as all that follows.
        non_finite: what becomes of a step whose loss or gradient is not finite: `stop` ends the run, `skip` leaves the step
            out, notes it in `metrics.jsonl` and in the result, and goes on; ten in a row end the run all the same.
        keep: checkpoints that are kept, the last ones; the best on validation is kept besides.
        world: the processes that train, which must all call this with the same arguments and see the same folder; None: those
            that `torch.distributed` has joined, or this one alone.
        strategy: of several processes; see `replicas`.
        on_step: called after every step, on a GPU for several steps together; in the first process alone.
        on_metrics: called with each record of a step or a validation that is written to `metrics.jsonl`; likewise.

    Returns:
        Final validation and test loss; a finished run returns its result immediately.

    Raises:
        UserError: sizes do not fit, there is no such device, the folder is of another config, or a checkpoint is damaged; in
            all processes what one of them is refused.
        OtherProcessError: another process failed.
        NonFiniteLossError: a loss became non-finite; the message names tensors, tokens and the last checkpoint before it.
        Interrupted: a signal ended the run; it goes on when it is called again.
    """
    if non_finite not in ("stop", "skip"):
        raise unknown_name("`non_finite`", non_finite, ("stop", "skip"))
    if keep < 1:
        raise UserError(f"`keep` must be at least 1; got {keep}; fix: leave it out to keep the last {KEPT}")
    folder, device, world = RunFolder(out), find_device(device), world or World.here()
    if model_config.vocab_size != corpus.tokenizer.vocab_size:
        raise UserError(
            f"`vocab_size` must be the corpus's {corpus.tokenizer.vocab_size}; got {model_config.vocab_size}; "
            "fix: build the model's config from the corpus"
        )
    identity = run_config(model_config, config, corpus)
    if world.announces:
        run = {"model": model_config.to_json(), "config": config.to_json(), "out": str(Path(out).absolute())}
        announce(world, {**run, "device": device.type, "non_finite": non_finite, "strategy": strategy}, corpus)
    with world.fail_together(), contextlib.ExitStack() as stack:
        world.agree(
            "the settings of a run",
            {**identity, "out": str(folder.path.absolute()), "strategy": strategy, "non_finite": non_finite},
        )
        with world.together():
            layout = Layout.of(world.size, strategy, device.type)
            layout.check(model_config, config)
            # A corpus that is too small for a window is refused before anything is written.
            streams = corpus.training_streams(batch=config.batch, context=config.context, seed=config.seed)
            finished = _open(folder, identity, corpus, config, device, stack) if world.leads else None
        finished = _shared(finished, world)
        if finished is not None:
            return finished
        model = build_model(model_config)
        model.init_parameters(config.seed)
        replica = replicate(model.to(device), config, world, strategy)
        stepper = Stepper(model, config, goes_on=non_finite == "skip", world=world, replica=replica)
        journal = Journal(folder, config, corpus.unit, speaks=world.leads, on_step=on_step, on_metrics=on_metrics)
        run = _Run(stepper, corpus, streams, folder, journal, non_finite, keep)
        try:
            return run.run()
        except torch.AcceleratorError as error:
            if "device-side assert" not in str(error):
                raise
            raise stopped_by_device(run.step - len(run.unread) + 1, run.step + 1, run.last_good()) from error
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise out_of_memory(config, model_config, str(device), run.step, run.last_good(), layout) from error


def _open(
    folder: RunFolder,
    identity: dict[str, Any],
    corpus: Corpus,
    config: TrainConfig,
    device: torch.device,
    stack: contextlib.ExitStack,
) -> TrainResult | None:
    """Claim the folder for the run, as long as the stack is open; returns the result of a run that is finished."""
    folder.check(identity)
    if folder.result_path.exists():
        return TrainResult.read(folder.result_path)
    stack.enter_context(sole_writer(folder.path))
    remove_unfinished(folder.path)
    fresh = folder.open(identity, device=str(device))
    for note in config.notes if fresh else ():
        _log.warning(note)
    folder.note_corpus(corpus)
    return None


def _shared(result: TrainResult | None, world: World) -> TrainResult | None:
    """The first process's result, in all of them."""
    said = json.loads(world.texts("null" if result is None else json.dumps(dataclasses.asdict(result)))[0])
    return result if world.leads or said is None else TrainResult(**{**said, "notes": tuple(said["notes"])})


def run_config(model_config: ModelConfig, config: TrainConfig, corpus: Corpus) -> dict[str, Any]:
    """What identifies a run: everything its losses depend on but the environment."""
    return {
        "model": model_config.to_json(),
        "train": config.to_json(),
        "corpus": {"name": corpus.name, "tokenizer": corpus.tokenizer.name, "digest": corpus.digest},
    }


@dataclass
class _Run:
    """State of a run between steps."""

    stepper: Stepper
    corpus: Corpus
    streams: TrainingStreams
    folder: RunFolder
    journal: Journal
    non_finite: NonFinite
    keep: int
    step: int = 0
    seconds: float = 0.0
    saving_seconds: float = 0.0
    unread: list[Tensor] = field(default_factory=list)
    """What the last steps did, still on the device."""
    started: float = 0.0
    """When the first of them began."""
    valid: tuple[int, float] | None = None
    """Step and loss of the last point of the validation curve."""
    skipped: int = 0
    """Steps in a row, up to now, that were left out."""

    def __post_init__(self) -> None:
        self.model, self.config, self.world = self.stepper.model, self.stepper.config, self.stepper.world

    def run(self) -> TrainResult:
        """Train to the last step, evaluate, write the result."""
        with Interruption(self._how_to_go_on) as interruption:
            # Before the first step nothing would be lost; several processes end after the same step all the same.
            interruption.all_is_saved = self.world.is_alone
            self._resume()
            with self.world.together():
                self.journal.go_on()
            self.model.train()
            interruption.all_is_saved = False
            while self.step < self.config.steps:
                self._take_step()
                validates, saves = self._is_due(self.config.eval_every), self._is_due(self.config.checkpoint_every)
                reads = validates or saves or self._is_due(READ_EVERY.get(self.stepper.device.type, 10))
                # Several processes leave after the same step: they hear of each other's signals where they read.
                signal = interruption.number or 0
                if not self.world.is_alone:
                    signal = self.world.max(signal, self.stepper.device) if reads else 0
                if reads or signal:
                    self._read_steps()
                if validates:
                    self._validate()
                if saves or signal:
                    self.save()
                if signal:
                    raise self._interrupted(signal)
            interruption.all_is_saved = True
            return self._finish()

    def _finish(self) -> TrainResult:
        """Evaluate, write the result."""
        valid, test = self._evaluate_whole("valid"), self._evaluate_whole("test")
        with self.world.together():
            result = self._write_result(valid, test) if self.world.leads else None
        result = _shared(result, self.world)
        assert result is not None, "the first process has one"
        return result

    def _write_result(self, valid: float, test: float) -> TrainResult:
        n_skipped = self.folder.n_skipped()
        left_out = f"{n_skipped} step{'s were' if n_skipped > 1 else ' was'} left out: loss or gradient were not finite"
        result = TrainResult(
            steps=self.step,
            valid=valid,
            test=test,
            seconds=self.seconds,
            saving_seconds=self.saving_seconds,
            notes=(*self.config.notes, *([left_out] if n_skipped else [])),
        )
        result.write(self.folder)
        return result

    def _is_due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.steps

    def _take_step(self) -> None:
        if not self.unread:
            self.started = time.perf_counter()
        window = self.step % self.streams.n_windows
        if window == 0:
            self.stepper.forget()
        self.window = self.streams.window(window, self.stepper.own_streams)
        self.unread.append(self.stepper.take(*self.window, lr=self.config.lr_at(self.step)))
        self.step += 1

    def _read_steps(self) -> None:
        """Wait for the steps since the last reading and report them; the first that was not taken ends the run."""
        if not self.unread:
            return
        read = read_steps(self.unread, self.config)
        step, seconds = self.step - len(read), (time.perf_counter() - self.started) / len(read)
        self.unread.clear()
        failed: tuple[int, StepNumbers] | None = None
        with self.world.together():
            for numbers in read:
                step += 1
                self.seconds += seconds
                if numbers.finite or numbers.overflowed:
                    self.skipped = 0
                    self.journal.report(step, numbers, seconds=seconds, seconds_of_all=self.seconds)
                elif not self._leave_out(step, numbers):
                    failed = step, numbers
                    break
        if failed is not None:
            raise self.world.agreed(self._not_taken(*failed))

    def _leave_out(self, step: int, numbers: StepNumbers) -> bool:
        """Whether a step that is not finite is noted and the run goes on."""
        self.skipped += 1
        goes_on = self.non_finite == "skip" and self.skipped <= MAX_SKIPPED
        if goes_on:
            self.journal.record({"step": step, "skipped": _what(numbers)})
        return goes_on

    def _not_taken(self, step: int, numbers: StepNumbers) -> NonFiniteLossError:
        # No checkpoint is written before the steps are read. Of those before the last nothing is left to look at.
        where = self._where() if step == self.step else ""
        remedy = "lower lr or raise warmup in a new --out" + (
            "" if self.skipped > 1 else ", or leave such steps out, `--non-finite skip`"
        )
        return NonFiniteLossError(
            f"loss and gradient must be finite; got {_what(numbers)} at step {step}, which was not "
            f"taken{where and f' ({where})'}; fix: {remedy}. Last good checkpoint: {self.last_good()}"
        )

    def _where(self) -> str:
        window = (self.step - 1) % self.streams.n_windows
        device = self.stepper.device
        inputs, targets = (tokens.to(device) for tokens in self.window)
        found = self.world.texts(where_not_finite(self.model, self.stepper.token_losses, inputs, targets, window))
        if self.world.is_alone:
            return found[0]
        return "; ".join(f"process {rank}: {where}" for rank, where in enumerate(found) if where)

    def _interrupted(self, number: int) -> Interrupted:
        return Interrupted(
            f"interrupted after step {self.step} of {self.config.steps}, which is saved in {self.last_good()}; "
            "the same command goes on from there",
            number,
        )

    def last_good(self) -> Path | str:
        """The checkpoint that a run that failed goes on from."""
        found = list_checkpoints(self.folder.checkpoints)
        return found[-1] if found else "none, the run had not reached its first"

    def _how_to_go_on(self) -> str:
        """Where a run stands that ends in the middle of a step, or before its first one."""
        if found := list_checkpoints(self.folder.checkpoints):
            return f"its last checkpoint is {found[-1]}; the same command goes on from there"
        return "it had not reached its first checkpoint, so nothing of it was saved; the same command begins anew"

    def _validate(self) -> None:
        """A point of the validation curve, and the routing at it."""
        self.valid = self.step, self._evaluate("valid", self.config.eval_tokens).nats_per_token
        selections = snapshot(self.model, self.corpus, self.config) if routes_to_experts(self.model) else None
        with self.world.together():
            self.journal.record({"step": self.step, "valid": self.valid[1]})
            if selections is not None and self.world.leads:
                save_snapshot(self.folder.path, self.step, selections)
                if self.step >= COLLAPSE_FROM and isinstance(self.model.config.ffn, MixtureConfig):
                    self.journal.warn(self.step, collapse(selections, self.model.config.ffn))

    def _evaluate_whole(self, split: str) -> float:
        """The final loss on a split; the losses of its windows are kept for paired comparisons of runs."""
        evaluation = self._evaluate(split)
        losses = io.BytesIO()
        np.save(losses, evaluation.window_nats)
        with self.world.together():
            if self.world.leads:
                write_bytes(self.folder.window_losses_path(split), losses.getvalue())
        return evaluation.nats_per_token

    def _evaluate(self, split: str, max_tokens: int | None = None) -> Evaluation:
        try:
            tokens = getattr(self.corpus, split)
            return evaluate(self.model, tokens, max_tokens=max_tokens, world=self.world, **self.config.evaluation)
        except NonFiniteError as error:
            message = f"{error}; {split} after step {self.step}. Last good checkpoint: {self.last_good()}"
            raise self.world.agreed(NonFiniteLossError(message)) from None

    def save(self) -> None:
        """Write a checkpoint of everything that the next step depends on, of all processes."""
        started = time.perf_counter()
        streams = {f"stream.{key}": value for key, value in self.streams.state().items()}
        tensors = {
            **self.stepper.tensors(),
            **streams,
            **all_generators(self.stepper.device, self.world, self.stepper.replica.batch),
        }
        with self.world.together():
            if self.world.leads:
                self._write_checkpoint(tensors)
        self.saving_seconds += time.perf_counter() - started

    def _write_checkpoint(self, tensors: dict[str, Tensor]) -> None:
        checkpoint = Checkpoint(
            step=self.step,
            tensors=tensors,
            seconds=self.seconds,
            saving_seconds=self.saving_seconds,
            scaler=self.stepper.scaler.state_dict(),
            run=self.folder.digest(),
            tokenizer=file_digest(self.folder.tokenizer_path),
            valid=self.valid[1] if self.valid is not None and self.valid[0] == self.step else None,
        )
        save_checkpoint(self.folder.checkpoints, checkpoint, kept=self.keep)

    def _resume(self) -> None:
        """Take up the last checkpoint, or start where there is none."""
        found, device = list_checkpoints(self.folder.checkpoints), self.stepper.device
        last = self.world.texts(found[-1].name if found else "")[0]
        if not last:
            seed_generators(self.config.seed, self.world)
            self._rewind(-1)
            self._validate()
            return
        path = self.folder.checkpoints / last
        with self.world.together():
            checkpoint = load_checkpoint(path, run=self.folder.digest())
        self.world.agree(f"{last} of the run", file_digest(path / MANIFEST))
        with self.world.together():
            try:
                load_weights(self.model, path, checkpoint, place=self.stepper.replica.place)
                self.stepper.restore(checkpoint)
                self.streams.restore(checkpoint.group("stream"))
                restore_own_generators(checkpoint, device, self.world, self.stepper.replica.batch, seed=self.config.seed)
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                if isinstance(error, UserError):
                    raise
                raise UserError(
                    f"`{path}` must hold the state of this run; got another one ({error}); "
                    "fix: restore config.json and the checkpoint together"
                ) from None
        self.step, self.seconds, self.saving_seconds = checkpoint.step, checkpoint.seconds, checkpoint.saving_seconds
        self._rewind(self.step)

    def _rewind(self, step: int) -> None:
        """Drop the metrics after a step, from which on this device is used."""
        with self.world.together():
            if self.world.leads:
                self.folder.rewind_metrics(step)
                self.folder.note_device(max(step, 0), device_name(self.stepper.device))


def _what(numbers: StepNumbers) -> str:
    return f"loss {numbers.loss} and gradient norm {numbers.grad_norm}"
