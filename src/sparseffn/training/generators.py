"""PyTorch's generators of random numbers in the processes of a run: each draws its own, from a seed that is the run's.

The first process draws what a single one would. A checkpoint holds the states of all; a process that was not there before, or
is now on another device, draws numbers of its own and not those of the first steps again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparseffn.devices import generator_states, restore_generators
from sparseffn.distribution import World
from sparseffn.models import keyed_generator
from sparseffn.training.checkpoint import Checkpoint


def seed_generators(seed: int, world: World) -> None:
    """Begin a run."""
    torch.manual_seed(seed if world.leads else keyed_generator(seed, f"process {world.rank}").initial_seed())


def all_generators(device: torch.device, world: World) -> dict[str, Tensor]:
    """The states of every process's generators by name, for a checkpoint. All processes must call this."""
    tensors = {}
    for kind, state in generator_states(device).items():
        states = world.gather(state[None] if world.is_alone else state[None].to(device)).cpu()
        # The first process's go by the names that they had when it was the only one.
        tensors["rng" if kind == "cpu" else f"rng.{kind}"] = states[0].clone()
        tensors |= {f"process.{rank}.{kind}": states[rank].clone() for rank in range(1, world.size)}
    return tensors


def restore_own_generators(checkpoint: Checkpoint, device: torch.device, world: World, *, seed: int) -> None:
    """Put back this process's part of what `all_generators` returned.

    Raises:
        RuntimeError: a state is none.
    """
    name = f"step {checkpoint.step}" if world.leads else f"step {checkpoint.step}, process {world.rank}"
    anew = keyed_generator(seed, name).initial_seed()
    if world.leads:
        states = {"cpu": checkpoint.tensors.get("rng", torch.zeros(0)), **checkpoint.group("rng")}
    else:
        states = checkpoint.group(f"process.{world.rank}")
    if "cpu" in states:
        restore_generators(states, device, seed=anew)
    else:
        torch.manual_seed(anew)
