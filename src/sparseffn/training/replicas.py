"""A model in the processes of a run: whole in each (DDP); whole but for the experts, or a shard in each: `replicas_in_parts`.

Gradients are means over the processes either way: with equally many tokens in each, those of the whole batch's mean loss.
What routers compute over a batch is over that of all processes. Everything that leaves a run, as checkpoints do, is whole: no
file depends on how many processes made it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, final

from torch import Tensor, nn

from sparseffn.distribution import World
from sparseffn.ffn import BatchGroup, set_batch_group
from sparseffn.models import LanguageModel
from sparseffn.training.config import TrainConfig
from sparseffn.training.layout import Strategy


class Replica(ABC):
    """This process's part of a model in training."""

    is_whole: ClassVar[bool] = True
    """Whether this process has every tensor as a single one has it."""

    def __init__(self, model: LanguageModel, batch: BatchGroup | None = None) -> None:
        self.model, self.batch = model, batch
        self.run: nn.Module = model
        """What a training step calls."""

    @abstractmethod
    def accumulating(self, last: bool) -> AbstractContextManager[object]:
        """Around a micro-batch: gradients are exchanged with the last one alone."""

    def clip(self, max_norm: float) -> Tensor:
        """Clip the gradient; returns its norm over the whole model."""
        return nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)

    def groups(self) -> list[list[nn.Parameter]]:
        """The parameters in the groups that an optimiser can take together."""
        return [list(self.model.parameters())]

    def whole(self, x: Tensor) -> Tensor:
        """A parameter or a tensor of the optimiser as a single process has it."""
        return x

    def place(self, x: Tensor, like: Tensor) -> Tensor:
        """A whole tensor where `like` is, and sharded as it."""
        return x.to(like.device)

    @property
    def ddp_options(self) -> dict[str, Any]:
        """Arguments of `DistributedDataParallel` that depend on where the model is; gradients are views of what is sent."""
        device = self.model.embedding.weight.device
        return {"device_ids": [device] if device.type == "cuda" else None, "gradient_as_bucket_view": True}


@final
class Alone(Replica):
    """The model of a run in one process: nothing is exchanged."""

    def accumulating(self, last: bool) -> AbstractContextManager[object]:
        return nullcontext()


@final
class Replicated(Replica):
    """A whole model in every process, whose gradients DDP averages while the backward pass goes on."""

    def __init__(self, model: LanguageModel, batch: BatchGroup) -> None:
        super().__init__(model, batch)
        self.run = self._ddp = nn.parallel.DistributedDataParallel(model, **self.ddp_options)

    def accumulating(self, last: bool) -> AbstractContextManager[object]:
        return nullcontext() if last else self._ddp.no_sync()


def replicate(model: LanguageModel, config: TrainConfig, world: World, strategy: Strategy) -> Replica:
    """A model on its device, made ready for the processes that train it, as `Layout.check` lets pass."""
    if world.is_alone:
        return Alone(model)
    # Of a group of its own, as gradients are exchanged while the backward pass of routers communicates.
    batch = BatchGroup(world.second_group(), seed=config.seed, even=True)
    set_batch_group(model, batch)
    if strategy == "ddp":
        return Replicated(model, batch)
    # Takes a second to import, which no other run needs.
    from sparseffn.training.replicas_in_parts import Sharded, Spread

    if strategy == "ep":
        return Spread(model, batch, world)
    return Sharded(model, batch, world, spread=strategy == "ep-fsdp")
