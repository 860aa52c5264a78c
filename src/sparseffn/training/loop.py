"""The training loop: read top to bottom, it is all that happens to a model.

A run is a function of its config: parameters and dropout come from the seed, the position in the corpus from the step. It goes
on from its last checkpoint when it is called again, with bit-identical losses.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparseffn.data import Corpus, TrainingStreams
from sparseffn.devices import autocast
from sparseffn.errors import NonFiniteError, UserError
from sparseffn.evaluation import Evaluation, NonFiniteLossError, evaluate, token_losses
from sparseffn.ffn import FeedForward
from sparseffn.models import Memory, TransformerXL, TransformerXLConfig
from sparseffn.storage import Kind, read_fields, write_json, write_text
from sparseffn.training.checkpoint import (
    Checkpoint,
    list_checkpoints,
    load_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)
from sparseffn.training.config import TrainConfig
from sparseffn.training.restore import load_weights
from sparseffn.training.run_folder import RunFolder
from sparseffn.training.snapshots import routes_to_experts, save_snapshot, snapshot

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one step did, for a progress bar."""

    step: int
    """Steps done."""
    n_steps: int
    loss: float
    """Cross-entropy in nats a token, without the balancing loss."""
    balance_loss: float
    tokens_per_s: float
    seconds_left: float


