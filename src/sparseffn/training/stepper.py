"""One training step on any device: losses, gradients, and an update that is left out on the device where they are not finite.

Nothing here waits for the device. What a step did stays there as four numbers until somebody reads them, so that the host runs
ahead; a step that must not be taken is therefore skipped by the optimiser itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from sparseffn.devices import autocast, to_device
from sparseffn.distribution import World
from sparseffn.errors import UserError
from sparseffn.evaluation import token_losses
from sparseffn.ffn import FeedForward
from sparseffn.models import LanguageModel, Memory
from sparseffn.training.checkpoint import Checkpoint
from sparseffn.training.config import TrainConfig
from sparseffn.training.replicas import Alone, Replica


@dataclass(frozen=True, slots=True)
class StepNumbers:
    """What a step did, as it is read from the device."""

    loss: float
    """Cross-entropy in nats a token, mean over the micro-batches."""
    balance_loss: float
    grad_norm: float
    """Before clipping, with a scaled loss divided by the scale."""
    loss_scale: float
    """1 but in float16."""

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    @property
    def overflowed(self) -> bool:
        """Whether only the scaled gradients were too large for float16: the step is left out and the scale lowered."""
        return math.isfinite(self.loss) and not math.isfinite(self.grad_norm) and self.loss_scale > 1


@final
class Stepper:
    """Takes training steps: the model, its optimiser, the scale of its loss in float16, and the memory of each micro-batch."""

    def __init__(
        self,
        model: LanguageModel,
        config: TrainConfig,
        *,
        goes_on: bool = False,
        world: World | None = None,
        replica: Replica | None = None,
    ) -> None:
        """Make the optimiser.

        Args:
            model: on its device.
            config: the run's.
            goes_on: whether steps may follow one that is not finite, as they always do where the host runs ahead.
            world: the processes that take the steps, each with its own streams of every micro-batch; None: this one alone.
            replica: the model among them.
        """
        self.model, self.config = model, config
        self.world, self.replica = world or World(), replica or Alone(model)
        self.device = model.embedding.weight.device
        self.optimizer = make_optimizer(model, config, groups=self.replica.groups())
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "float16")
        # Streams belong to a micro-batch, and so does their memory.
        self.memories: list[Memory | None] = [None] * config.accumulation
        self._parameters = dict(model.named_parameters())
        self.own_streams = self._own_streams_of_a_batch()
        """Of a window's streams those that this process learns from, micro-batch by micro-batch."""
        self._clears_memory = goes_on or self.device.type != "cpu"
        self.token_losses = torch.zeros(0)
        """`[batch, context]` of the last step, on the model's device."""

    def forget(self) -> None:
        """Start with an empty memory, as at the beginning of the corpus."""
        self.memories = [None] * self.config.accumulation

    def take(self, inputs: Tensor, targets: Tensor, lr: float) -> Tensor:
        """One optimiser step on this process's int64 tokens `[batch / processes, context]`, left out on the device where the
        loss or a gradient is not finite in any process; returns float64 `[4]` on the model's device, for `read_steps`.

        Raises:
            UserError: a method has a balancing weight but its loss reaches no parameter.
        """
        config, n = self.config, self.config.accumulation
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        token_losses = []
        micro_batches = zip(*(to_device(x, self.device).chunk(n) for x in (inputs, targets)), strict=True)
        for i, (tokens, wanted) in enumerate(micro_batches):
            with self.replica.accumulating(last=i == n - 1):
                losses, balance, self.memories[i] = training_losses(self.replica.run, tokens, wanted, self.memories[i], config)
                loss = losses.mean()
                token_losses.append(losses.detach())
                self.scaler.scale((loss + balance) / n).backward()
            total += torch.stack((loss.detach(), balance.detach()))
        scale = self.scaler.scale(torch.ones((), device=self.device))
        self.scaler.unscale_(self.optimizer)
        norm = self.replica.clip(config.clip)
        total = self.world.mean(total)
        self._update(total[0], norm)
        if self._clears_memory:
            self._clear_memory_of(total[0])
        self.token_losses = torch.cat(token_losses)
        return torch.cat((total, torch.stack((norm, scale))))

    def tensors(self) -> dict[str, Tensor]:
        """Model, optimiser and memories by name, for a checkpoint: whole, however many processes there are. All of them must
        call this.
        """
        tensors: dict[str, Tensor] = {}

        def put(name: str, value: Tensor) -> None:
            """Made whole in all processes, kept by the one that writes it, where it is there once more outside the device."""
            made = self.replica.whole(value)
            if self.world.leads:
                tensors[name] = made if self.replica.is_whole else made.cpu()

        for name, value in self.model.state_dict().items():
            put(f"model.{name}", value)
        for name, parameter in self._parameters.items():
            state = self.optimizer.state.get(parameter, {})
            for field, value in state.items():
                put(f"optimizer.{name}::{field}", value)
        for i, memory in enumerate(self.memories):
            tensors |= {f"memory.{i}.{layer}": self.world.gather(states) for layer, states in enumerate(memory or ())}
        return tensors

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take up parameters, optimiser, scale and memories of a checkpoint, tensor by tensor and without casts, on the model's
        device.

        Raises:
            KeyError, ValueError: a tensor is not this model's.
        """
        place = self.replica.place
        for key, value in checkpoint.group("optimizer").items():
            name, field = key.rsplit("::", 1)
            if value.ndim and value.shape != self._parameters[name].shape:
                raise ValueError(f"`{key}` of shape {list(value.shape)}")
            parameter = self._parameters[name]
            self.optimizer.state[parameter][field] = place(value, parameter) if value.ndim else value.to(self.device)
        self.scaler.load_state_dict(dict(checkpoint.scaler))
        memories = checkpoint.group("memory")
        for i in range(self.config.accumulation):
            keys = [f"{i}.{layer}" for layer in range(len(self.model.layers))]
            found = (memories[key] for key in keys if key in memories)
            own = (states[self.world.share(len(states), "streams of a memory")] for states in found)
            self.memories[i] = tuple(states.to(self.device) for states in own) or None

    def _own_streams_of_a_batch(self) -> list[int]:
        size = self.config.batch // self.config.accumulation
        own = range(size)[self.world.share(size, "streams of a micro-batch, `batch / accumulation`,")]
        return [i * size + stream for i in range(self.config.accumulation) for stream in own]

    def _update(self, loss: Tensor, norm: Tensor) -> None:
        if self.scaler.is_enabled():
            # A loss that is not finite has no finite gradient: the scaler leaves that step out as well.
            self.scaler.step(self.optimizer)
            self.scaler.update()
            return
        # The name under which PyTorch's fused optimisers look for it, as gradient scalers set it: at 1 they change nothing.
        self.optimizer.found_inf = (~(loss.isfinite() & norm.isfinite())).float()  # pyright: ignore[reportAttributeAccessIssue]
        self.optimizer.step()

    def _clear_memory_of(self, loss: Tensor) -> None:
        """Forget a step that is not finite: on a GPU the next ones are under way before it is read, and what is not finite in a
        router there is an assertion of the device, which ends every work on it.
        """
        lost = ~loss.isfinite()
        self.memories = [
            None if memory is None else tuple(states.masked_fill(lost, 0.0) for states in memory) for memory in self.memories
        ]


def read_steps(steps: list[Tensor], config: TrainConfig) -> list[StepNumbers]:
    """What `Stepper.take` returned, read in one piece; waits for the device."""
    n = config.accumulation
    return [StepNumbers(loss / n, balance / n, norm, scale) for loss, balance, norm, scale in torch.stack(steps).tolist()]


def training_losses(
    model: torch.nn.Module, tokens: Tensor, targets: Tensor, memory: Memory | None, config: TrainConfig
) -> tuple[Tensor, Tensor, Memory]:
    """Cross-entropy of each token and balancing loss of a micro-batch, and the memory for the next.

    `model` is a `LanguageModel`, or what runs one in several processes.

    Raises:
        UserError: a method has a balancing weight but its loss reaches no parameter.
    """
    with autocast(config.precision, tokens.device):
        output = model(tokens, memory, memory_length=config.memory, return_stats=True)
        losses = token_losses(output.logits, targets)
    assert output.stats is not None, "statistics were asked for"
    balance = torch.stack([stats.balance_loss.float() for stats in output.stats]).sum()
    check_balance(model, balance)
    return losses, balance, output.memory


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


def make_optimizer(
    model: torch.nn.Module, config: TrainConfig, *, groups: Sequence[Sequence[torch.nn.Parameter]] = ()
) -> torch.optim.Optimizer:
    """Adam (betas 0.9 and 0.999) or AdamW of a model's parameters, or of groups of them.

    Fused: about 3 times as fast on a CPU (measured), and the one kind that leaves a step out without asking the host.
    """
    make = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    parameters = [{"params": list(group)} for group in groups] or model.parameters()
    return make(parameters, lr=config.lr, betas=(0.9, 0.999), weight_decay=config.weight_decay, fused=True)
