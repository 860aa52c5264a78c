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
from typing import get_args

from sparseffn.errors import UserError, unknown_name
from sparseffn.ffn.mixture import MixtureConfig
from sparseffn.models import ModelConfig
from sparseffn.training.config import TrainConfig
from sparseffn.training.replicas import Strategy
from sparseffn.training.step_costs import (
    FLOAT,
    INDEX,
    KeptBytes,
    MicroBatch,
    attention_work,
    kept_bytes,
    step_flops,
)

# Gathered at a time under FSDP: the layer that computes, the next one, and the buffer in which that one arrives.
_GATHERED_LAYERS = 3
# A layer's gradient, and the copy of it that is scattered.
_WHOLE_GRADIENTS = 2
# More than anybody has, and more streams than anybody trains on one device.
_MOST_GPUS, _MOST_STREAMS = 2**20, 2**20


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Devices, and what is spread over them."""

    gpus: int = 1
    strategy: Strategy = "ddp"
    """`ddp`: parameters and optimiser whole on every device; `fsdp`: sharded over them."""
    expert_parallel: int = 1
    """Devices that the experts of a layer are spread over; each such group holds all of them."""
    device_type: str = "cuda"

    def __post_init__(self) -> None:
        if self.strategy not in get_args(Strategy):
            raise unknown_name("`--strategy`", self.strategy, get_args(Strategy))
        if not 1 <= self.gpus <= _MOST_GPUS:
            raise UserError(f"`--gpus` must be 1 to {_MOST_GPUS}; got {self.gpus}; fix: --gpus 1 is one device")
        if self.expert_parallel < 1 or self.gpus % self.expert_parallel:
            raise UserError(
                f"`--expert-parallel` must divide --gpus {self.gpus}; got {self.expert_parallel}; "
                f"fix: one of {_some_divisors(self.gpus)}"
            )

    def micro_batch(self, train: TrainConfig) -> MicroBatch:
        """What one device computes at a time.

        Raises:
            UserError: the streams do not divide.
        """
        parts = self.gpus * train.accumulation
        if train.batch % parts:
            down = train.batch - train.batch % parts
            fits = f"{down} or {down + parts}" if down else str(parts)
            raise UserError(
                f"`--batch` must be a multiple of gpus x accumulation = {self.gpus} x {train.accumulation}; got {train.batch}; "
                f"fix: --batch {fits}"
            )
        return MicroBatch(
            n_streams=train.batch // parts,
            context=train.context,
            memory=train.memory,
            precision=train.precision,
            device_type=self.device_type,
        )


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes of one device."""

    parameters: int
    gradients: int
    moments: int
    """Adam's two."""
    remembered: int
    """Transformer-XL's memory of all micro-batches, and the one that a window writes."""
    attention: int
    """Kept for the backward pass by all attention layers, with norms, residuals and dropout."""
    feedforward: int
    """The same of all feedforward blocks."""
    output: int
    """The same of embedding and output, and the two gradients of the logits."""
    casts: int
    """Copies of parameters in the precision of autocast."""
    buffers: int
    """What the strategy needs beside: FSDP holds parameters and gradients whole at a time, DDP gradients of micro-batches."""
    work: int
    """Room that the backward pass of one layer works in."""
    peak: int
    """The largest sum of what is there at a time, as gradients come while activations go."""


