"""The training loop: read top to bottom, it is all that happens to a model.

A run is a function of its config: parameters and dropout come from the seed, the position in the corpus from the step. It goes
on from its last checkpoint when it is called again, with bit-identical losses. Equal bits are promised for one kind of device
and number of threads, which decide the order of sums and the draws of dropout; on a GPU some of PyTorch's sums have a fixed
order only under `torch.use_deterministic_algorithms(True)`. On another device a run goes on as well, and `metrics.jsonl` tells
from which step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparseffn.data import Corpus, TrainingStreams, Unit
from sparseffn.devices import device_name, find_device, generator_states, restore_generators
from sparseffn.errors import NonFiniteError, UserError
from sparseffn.evaluation import Evaluation, NonFiniteLossError, evaluate
from sparseffn.models import TransformerXL, TransformerXLConfig, keyed_generator
from sparseffn.storage import Count, read, sole_writer, write_json
from sparseffn.training.checkpoint import Checkpoint, list_checkpoints, load_checkpoint, save_checkpoint
from sparseffn.training.config import TrainConfig
from sparseffn.training.restore import load_weights
from sparseffn.training.run_folder import RunFolder
from sparseffn.training.snapshots import routes_to_experts, save_snapshot, snapshot
from sparseffn.training.stepper import StepNumbers, Stepper, read_steps

_log = logging.getLogger(__name__)

# Steps between readings of what they did, 10 on other devices: reading waits for the device, which would then be idle.
READ_EVERY = {"cpu": 1}


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


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """Final numbers of a run; losses in nats a token."""

    steps: Count
    valid: float
    test: float
    seconds: float
    """Time spent in training steps."""
    notes: tuple[str, ...] = ()
    """What one must know of the settings to read the numbers; also logged once, when the run begins."""

    @classmethod
    def read(cls, path: Path) -> TrainResult:
        """The result that a finished run wrote.

        Raises:
            UserError: the file is damaged.
        """
        fix = "remove the file and run the same command again, which makes it again from the last checkpoint"
        return read(path, cls, fix=fix)


def train(
    model_config: TransformerXLConfig,
    config: TrainConfig,
    corpus: Corpus,
    out: Path | str,
    *,
    device: str | torch.device = "auto",
    on_step: OnStep | None = None,
    on_metrics: Callable[[dict[str, Any]], None] | None = None,
) -> TrainResult:
    """Train a model in a run folder, or go on where the folder's last checkpoint stands.

    Args:
        model_config: the model.
        config: hyperparameters.
        corpus: its vocabulary must be the model's.
        out: the run folder; made when it is not there.
        device: a name for `find_device`; no part of what identifies the run.
        on_step: called after every step, on a GPU for several steps together.
        on_metrics: called with each record of a step or a validation that is written to `metrics.jsonl`.

    Returns:
        Final validation and test loss; a finished run returns its result immediately.

    Raises:
        UserError: sizes do not fit, there is no such device, the folder is of another config, or a checkpoint is damaged.
        NonFiniteLossError: a loss became non-finite; the message names the last checkpoint before it.
    """
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
        model = TransformerXL(model_config)
        model.init_parameters(config.seed)
        run = _Run(Stepper(model.to(device), config), corpus, streams, folder, on_step, on_metrics)
        try:
            return run.run()
        except torch.AcceleratorError as error:
            if "device-side assert" not in str(error):
                raise
            raise run.stopped_by_device() from error


def run_config(model_config: TransformerXLConfig, config: TrainConfig, corpus: Corpus) -> dict[str, Any]:
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
    on_step: OnStep | None
    on_metrics: Callable[[dict[str, Any]], None] | None
    step: int = 0
    seconds: float = 0.0
    unread: list[Tensor] = field(default_factory=list)
    """What the last steps did, still on the device."""
    started: float = 0.0
    """When the first of them began."""

    def __post_init__(self) -> None:
        self.model, self.config = self.stepper.model, self.stepper.config

    def run(self) -> TrainResult:
        """Train to the last step, evaluate, write the result."""
        torch.manual_seed(self.config.seed)
        self._resume()
        self.model.train()
        while self.step < self.config.steps:
            self._take_step()
            validates, saves = self._is_due(self.config.eval_every), self._is_due(self.config.checkpoint_every)
            if validates or saves or self._is_due(READ_EVERY.get(self.stepper.device.type, 10)):
                self._read_steps()
            if validates:
                self._validate()
            if saves:
                self.save()
        result = TrainResult(
            steps=self.step,
            valid=self._evaluate_whole("valid"),
            test=self._evaluate_whole("test"),
            seconds=self.seconds,
            notes=self.config.notes,
        )
        write_json(self.folder.result_path, result)
        return result

    def _is_due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.steps

    def _take_step(self) -> None:
        if not self.unread:
            self.started = time.perf_counter()
        window = self.step % self.streams.n_windows
        if window == 0:
            self.stepper.forget()
        self.unread.append(self.stepper.take(*self.streams.window(window), lr=self.config.lr_at(self.step)))
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
            if not (numbers.finite or numbers.overflowed):
                raise self._not_finite(step, f"loss {numbers.loss} and gradient norm {numbers.grad_norm}")
            self.seconds += seconds
            self._report(step, numbers, seconds)

    def _not_finite(self, step: int, what: str) -> NonFiniteLossError:
        # The step was not taken, and no checkpoint is written before the steps are read.
        return NonFiniteLossError(
            f"loss and gradient must be finite; got {what} at step {step}, which was not taken; "
            f"fix: lower lr or raise warmup in a new --out. Last good checkpoint: {self._last_good()}"
        )

    def stopped_by_device(self) -> UserError:
        """An assertion failed on the device, which nothing in this process can use any more."""
        first = self.step - len(self.unread) + 1
        return UserError(
            f"the device must go on; got an assertion at step {first} to {self.step + 1}, most likely of a router whose scores "
            "became NaN or infinite; fix: lower lr or raise warmup in a new --out, in a new process. "
            f"Last good checkpoint: {self._last_good()}"
        )

    def _last_good(self) -> Path | str:
        found = list_checkpoints(self.folder.checkpoints)
        return found[-1] if found else "none, the run had not reached its first"

    def _validate(self) -> None:
        """A point of the validation curve, and the routing at it."""
        self._record({"step": self.step, "valid": self._evaluate("valid", self.config.eval_tokens).nats_per_token})
        if routes_to_experts(self.model):
            save_snapshot(self.folder.path, self.step, snapshot(self.model, self.corpus, self.config))

    def _evaluate_whole(self, split: str) -> float:
        """The final loss on a split; the losses of its windows are kept for paired comparisons of runs."""
        evaluation = self._evaluate(split)
        np.save(self.folder.window_losses_path(split), evaluation.window_nats)
        return evaluation.nats_per_token

    def _evaluate(self, split: str, max_tokens: int | None = None) -> Evaluation:
        try:
            return evaluate(self.model, getattr(self.corpus, split), max_tokens=max_tokens, **self.config.evaluation)
        except NonFiniteError as error:
            raise NonFiniteLossError(
                f"{error}; {split} after step {self.step}. Last good checkpoint: {self._last_good()}"
            ) from None

    def _report(self, step: int, numbers: StepNumbers, seconds: float) -> None:
        record: dict[str, Any] = {"step": step, "loss": numbers.loss, "balance_loss": numbers.balance_loss}
        if numbers.finite:
            record["grad_norm"] = numbers.grad_norm
        record["lr"] = self.config.lr_at(step - 1)
        if self.config.precision == "float16":
            record["loss_scale"] = numbers.loss_scale
        self._record({**record, "time_s": round(self.seconds, 4)})
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
        )
        save_checkpoint(self.folder.checkpoints, checkpoint)

    def _resume(self) -> None:
        """Take up the last checkpoint, or start where there is none."""
        found, device = list_checkpoints(self.folder.checkpoints), self.stepper.device
        if not found:
            self.folder.rewind_metrics(-1)
            self.folder.note_device(0, device_name(device))
            self._validate()
            return
        checkpoint = load_checkpoint(found[-1])
        load_weights(self.model, found[-1], checkpoint)
        self.stepper.restore(checkpoint)
        self.step, self.seconds = checkpoint.step, checkpoint.seconds
        self.streams.restore(checkpoint.group("stream"))
        self.folder.rewind_metrics(self.step)
        self.folder.note_device(self.step, device_name(device))
        generators = {"cpu": checkpoint.tensors["rng"], **checkpoint.group("rng")}
        # A device that the run comes to later draws its own numbers, not those of the first steps again.
        anew = keyed_generator(self.config.seed, f"step {self.step}").initial_seed()
        restore_generators(generators, device, seed=anew)
