"""A model in the processes of a run: whole in each (DDP), whole but for the experts, or a shard in each (FSDP2).

Gradients are means over the processes either way: with equally many tokens in each, those of the whole batch's mean loss.
What routers compute over a batch is over that of all processes. Everything that leaves a run, as checkpoints do, is whole: no
file depends on how many processes made it.
"""

from __future__ import annotations

import contextlib
import warnings
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, cast, final, get_args

import torch
from torch import Tensor, nn

from sparseffn.distribution import World
from sparseffn.errors import UserError, unknown_name
from sparseffn.ffn import BatchGroup, RoutingStats, set_batch_group, shard_experts
from sparseffn.models import LanguageModel
from sparseffn.models.language_model import ModelOutput
from sparseffn.training.config import TrainConfig

Strategy = Literal["ddp", "ep", "fsdp"]
"""`ddp`: parameters and optimiser whole in every process; `ep`: but each process has its part of a mixture's experts, to which
the tokens go; `fsdp`: every tensor sharded, gathered layer by layer."""


class Replica(ABC):
    """This process's part of a model in training."""

    def __init__(self, model: LanguageModel, batch: BatchGroup | None = None) -> None:
        self.model, self.batch = model, batch
        self.run: nn.Module = model
        """What a training step calls."""
        self.is_whole = True
        """Whether this process has every tensor as a single one has it."""

    @abstractmethod
    def accumulating(self, last: bool) -> AbstractContextManager[object]:
        """Around a micro-batch: gradients are exchanged with the last one alone."""

    def clip(self, max_norm: float) -> Tensor:
        """Clip the gradient; returns its norm over the whole model."""
        return self.whole(nn.utils.clip_grad_norm_(self.model.parameters(), max_norm))

    def groups(self) -> list[list[nn.Parameter]]:
        """The parameters in the groups that an optimiser can take together."""
        return [list(self.model.parameters())]

    def whole(self, x: Tensor) -> Tensor:
        """A parameter or a tensor of the optimiser as a single process has it."""
        return x

    def place(self, x: Tensor, like: Tensor) -> Tensor:
        """A whole tensor where `like` is, and sharded as it."""
        return x.to(like.device)


@final
class Alone(Replica):
    """One process."""

    def accumulating(self, last: bool) -> AbstractContextManager[object]:
        return nullcontext()


@final
class Replicated(Replica):
    """A whole model in every process, whose gradients DDP averages while the backward pass goes on."""

    def __init__(self, model: LanguageModel, batch: BatchGroup) -> None:
        super().__init__(model, batch)
        devices = [model.embedding.weight.device] if model.embedding.weight.device.type == "cuda" else None
        self._ddp = nn.parallel.DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
        self.run = self._ddp

    def accumulating(self, last: bool) -> AbstractContextManager[object]:
        return nullcontext() if last else self._ddp.no_sync()


class _InParts(Replica):
    """A model some of whose tensors are DTensors, which go to the optimiser apart from the others."""

    def __init__(self, model: LanguageModel, batch: BatchGroup) -> None:
        super().__init__(model, batch)
        self.is_whole = False

    @abstractmethod
    def groups(self) -> list[list[nn.Parameter]]:
        """The whole parameters, and those in shards."""

    def clip(self, max_norm: float) -> Tensor:
        gradients = [[p.grad for p in group if p.grad is not None] for group in self.groups()]
        norm = torch.stack([self.whole(nn.utils.get_total_norm(group)) for group in gradients]).norm()
        for group in self.groups():
            nn.utils.clip_grads_with_norm_(group, max_norm, norm)
        return norm

    def whole(self, x: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        return x.full_tensor() if isinstance(x, DTensor) else x

    def place(self, x: Tensor, like: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor, distribute_tensor

        x = x.to(like.device)
        return distribute_tensor(x, like.device_mesh, like.placements) if isinstance(like, DTensor) else x


@final
class Spread(_InParts):
    """Experts spread over the processes, whose gradients are means over all tokens; DDP averages those of the rest."""

    def __init__(self, model: LanguageModel, batch: BatchGroup, world: World) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        super().__init__(model, batch)
        device = model.embedding.weight.device
        self._spread = set(shard_experts(model, init_device_mesh(device.type, (world.size,))))
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, self._spread)
        devices = [device] if device.type == "cuda" else None
        self._ddp = nn.parallel.DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
        self.run = self._ddp

    def accumulating(self, last: bool) -> AbstractContextManager[object]:
        return nullcontext() if last else self._ddp.no_sync()

    def groups(self) -> list[list[nn.Parameter]]:
        named = list(self.model.named_parameters())
        return [[p for name, p in named if (name in self._spread) == spread] for spread in (False, True)]


@final
class Sharded(_InParts):
    """A shard of every tensor in each process: FSDP2, a layer at a time and the rest as the root's."""

    def __init__(self, model: LanguageModel, batch: BatchGroup, world: World) -> None:
        from torch.distributed.fsdp import FSDPModule, fully_shard

        super().__init__(model, batch)
        # What a layer or the model returns must be seen as tensors: the hooks on them gather parameters for the backward pass.
        for kind in (ModelOutput, RoutingStats):
            _show_tensors(kind)
        # Nobody writes in place to the memory and the losses that are views of what the model returns.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        # A scalar has no dimension to be sharded along.
        self._scalars = [parameter for parameter in model.parameters() if parameter.ndim == 0]
        for module in (*model.layers, model):
            fully_shard(module, ignored_params=set(self._scalars))
        self._root, self._world = cast(FSDPModule, model), world

    def accumulating(self, last: bool) -> AbstractContextManager[object]:
        self._root.set_requires_gradient_sync(last)
        return nullcontext()

    def groups(self) -> list[list[nn.Parameter]]:
        sharded = [parameter for parameter in self.model.parameters() if parameter.ndim > 0]
        return [group for group in (self._scalars, sharded) if group]

    def clip(self, max_norm: float) -> Tensor:
        for scalar in self._scalars:
            if scalar.grad is not None:
                self._world.mean(scalar.grad)
        return super().clip(max_norm)


def _show_tensors(kind: type) -> None:
    """Have PyTorch see the fields of a dataclass; a second time says the same again."""
    with warnings.catch_warnings(), contextlib.suppress(ValueError):
        warnings.filterwarnings("ignore", message=".*already registered")
        torch.export.register_dataclass(kind)


def replicate(model: LanguageModel, config: TrainConfig, world: World, strategy: Strategy) -> Replica:
    """A model on its device, made ready for the processes that train it.

    Raises:
        UserError: the strategy is unknown, or the precision does not go with it.
    """
    if strategy not in get_args(Strategy):
        raise unknown_name("`strategy`", strategy, get_args(Strategy))
    if world.is_alone:
        return Alone(model)
    if strategy != "ddp" and config.precision == "float16":
        raise UserError(
            f"`precision` must be float32 or bfloat16 with strategy {strategy}; got float16, whose scaled gradients are looked "
            "at by shard; fix: --precision bfloat16, or --strategy ddp"
        )
    # Of a group of its own, as gradients are exchanged while the backward pass of routers communicates.
    batch = BatchGroup(world.second_group(), seed=config.seed, even=True)
    set_batch_group(model, batch)
    if strategy == "ddp":
        return Replicated(model, batch)
    return Spread(model, batch, world) if strategy == "ep" else Sharded(model, batch, world)
