"""What a training step on this CPU keeps and allocates, to hold the planner against."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from sparseffn.models import ModelConfig, build_model
from sparseffn.training import TrainConfig
from sparseffn.training.stepper import Stepper, training_losses


def stepper_after(n_steps: int, model: ModelConfig, config: TrainConfig) -> tuple[Stepper, tuple[Tensor, Tensor]]:
    """A stepper whose optimiser and memory have their full size, and a window."""
    built = build_model(model).train()
    built.init_parameters(0)
    stepper = Stepper(built, config)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.vocab_size, (config.batch, config.context + 1), generator=generator)
    window = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    for _ in range(n_steps):
        stepper.take(*window, lr=1e-4)
    return stepper, window


def measured_kept(model: ModelConfig, config: TrainConfig) -> int:
    """Bytes of the distinct storages that autograd keeps of a forward pass, without parameters."""
    stepper, (inputs, targets) = stepper_after(1, model, config)
    known, kept = {p.untyped_storage().data_ptr() for p in stepper.model.parameters()}, dict[int, Tensor]()

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = training_losses(stepper.model, inputs, targets, stepper.memories[0], config)
    del losses
    return _bytes(tensor for pointer, tensor in kept.items() if pointer not in known)


def measured_peak(model: ModelConfig, config: TrainConfig) -> int:
    """Bytes of parameters, moments and memory, and the most that a step allocates beside them at a time."""
    stepper, window = stepper_after(2, model, config)
    stepper.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    there = [*stepper.model.parameters(), *(t for memory in stepper.memories for t in memory or ())]
    there += [value for state in stepper.optimizer.state.values() for value in state.values()]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        stepper.take(*window, lr=1e-4)
    results: Any = profiler.profiler
    changes = sorted((e.start_ns(), e.nbytes()) for e in results.kineto_results.events() if e.name() == "[memory]")
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return _bytes(there) + peak


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
