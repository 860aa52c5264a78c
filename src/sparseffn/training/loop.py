"""The training loop: read top to bottom, it is all that happens to a model.

A run is a function of its config: parameters and dropout come from the seed, the position in the corpus from the step. It goes
on from its last checkpoint when it is called again, with bit-identical losses. Equal bits are promised for one kind of device
and number of threads, which decide the order of sums and the draws of dropout; on a GPU some of PyTorch's sums have a fixed
order only under `torch.use_deterministic_algorithms(True)`. On another device a run goes on as well, and `metrics.jsonl` tells
from which step.
"""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sparseffn.data import Corpus, TrainingStreams, Unit
from sparseffn.devices import device_name, find_device, generator_states, restore_generators
from sparseffn.errors import Interrupted, NonFiniteError, UserError, unknown_name
from sparseffn.evaluation import Evaluation, NonFiniteLossError, evaluate
from sparseffn.ffn.mixture import MixtureConfig
from sparseffn.models import ModelConfig, build_model, keyed_generator
from sparseffn.storage import file_digest, sole_writer, write_bytes
from sparseffn.training.checkpoint import KEPT, Checkpoint, list_checkpoints, load_checkpoint, save_checkpoint
from sparseffn.training.config import TrainConfig
from sparseffn.training.failures import is_out_of_memory, out_of_memory, stopped_by_device
from sparseffn.training.health import COLLAPSE_FROM, LossSpikes, collapse, where_not_finite
from sparseffn.training.interruption import Interruption
from sparseffn.training.restore import load_weights
from sparseffn.training.result import TrainResult
from sparseffn.training.run_folder import RunFolder
from sparseffn.training.snapshots import routes_to_experts, save_snapshot, snapshot
from sparseffn.training.stepper import StepNumbers, Stepper, read_steps

_log = logging.getLogger(__name__)

# Steps between readings of what they did, 10 on other devices: reading waits for the device, which would then be idle.
READ_EVERY = {"cpu": 1}

# Steps in a row that may be skipped: parameters do not change by them, so that after so many nothing else is to be expected.
MAX_SKIPPED = 10