OnStep = Callable[[StepReport], None]


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """Final numbers of a run; losses in nats a token."""

    steps: int
    valid: float
    test: float
    seconds: float
    """Time spent in training steps."""
    notes: tuple[str, ...] = ()
    """What one must know of the settings to read the numbers; also logged once, when the run begins."""

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict."""
        return {**dataclasses.asdict(self), "notes": list(self.notes)}

    @classmethod
    def read(cls, path: Path) -> TrainResult:
        """The result that a finished run wrote.

        Raises:
            UserError: the file is damaged.
        """
        fields = {"steps": Kind.COUNT, "valid": Kind.NUMBER, "test": Kind.NUMBER, "seconds": Kind.NUMBER, "notes": Kind.TEXTS}
        fix = "remove the file and run the same command again, which makes it anew from the last checkpoint"
        found = read_fields(path, fields, fix=fix)
        return cls(**{**{key: found[key] for key in fields}, "notes": tuple(found["notes"])})


def train(
    model_config: TransformerXLConfig,
    config: TrainConfig,
    corpus: Corpus,
    out: Path | str,
    *,
    on_step: OnStep | None = None,
    on_metrics: Callable[[dict[str, Any]], None] | None = None,
) -> TrainResult:
    """Train a model in a run folder, or go on where the folder's last checkpoint stands.

    Args:
        model_config: the model.
        config: hyperparameters.
        corpus: its vocabulary must be the model's.
        out: the run folder; made when it is not there.
        on_step: told after every step.
        on_metrics: told each record that is written to `metrics.jsonl`.

    Returns:
        Final validation and test loss; a finished run returns its result at once.

    Raises:
        UserError: sizes do not fit, the folder is of another config, or a checkpoint is damaged.
        NonFiniteLossError: a loss became non-finite; the message names the last checkpoint before it.
    """
    folder = RunFolder(out)
    if model_config.vocab_size != corpus.tokenizer.vocab_size:
        raise UserError(
            f"`vocab_size` must be the corpus's {corpus.tokenizer.vocab_size}; got {model_config.vocab_size}; "
            "fix: build the model's config from the corpus"
        )
    # A corpus that is too small for a window is refused before anything is written.
    streams = corpus.training_streams(batch=config.batch, context=config.context, seed=config.seed)
    fresh = folder.open(run_config(model_config, config, corpus))
    for note in config.notes if fresh else ():
        _log.warning(note)
    if folder.result_path.exists():
        return TrainResult.read(folder.result_path)
    if not (folder.path / "tokenizer.json").exists():
        write_text(folder.path / "tokenizer.json", corpus.tokenizer.to_json())
    return _Run(model_config, config, corpus, streams, folder, on_step, on_metrics).run()


def run_config(model_config: TransformerXLConfig, config: TrainConfig, corpus: Corpus) -> dict[str, Any]:
    """What identifies a run: everything its losses depend on but the environment."""
    return {
        "model": model_config.to_json(),
        "train": config.to_json(),
        "corpus": {"name": corpus.name, "tokenizer": corpus.tokenizer.name, "digest": corpus.digest},
    }


class _Run:
    """State of a run between steps."""

    def __init__(
        self,
        model_config: TransformerXLConfig,
        config: TrainConfig,
        corpus: Corpus,
        streams: TrainingStreams,
        folder: RunFolder,
        on_step: OnStep | None,
        on_metrics: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        self.config, self.corpus, self.streams, self.folder = config, corpus, streams, folder
        self.on_step, self.on_metrics = on_step, on_metrics
        self.model = TransformerXL(model_config)
        self.model.init_parameters(config.seed)
        self.optimizer = make_optimizer(self.model, config)
        self.names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        self.step, self.seconds = 0, 0.0
        # One memory for each micro-batch, whose streams are its own.
        self.memories: list[Memory | None] = [None] * config.accumulation

    def run(self) -> TrainResult:
        """Train to the last step, evaluate, write the result."""
        torch.manual_seed(self.config.seed)
        self._resume()
        self.model.train()
        while self.step < self.config.steps:
            start = time.perf_counter()
            record = self._train_step()
            self.seconds += time.perf_counter() - start
            self._report(record, time.perf_counter() - start)
            if self.step % self.config.eval_every == 0 or self.step == self.config.steps:
                self._validate()
            if self.step % self.config.checkpoint_every == 0 or self.step == self.config.steps:
                self.save()
        result = TrainResult(
            steps=self.step,
            valid=self._evaluate_whole("valid"),
            test=self._evaluate_whole("test"),
            seconds=self.seconds,
            notes=self.config.notes,
        )
        write_json(self.folder.result_path, result.to_json())
        return result

    def _train_step(self) -> dict[str, Any]:
        """One optimiser step."""
        config = self.config
        window = self.step % self.streams.n_windows
        if window == 0:
            self.memories = [None] * config.accumulation
        inputs, targets = self.streams.window(window)
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr_at(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        losses, balances = [], []
        micro_batches = zip(inputs.chunk(config.accumulation), targets.chunk(config.accumulation), strict=True)
        for i, (tokens, wanted) in enumerate(micro_batches):
            try:
                loss, balance, self.memories[i] = training_loss(self.model, tokens, wanted, self.memories[i], config)
            except NonFiniteError as error:
                raise self._not_finite(f"an operation that says: {error}") from None
            ((loss + balance) / config.accumulation).backward()
            losses.append(float(loss.detach()))
            balances.append(float(balance.detach()))
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip))
        mean_loss = sum(losses) / len(losses)
        self._check_finite(mean_loss, norm)
        self.optimizer.step()
        self.step += 1
        return {
            "step": self.step,
            "loss": mean_loss,
            "balance_loss": sum(balances) / len(balances),
            "grad_norm": norm,
            "lr": self.optimizer.param_groups[0]["lr"],
        }

    def _check_finite(self, loss: float, norm: float) -> None:
        value = torch.tensor([loss, norm])
        if not bool(value.isfinite().all()):
            raise self._not_finite(f"loss {loss} and gradient norm {norm}")

    def _not_finite(self, what: str) -> NonFiniteLossError:
        # The step was not taken, so parameters and optimiser are those of the last good step; the memory is not.
        return NonFiniteLossError(
            f"loss and gradient must be finite; got {what} at step {self.step + 1}, which was not taken; "
            f"fix: lower lr or raise warmup in a new --out. Last good checkpoint: {self._last_good()}"
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
        config = self.config
        try:
            return evaluate(
                self.model,
                getattr(self.corpus, split),
                batch=config.eval_batch,
                context=config.context,
                memory=config.eval_memory,
                precision=config.precision,
                max_tokens=max_tokens,
            )
        except NonFiniteError as error:
            raise NonFiniteLossError(
                f"{error}; {split} after step {self.step}. Last good checkpoint: {self._last_good()}"
            ) from None

    def _report(self, record: dict[str, Any], seconds: float) -> None:
        self._record({**record, "time_s": round(self.seconds, 4)})
        if self.on_step is not None:
            left = (self.config.steps - self.step) * self.seconds / max(self.step, 1)
            report = StepReport(
                step=self.step,
                n_steps=self.config.steps,
                loss=record["loss"],
                balance_loss=record["balance_loss"],
                tokens_per_s=self.config.tokens_per_step / seconds,
                seconds_left=left,
            )
            self.on_step(report)

    def _record(self, record: dict[str, Any]) -> None:
        self.folder.append_metrics(record)
        if self.on_metrics is not None:
            self.on_metrics(record)

    def save(self) -> None:
        """Write a checkpoint of everything that the next step depends on."""
        tensors: dict[str, Tensor] = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= optimizer_tensors(self.optimizer, self.names)
        for i, memory in enumerate(self.memories):
            tensors |= {f"memory.{i}.{layer}": states for layer, states in enumerate(memory or ())}
        tensors |= {f"stream.{key}": value for key, value in self.streams.state().items()}
        tensors["rng"] = torch.get_rng_state()
        extra = {"seconds": self.seconds}
        save_checkpoint(self.folder.checkpoints, Checkpoint(step=self.step, tensors=tensors, extra=extra))

    def _resume(self) -> None:
        """Take up the last checkpoint, or start where there is none."""
        found = list_checkpoints(self.folder.checkpoints)
        if not found:
            self.folder.rewind_metrics(-1)
            self._validate()
            return
        checkpoint = load_checkpoint(found[-1])
        load_weights(self.model, found[-1], checkpoint)
        restore_optimizer(self.optimizer, checkpoint.group("optimizer"), self.names)
        self.step, self.seconds = checkpoint.step, float(checkpoint.extra["seconds"])
        states = checkpoint.group("memory")
        for i in range(len(self.memories)):
            layers = [states[f"{i}.{layer}"] for layer in range(len(self.model.layers)) if f"{i}.{layer}" in states]
            self.memories[i] = tuple(layers) or None
        self.streams.restore(checkpoint.group("stream"))
        self.folder.rewind_metrics(self.step)
        torch.set_rng_state(checkpoint.tensors["rng"])


def training_loss(
    model: TransformerXL, tokens: Tensor, targets: Tensor, memory: Memory | None, config: TrainConfig
) -> tuple[Tensor, Tensor, Memory]:
    """Cross-entropy and balancing loss of a micro-batch, apart, and the memory for the next.

    Raises:
        UserError: a method has a balancing weight but its loss reaches no parameter.
    """
    with autocast(config.precision, tokens.device):
        output = model(tokens, memory, memory_length=config.memory, return_stats=True)
        loss = token_losses(output.logits, targets).mean()
    assert output.stats is not None, "statistics were asked for"
    balance = torch.stack([stats.balance_loss.float() for stats in output.stats]).sum()
    check_balance(model, balance)
    return loss, balance, output.memory


def check_balance(model: torch.nn.Module, balance: Tensor) -> None:
    """Complain when a layer has a balancing weight and the total that is minimised does not depend on it."""
    wanted = any(
        weight > 0
        for layer in model.modules()
        if isinstance(layer, FeedForward)
        for weight in layer.config.balancing().values()
    )
    if wanted and not balance.requires_grad:
        raise UserError(
            "the balancing loss must depend on the parameters; got a constant although a method sets a balancing weight; "
            "fix: return it from `compute` as `Routed(balance=...)`"
        )


def make_optimizer(model: torch.nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Adam (betas 0.9 and 0.999) or AdamW; the fused implementation, measured about 3 times as fast on a CPU."""
    make = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return make(model.parameters(), lr=config.lr, betas=(0.9, 0.999), weight_decay=config.weight_decay, fused=True)
