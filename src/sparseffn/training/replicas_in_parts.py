"""Models some or all of whose tensors are in parts in the processes of a run: experts spread over them, and FSDP2."""

from __future__ import annotations

import contextlib
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar, cast, final

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from sparseffn.distribution import World
from sparseffn.ffn import BatchGroup, RoutingStats, replicate_rest, shard_experts, shard_rest
from sparseffn.models import LanguageModel
from sparseffn.models.language_model import ModelOutput
from sparseffn.training.replicas import Replica


class _InParts(Replica):
    """A model some of whose tensors are DTensors, which go to the optimiser apart from the others."""

    is_whole: ClassVar[bool] = False

    def clip(self, max_norm: float) -> Tensor:
        gradients = [[p.grad for p in group if p.grad is not None] for group in self.groups()]
        norm = torch.stack([self.whole(nn.utils.get_total_norm(group)) for group in gradients]).norm()
        for group in self.groups():
            nn.utils.clip_grads_with_norm_(group, max_norm, norm)
        return norm

    def groups(self) -> list[list[nn.Parameter]]:
        """The whole parameters, and those in shards."""
        parts: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
        for parameter in self.model.parameters():
            parts[isinstance(parameter.data, DTensor)].append(parameter)
        return [part for part in parts if part]

    def whole(self, x: Tensor) -> Tensor:
        return x.full_tensor() if isinstance(x, DTensor) else x

    def place(self, x: Tensor, like: Tensor) -> Tensor:
        x = x.to(like.device)
        return distribute_tensor(x, like.device_mesh, like.placements) if isinstance(like, DTensor) else x


@final
class Spread(_InParts):
    """Experts spread over the processes, whose gradients are means over all tokens; DDP averages those of the rest."""

    def __init__(self, model: LanguageModel, batch: BatchGroup, world: World) -> None:
        super().__init__(model, batch)
        shard_experts(model, init_device_mesh(model.embedding.weight.device.type, (world.size,)))
        self.run = self._ddp = replicate_rest(model, **self.ddp_options)

    def accumulating(self, last: bool) -> AbstractContextManager[object]:
        return nullcontext() if last else self._ddp.no_sync()


@final
class Sharded(_InParts):
    """A shard of every tensor in each process: FSDP2, a layer at a time and the rest as the root's.

    `spread`: but experts are spread over the processes, whole, and the tokens go to them.
    """

    def __init__(self, model: LanguageModel, batch: BatchGroup, world: World, *, spread: bool = False) -> None:
        super().__init__(model, batch)
        mesh = init_device_mesh(model.embedding.weight.device.type, (world.size,))
        if spread:
            shard_experts(model, mesh)
        # What a layer or the model returns must be seen as tensors: the hooks on them gather parameters for the backward pass.
        for kind in (ModelOutput, RoutingStats):
            _show_tensors(kind)
        # Nobody writes in place to the memory and the losses that are views of what the model returns.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        # A scalar has no dimension to be sharded along.
        self._scalars = [parameter for parameter in model.parameters() if parameter.ndim == 0]
        shard_rest(model, mesh, model.layers, ignored_params=self._scalars)
        self._root, self._world = cast(FSDPModule, model), world

    def accumulating(self, last: bool) -> AbstractContextManager[object]:
        self._root.set_requires_gradient_sync(last)
        return nullcontext()

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