NonFinite = Literal["stop", "skip"]
"""What becomes of a run whose loss or gradient is not finite in a step, which is not taken either way."""


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one step did, for a progress bar."""

    step: int
    """Steps done."""
    n_steps: int
    loss: float
    """Cross-entropy in nats a token, without the balancing loss."""
    balance_loss: float
    unit: Unit
    """What a token is, which sets the metric of the loss."""
    tokens_per_s: float
    seconds_left: float


OnStep = Callable[[StepReport], None]


def train(
    model_config: ModelConfig,
    config: TrainConfig,
    corpus: Corpus,
    out: Path | str,
    *,
    device: str | torch.device = "auto",
    non_finite: NonFinite = "stop",
    keep: int = KEPT,
    on_step: OnStep | None = None,
    on_metrics: Callable[[dict[str, Any]], None] | None = None,
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
        on_step: called after every step, on a GPU for several steps together.
        on_metrics: called with each record of a step or a validation that is written to `metrics.jsonl`.

    Returns:
        Final validation and test loss; a finished run returns its result immediately.

    Raises:
        UserError: sizes do not fit, there is no such device, the folder is of another config, or a checkpoint is damaged.
        NonFiniteLossError: a loss became non-finite; the message names tensors, tokens and the last checkpoint before it.
        Interrupted: a signal ended the run; it goes on when it is called again.
    """
    if non_finite not in ("stop", "skip"):
        raise unknown_name("`non_finite`", non_finite, ("stop", "skip"))
    if keep < 1:
        raise UserError(f"`keep` must be at least 1; got {keep}; fix: leave it out to keep the last {KEPT}")
    folder, device = RunFolder(out), find_device(device)
    if model_config.vocab_size != corpus.tokenizer.vocab_size:
        raise UserError(
            f"`vocab_size` must be the corpus's {corpus.tokenizer.vocab_size}; got {model_config.vocab_size}; "
            "fix: build the model's config from the corpus"
        )
    # A corpus that is too small for a window is refused before anything is written.
    streams = corpus.training_streams(batch=config.batch, context=config.context, seed=config.seed)
    identity = run_config(model_config, config, corpus)
    folder.check(identity)
    if folder.result_path.exists():
        return TrainResult.read(folder.result_path)
    with sole_writer(folder.path):
        fresh = folder.open(identity, device=str(device))
        for note in config.notes if fresh else ():
            _log.warning(note)
        folder.note_corpus(corpus)
        model = build_model(model_config)
        model.init_parameters(config.seed)
        stepper = Stepper(model.to(device), config, goes_on=non_finite == "skip")
        run = _Run(stepper, corpus, streams, folder, non_finite, keep, on_step, on_metrics)
        try:
            return run.run()
        except torch.AcceleratorError as error:
            if "device-side assert" not in str(error):
                raise
            raise stopped_by_device(run.step - len(run.unread) + 1, run.step + 1, run.last_good()) from error
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise out_of_memory(config, model_config, str(device), run.step, run.last_good()) from error


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
    non_finite: NonFinite
    keep: int
    on_step: OnStep | None
    on_metrics: Callable[[dict[str, Any]], None] | None
    step: int = 0
    seconds: float = 0.0
    unread: list[Tensor] = field(default_factory=list)
    """What the last steps did, still on the device."""
    started: float = 0.0
    """When the first of them began."""
    valid: tuple[int, float] | None = None
    """Step and loss of the last point of the validation curve."""
    skipped: int = 0
    """Steps in a row, up to now, that were left out."""

    def __post_init__(self) -> None:
        self.model, self.config = self.stepper.model, self.stepper.config

    def run(self) -> TrainResult:
        """Train to the last step, evaluate, write the result."""
        torch.manual_seed(self.config.seed)
        self._resume()
        self.spikes = LossSpikes(record["loss"] for record in self.folder.read_metrics() if "loss" in record)
        self.model.train()
        with Interruption() as interruption:
            while self.step < self.config.steps:
                self._take_step()
                leaves = interruption.number is not None
                validates, saves = self._is_due(self.config.eval_every), leaves or self._is_due(self.config.checkpoint_every)
                if validates or saves or self._is_due(READ_EVERY.get(self.stepper.device.type, 10)):
                    self._read_steps()
                if validates:
                    self._validate()
                if saves:
                    self.save()
                if interruption.number is not None and leaves:
                    raise self._interrupted(interruption.number)
            interruption.all_is_saved = True
            return self._finish()

    def _finish(self) -> TrainResult:
        """Evaluate, write the result."""
        n_skipped = self.folder.n_skipped()
        left_out = f"{n_skipped} step{'s were' if n_skipped > 1 else ' was'} left out: loss or gradient were not finite"
        result = TrainResult(
            steps=self.step,
            valid=self._evaluate_whole("valid"),
            test=self._evaluate_whole("test"),
            seconds=self.seconds,
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
        self.window = self.streams.window(window)
        self.unread.append(self.stepper.take(*self.window, lr=self.config.lr_at(self.step)))
        self.step += 1

    def _read_steps(self) -> None:
        """Wait for the steps since the last reading and report them; the first that was not taken ends the run."""
        if not self.unread:
            return
        read = read_steps(self.unread, self.config)
        step, seconds = self.step - len(read), (time.perf_counter() - self.started) / len(read)
        self.unread.clear()
        for numbers in read:
            step += 1
            self.seconds += seconds
            if numbers.finite or numbers.overflowed:
                self.skipped = 0
                self._report(step, numbers, seconds)
            else:
                self._not_taken(step, numbers)

    def _not_taken(self, step: int, numbers: StepNumbers) -> None:
        """A step that is not finite: end the run, or note it."""
        what = f"loss {numbers.loss} and gradient norm {numbers.grad_norm}"
        self.skipped += 1
        if self.non_finite == "skip" and self.skipped <= MAX_SKIPPED:
            self._record({"step": step, "skipped": what})
            return
        # No checkpoint is written before the steps are read. Of those before the last nothing is left to look at.
        where = self._where() if step == self.step else ""
        remedy = "lower lr or raise warmup in a new --out" + (
            "" if self.skipped > 1 else ", or leave such steps out, `--non-finite skip`"
        )
        raise NonFiniteLossError(
            f"loss and gradient must be finite; got {what} at step {step}, which was not taken{where and f' ({where})'}; "
            f"fix: {remedy}. Last good checkpoint: {self.last_good()}"
        )

    def _where(self) -> str:
        window = (self.step - 1) % self.streams.n_windows
        device = self.stepper.device
        inputs, targets = (tokens.to(device) for tokens in self.window)
        return where_not_finite(self.model, self.stepper.token_losses, inputs, targets, window)

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

    def _validate(self) -> None:
        """A point of the validation curve, and the routing at it."""
        self.valid = self.step, self._evaluate("valid", self.config.eval_tokens).nats_per_token
        self._record({"step": self.step, "valid": self.valid[1]})
        if routes_to_experts(self.model):
            selections = snapshot(self.model, self.corpus, self.config)
            save_snapshot(self.folder.path, self.step, selections)
            if self.step >= COLLAPSE_FROM and isinstance(self.model.config.ffn, MixtureConfig):
                self._warn(self.step, collapse(selections, self.model.config.ffn))

    def _warn(self, step: int, warning: str | None) -> None:
        if warning is not None:
            _log.warning("step %d: %s", step, warning)
            self._record({"step": step, "warning": warning})

    def _evaluate_whole(self, split: str) -> float:
        """The final loss on a split; the losses of its windows are kept for paired comparisons of runs."""
        evaluation = self._evaluate(split)
        losses = io.BytesIO()
        np.save(losses, evaluation.window_nats)
        write_bytes(self.folder.window_losses_path(split), losses.getvalue())
        return evaluation.nats_per_token

    def _evaluate(self, split: str, max_tokens: int | None = None) -> Evaluation:
        try:
            return evaluate(self.model, getattr(self.corpus, split), max_tokens=max_tokens, **self.config.evaluation)
        except NonFiniteError as error:
            raise NonFiniteLossError(
                f"{error}; {split} after step {self.step}. Last good checkpoint: {self.last_good()}"
            ) from None

    def _report(self, step: int, numbers: StepNumbers, seconds: float) -> None:
        record: dict[str, Any] = {"step": step, "loss": numbers.loss, "balance_loss": numbers.balance_loss}
        if numbers.finite:
            record["grad_norm"] = numbers.grad_norm
        record["lr"] = self.config.lr_at(step - 1)
        if self.config.precision == "float16":
            record["loss_scale"] = numbers.loss_scale
        self._record({**record, "time_s": round(self.seconds, 4)})
        self._warn(step, self.spikes.note(numbers.loss))
        if self.on_step is not None:
            report = StepReport(
                step=step,
                n_steps=self.config.steps,
                loss=numbers.loss,
                balance_loss=numbers.balance_loss,
                unit=self.corpus.unit,
                tokens_per_s=self.config.tokens_per_step / seconds,
                seconds_left=(self.config.steps - step) * self.seconds / step,
            )
            self.on_step(report)

    def _record(self, record: dict[str, Any]) -> None:
        self.folder.append_metrics(record)
        if self.on_metrics is not None:
            self.on_metrics(record)

    def save(self) -> None:
        """Write a checkpoint of everything that the next step depends on."""
        streams = {f"stream.{key}": value for key, value in self.streams.state().items()}
        # The CPU's goes by the name that it had when it was the only one.
        states = generator_states(self.stepper.device)
        generators = {"rng" if kind == "cpu" else f"rng.{kind}": state for kind, state in states.items()}
        checkpoint = Checkpoint(
            step=self.step,
            tensors={**self.stepper.tensors(), **streams, **generators},
            seconds=self.seconds,
            scaler=self.stepper.scaler.state_dict(),
            run=self.folder.digest(),
            tokenizer=file_digest(self.folder.tokenizer_path),
            valid=self.valid[1] if self.valid is not None and self.valid[0] == self.step else None,
        )
        save_checkpoint(self.folder.checkpoints, checkpoint, kept=self.keep)

    def _resume(self) -> None:
        """Take up the last checkpoint, or start where there is none."""
        found, device = list_checkpoints(self.folder.checkpoints), self.stepper.device
        if not found:
            self.folder.rewind_metrics(-1)
            self.folder.note_device(0, device_name(device))
            self._validate()
            return
        path, checkpoint = found[-1], load_checkpoint(found[-1], run=self.folder.digest())
        load_weights(self.model, path, checkpoint)
        generators = {"cpu": checkpoint.tensors.get("rng", torch.zeros(0)), **checkpoint.group("rng")}
        # A device that the run comes to later draws its own numbers, not those of the first steps again.
        anew = keyed_generator(self.config.seed, f"step {checkpoint.step}").initial_seed()
        try:
            self.stepper.restore(checkpoint)
            self.streams.restore(checkpoint.group("stream"))
            restore_generators(generators, device, seed=anew)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"`{path}` must hold the state of this run; got another one ({error}); "
                "fix: restore config.json and the checkpoint together"
            ) from None
        self.step, self.seconds = checkpoint.step, checkpoint.seconds
        self.folder.rewind_metrics(self.step)
        self.folder.note_device(self.step, device_name(device))
