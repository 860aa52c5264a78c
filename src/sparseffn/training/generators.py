"""PyTorch's generators of random numbers in the processes of a run.

Each draws its own numbers for dropout, from a seed that is the run's; those of routers are drawn for the whole batch, as by a
single process. A checkpoint holds the states of all. A process that was not there before, or is now on another device, draws
numbers of its own and not those of the first steps again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparseffn.devices import generator_states, restore_generators
from sparseffn.distribution import World
from sparseffn.ffn import BatchGroup
from sparseffn.models import keyed_generator
from sparseffn.training.checkpoint import Checkpoint


def seed_generators(seed: int, world: World) -> None:
    """Begin a run."""
    torch.manual_seed(seed if world.leads else keyed_generator(seed, f"process {world.rank}").initial_seed())


def all_generators(device: torch.device, world: World, batch: BatchGroup | None) -> dict[str, Tensor]:
    """The states of every process's generators by name, for a checkpoint. All processes must call this."""
    tensors = {}
    for kind, state in generator_states(device).items():
        states = world.gather(state[None] if world.is_alone else state[None].to(device)).cpu()
        # The first process's go by the names that they had when it was the only one.
        tensors["rng" if kind == "cpu" else f"rng.{kind}"] = states[0].clone()
        tensors |= {f"process.{rank}.{kind}": states[rank].clone() for rank in range(1, world.size)}
    if batch is not None:
        # Unused, one stands where it began.
        begun = {device.type: torch.Generator(device).manual_seed(batch.first_seed).get_state()}
        tensors |= {f"batch.{kind}": state for kind, state in {**begun, **batch.generator_states()}.items()}
    return tensors


def restore_own_generators(
    checkpoint: Checkpoint, device: torch.device, world: World, batch: BatchGroup | None, *, seed: int
) -> None:
    """Put back this process's part of what `all_generators` returned.

    Of a run that goes on in one process, or in several for the first time, routers draw what they would have drawn.

    Raises:
        RuntimeError: a state is none.
    """
    alone = {"cpu": checkpoint.tensors.get("rng", torch.zeros(0)), **checkpoint.group("rng")}
    of_batch = checkpoint.group("batch")
    anew = keyed_generator(seed, f"step {checkpoint.step}" + ("" if world.leads else f", process {world.rank}")).initial_seed()
    if batch is None:
        restore_generators(alone | of_batch, device, seed=anew)
        return
    batch.seed(keyed_generator(seed, f"step {checkpoint.step}, batch").initial_seed())
    batch.restore(of_batch or alone)
    own = checkpoint.group(f"process.{world.rank}") if not world.leads else alone if of_batch else {}
    if own:
        restore_generators(own, device, seed=anew)
    else:
        torch.manual_seed(anew)