@dataclass(frozen=True, kw_only=True)
class CommunicationPlan:
    """Bytes that one device sends in a step."""

    gradients: int
    """All-reduced (DDP) or scattered (FSDP)."""
    parameters: int
    """Gathered by FSDP."""
    routers: int
    """Batch-wide sums, statistics and logits."""
    experts: int
    """Tokens to and from experts elsewhere."""

    @property
    def total(self) -> int:
        return self.gradients + self.parameters + self.routers + self.experts


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
    batch = layout.micro_batch(train)
    _check_experts(model, layout)
    if layout.gpus > 1 and layout.strategy == "fsdp" and train.precision == "float16":
        raise UserError("`--precision` must be float32 or bfloat16 with fsdp; got float16; fix: --precision bfloat16")
    flops = step_flops(model, train)
    return Plan(
        params=model.num_params(),
        streams_per_device=batch.n_streams,
        tokens_per_step=train.tokens_per_step,
        flops_per_step=flops,
        flops_per_device=flops / layout.gpus,
        memory=memory_plan(model, batch, layout, accumulation=train.accumulation),
        communication=_communication(model, batch, layout, train.accumulation),
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


def memory_plan(model: ModelConfig, batch: MicroBatch, layout: Layout, *, accumulation: int = 1) -> MemoryPlan:
    """Memory of a device with a micro-batch."""
    held = _Held.of(model, layout)
    kept = kept_bytes(model, batch)
    dispatched = _dispatched_bytes(model, batch, layout)
    kept = dataclasses.replace(kept, feedforward=kept.feedforward + dispatched)
    logits = batch.n_tokens * model.vocab_size * FLOAT
    works = attention_work(model, batch), model.ffn.work_bytes(batch.n_tokens, batch.itemsize)
    remembered = _remembered(model, batch, accumulation)
    # DDP's gradients are views of its buckets, which stay; those of micro-batches that it does not exchange lie beside them.
    buckets = layout.gpus > 1 and layout.strategy == "ddp"
    stay = accumulation > 1 or buckets
    buffers = held.gathered(accumulation) + (held.total if buckets and accumulation > 1 else 0)
    walk = _backward_peak(kept, logits, works, held, grads_are_there=stay)
    return MemoryPlan(
        parameters=held.total,
        gradients=held.total,
        moments=2 * held.total,
        remembered=remembered,
        attention=model.n_layers * kept.attention,
        feedforward=model.n_layers * kept.feedforward,
        output=kept.output + 2 * logits,
        casts=kept.casts,
        buffers=buffers,
        work=max(works),
        peak=3 * held.total + remembered + buffers + walk,
    )


@dataclass(frozen=True, kw_only=True)
class _Held:
    """Bytes of parameters on one device, as they lie there, and whole where FSDP gathers them."""

    attention: int
    """Of one layer, with its norms."""
    feedforward: int
    """Of one layer, without experts that lie elsewhere."""
    rest: int
    """Embedding and output."""
    n_blocks: int
    n_layers: int
    shards: int

    @classmethod
    def of(cls, model: ModelConfig, layout: Layout) -> _Held:
        experts = _expert_params(model) // layout.expert_parallel
        block = model.ffn.num_params() - _expert_params(model) + experts
        rest = 2 * model.vocab_size * model.d_model
        attention = (model.other_params() - rest) // model.n_blocks
        return cls(
            attention=FLOAT * attention,
            feedforward=FLOAT * block,
            rest=FLOAT * rest,
            n_blocks=model.n_blocks,
            n_layers=model.n_layers,
            shards=layout.gpus if layout.strategy == "fsdp" else 1,
        )

    @property
    def layer(self) -> int:
        return self.attention + self.feedforward

    @property
    def total(self) -> int:
        """What lies on the device for good."""
        return -(-(self.n_blocks * self.layer + self.rest) // self.shards)

    def gathered(self, accumulation: int) -> int:
        """What FSDP holds whole at a time; with accumulation whole gradients wait for the last micro-batch."""
        if self.shards == 1:
            return 0
        parameters = self.rest + min(_GATHERED_LAYERS, self.n_blocks) * self.layer
        if accumulation > 1:
            return parameters + self.n_blocks * self.layer + self.rest
        return parameters + max(_WHOLE_GRADIENTS * self.layer, self.rest)


def _backward_peak(kept: KeptBytes, logits: int, works: tuple[int, int], held: _Held, *, grads_are_there: bool) -> int:
    """The largest sum of what is kept, gradients and room to work in, from the loss down to the first layer."""
    there = held.total if grads_are_there else 0
    come = 0 if grads_are_there else 1
    of_attention, of_block = works
    live = kept.total + there
    peak = live + 2 * logits
    live += come * held.rest // 2 // held.shards - kept.output
    for layer in reversed(range(kept.n_layers)):
        # A shared layer's gradient comes once.
        new = come if layer >= kept.n_layers - held.n_blocks else 0
        peak = max(peak, live + of_block)
        live += new * held.feedforward // held.shards - kept.feedforward
        peak = max(peak, live + of_attention)
        live += new * held.attention // held.shards - kept.attention
    return max(peak, held.total)


def _remembered(model: ModelConfig, batch: MicroBatch, accumulation: int) -> int:
    """Every micro-batch has a memory of its own, and the window writes another one before it forgets the last."""
    if not batch.memory:
        return 0
    one = model.n_layers * batch.n_streams * batch.n_keys * model.d_model * FLOAT
    return (accumulation + 1) * one


def _expert_params(model: ModelConfig) -> int:
    """Parameters of a layer's experts."""
    ffn = model.ffn
    return ffn.n_products * ffn.n_channels * ffn.d_model if isinstance(ffn, MixtureConfig) else 0


def _check_experts(model: ModelConfig, layout: Layout) -> None:
    n, ffn = layout.expert_parallel, model.ffn
    if n == 1:
        return
    if not isinstance(ffn, MixtureConfig):
        raise UserError(f"`--expert-parallel` must be 1 for {ffn.name}, which has no experts; got {n}; fix: leave it out")
    if ffn.survivors is not None:
        raise UserError(f"`inner_k` must be none where experts are spread; got {ffn.survivors}; fix: leave it out")
    if ffn.n_experts % n:
        raise UserError(
            f"`--expert-parallel` must divide the {ffn.n_experts} experts of a layer; got {n}; "
            f"fix: one of {_some_divisors(ffn.n_experts)}, or another expert_size"
        )


def _some_divisors(n: int) -> str:
    return ", ".join(str(k) for k in range(1, n + 1) if n % k == 0)


def _dispatched_bytes(model: ModelConfig, batch: MicroBatch, layout: Layout) -> int:
    """What a layer keeps of each row that went elsewhere or came from there: x, what came back, and places."""
    if layout.expert_parallel == 1 or not isinstance(model.ffn, MixtureConfig):
        return 0
    rows = batch.n_tokens * model.ffn.n_selected
    return rows * (model.d_model * (2 * FLOAT + batch.itemsize) + 4 * INDEX)


def _communication(model: ModelConfig, batch: MicroBatch, layout: Layout, accumulation: int) -> CommunicationPlan:
    n, spread = layout.gpus, layout.expert_parallel
    experts = FLOAT * model.n_blocks * _expert_params(model) // spread
    others = FLOAT * model.num_params() - experts * spread
    # Experts that are spread have fewer copies to agree with.
    once = others * (n - 1) / n + experts * (n // spread - 1) / (n // spread)
    if layout.strategy == "fsdp":
        rest = FLOAT * 2 * model.vocab_size * model.d_model
        gradients, parameters = once, accumulation * (2 * once - rest * (n - 1) / n)
    else:
        gradients, parameters = 2 * once, 0.0
    return CommunicationPlan(
        gradients=round(gradients),
        parameters=round(parameters),
        routers=accumulation * model.n_layers * _router_bytes(model, batch, layout),
        experts=round(accumulation * model.n_layers * _all_to_alls(model, batch, spread)),
    )


def _router_bytes(model: ModelConfig, batch: MicroBatch, layout: Layout) -> int:
    """Of one layer's batch-wide quantities in one micro-batch."""
    n, ffn = layout.gpus, model.ffn
    if n == 1:
        return 0
    ring = 2 * (n - 1) / n
    n_units = ffn.n_experts if isinstance(ffn, MixtureConfig) else ffn.n_channels
    # Counts, weights, tokens and lost selections in one tensor of float64.
    statistics = ring * 8 * (2 * n_units + 2)
    # Log-sum-exps of each device and its number of tokens: gathered, and their gradients summed.
    log_shares = (1 + 2) * (n - 1) * FLOAT * (n_units + 1)
    sums = ring * FLOAT * n_units
    losses = {"entropy": log_shares, "slot_entropy": log_shares, "switch": log_shares + sums, "cv": 2 * sums}
    balance = sum(losses.get(name, sums) for name, weight in ffn.balancing().items() if weight > 0)
    logits = (n - 1) * batch.n_tokens * (n_units * FLOAT + 1) if ffn.selects_over_batch else 0
    return round(statistics + balance + logits)


def _all_to_alls(model: ModelConfig, batch: MicroBatch, spread: int) -> float:
    """Of one layer: tokens there and back, forward and backward."""
    if spread == 1 or not isinstance(model.ffn, MixtureConfig):
        return 0.0
    numbers = batch.n_tokens * model.ffn.n_selected * model.d_model
    counts = INDEX * model.ffn.n_experts
    return (numbers * (2 * FLOAT + 2 * batch.itemsize) + counts) * (spread - 1) / spread
