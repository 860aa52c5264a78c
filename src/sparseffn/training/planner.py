"""What a training run asks of each device before it is started: memory, and bytes of communication.

The model, for n devices (`gpus`), P parameters, T tokens of a micro-batch on a device:

Memory of a device. Parameters, gradients and Adam's two moments are float32, 4 P bytes each; under FSDP2 each device holds a
share 1/n of them, and in addition, gathered, the embedding with the output projection, three times the largest layer (the one
that computes, the next one, and the buffer that it arrives in) and twice that layer's gradient (before it is scattered, and the
copy that is sent). What the forward pass keeps is `step_costs.kept_bytes`; Transformer-XL's memory is what `remember` leaves,
4 d_model (M + L) bytes a stream and layer. The peak is the largest sum that the backward pass meets on its way from the
loss to the first layer, while what was kept goes and gradients come.

Communication of a device, in bytes that it sends in a step:
    DDP     2 (n - 1) / n x 4 P: a ring's reduce-scatter and all-gather (Patarasuk 2009), once a step.
    FSDP2   (n - 1) / n x 4 P for each all-gather: two of each layer a micro-batch, one of the rest, which stays gathered;
            and for the reduce-scatter, once a step (Rajbhandari 2020, arXiv 1910.02054).
    routers 2 (n - 1) / n x the batch-wide sums: the routing statistics, 2 E + 2 numbers of 8 bytes a layer and micro-batch, and
            for Switch's loss and CV^2 E floats. The entropy's log-sum-exps, E + 1 floats, are gathered from each device, and
            their gradients summed: 3 (n - 1) x 4 (E + 1). Batch-wide selection (BASE, S-BASE) gathers all logits of a
            micro-batch and which count: (n - 1) x T (4 E + 1).
    experts over n_e devices: 4 all-to-alls, of T K d_model numbers each, (n_e - 1) / n_e of them to others: tokens there, in
            float32, and back, and their gradients (Lepikhin 2020, arXiv 2006.16668); E counts. Loads are taken to be even.

Allocators' fragments, the library's own memory (about 0.5 GB a GPU) and NCCL's buffers are not in it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from sparseffn.models import ModelConfig
from sparseffn.training.config import TrainConfig
from sparseffn.training.layout import Layout
from sparseffn.training.planned_memory import MemoryPlan, memory_plan
from sparseffn.training.planned_sends import CommunicationPlan, communication_plan
from sparseffn.training.step_costs import step_flops

# More streams than anybody trains on one device.
_MOST_STREAMS = 2**20


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one step of a run asks of each device."""

    params: int
    """Of the whole model."""
    streams_per_device: int
    """Of one micro-batch."""
    tokens_per_step: int
    flops_per_step: float
    flops_per_device: float
    memory: MemoryPlan
    communication: CommunicationPlan


def plan(model: ModelConfig, train: TrainConfig, layout: Layout | None = None) -> Plan:
    """What a step asks of each device.

    Raises:
        UserError: streams or experts cannot be spread evenly over the devices, or the run would be refused.
    """
    layout = layout or Layout()
    layout.check(model, train)
    batch = layout.micro_batch(train)
    flops = step_flops(model, train)
    return Plan(
        params=model.num_params(),
        streams_per_device=batch.n_streams,
        tokens_per_step=train.tokens_per_step,
        flops_per_step=flops,
        flops_per_device=flops / layout.gpus,
        memory=memory_plan(model, batch, layout, accumulation=train.accumulation),
        communication=communication_plan(model, batch, layout, train.accumulation),
    )


def largest_batch(model: ModelConfig, train: TrainConfig, layout: Layout, memory: float) -> int:
    """The largest batch, over all devices, whose peak is within `memory` bytes a device; 0 where no stream is."""
    batch = layout.micro_batch(dataclasses.replace(train, batch=layout.gpus * train.accumulation))

    def fits(n: int) -> bool:
        one = dataclasses.replace(batch, n_streams=n)
        return memory_plan(model, one, layout, accumulation=train.accumulation).peak <= memory

    low, high = 0, 1
    while high <= _MOST_STREAMS and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * layout.gpus * train.accumulation


def in_bytes(size: float) -> str:
    """`812 B`, `3.25 KiB`, `1.20 GiB`."""
    for unit, step in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= step:
            return f"{size / step:,.2f} {unit}"
    return f"{size:,.0f} B"
