"""Memory of a device in a training step; the model is the docstring of `planner`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from sparseffn.ffn.mixture import MixtureConfig
from sparseffn.models import ModelConfig
from sparseffn.training.layout import Layout, expert_params
from sparseffn.training.step_costs import FLOAT, INDEX, KeptBytes, MicroBatch, attention_work, kept_bytes

# Gathered at a time under FSDP: the layer that computes, the next one, and the buffer in which that one arrives.
_GATHERED_LAYERS = 3
# A layer's gradient, and the copy of it that is scattered.
_WHOLE_GRADIENTS = 2


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
    """Bytes of parameters on one device: what FSDP gathers whole, and the parts that lie there for good."""

    rest: int
    """Embedding and output."""
    gathered_layer: int
    """What FSDP gathers of a layer: not experts of which the other devices have no copies."""
    own_attention: int
    own_feedforward: int
    own_rest: int
    n_blocks: int
    sharded: bool

    @classmethod
    def of(cls, model: ModelConfig, layout: Layout) -> _Held:
        rest = FLOAT * 2 * model.vocab_size * model.d_model
        attention = (FLOAT * model.other_params() - rest) // model.n_blocks
        experts = FLOAT * expert_params(model) // layout.expert_parallel
        router = FLOAT * (model.ffn.num_params() - expert_params(model))
        # Experts that are spread have fewer copies to share.
        shards, of_experts = (layout.gpus, layout.gpus // layout.expert_parallel) if layout.strategy == "fsdp" else (1, 1)
        return cls(
            rest=rest,
            gathered_layer=attention + router + (experts if of_experts > 1 else 0),
            own_attention=-(-attention // shards),
            own_feedforward=-(-router // shards) - (-experts // of_experts),
            own_rest=-(-rest // shards),
            n_blocks=model.n_blocks,
            sharded=shards > 1,
        )

    @property
    def total(self) -> int:
        """What lies on the device for good."""
        return self.n_blocks * (self.own_attention + self.own_feedforward) + self.own_rest

    def gathered(self, accumulation: int) -> int:
        """What FSDP holds whole at a time; with accumulation whole gradients wait for the last micro-batch."""
        if not self.sharded:
            return 0
        parameters = self.rest + min(_GATHERED_LAYERS, self.n_blocks) * self.gathered_layer
        if accumulation > 1:
            return parameters + self.n_blocks * self.gathered_layer + self.rest
        return parameters + max(_WHOLE_GRADIENTS * self.gathered_layer, self.rest)


def _backward_peak(kept: KeptBytes, logits: int, works: tuple[int, int], held: _Held, *, grads_are_there: bool) -> int:
    """The largest sum of what is kept, gradients and room to work in, from the loss down to the first layer."""
    there = held.total if grads_are_there else 0
    come = 0 if grads_are_there else 1
    of_attention, of_block = works
    live = kept.total + there
    peak = live + 2 * logits
    live += come * held.own_rest // 2 - kept.output
    for layer in reversed(range(kept.n_layers)):
        # A shared layer's gradient comes once.
        new = come if layer >= kept.n_layers - held.n_blocks else 0
        peak = max(peak, live + of_block)
        live += new * held.own_feedforward - kept.feedforward
        peak = max(peak, live + of_attention)
        live += new * held.own_attention - kept.attention
    return max(peak, held.total)


def _remembered(model: ModelConfig, batch: MicroBatch, accumulation: int) -> int:
    """Every micro-batch has a memory of its own, and the window writes another one before it forgets the last."""
    if not batch.memory:
        return 0
    one = model.n_layers * batch.n_streams * batch.n_keys * model.d_model * FLOAT
    return (accumulation + 1) * one


def _dispatched_bytes(model: ModelConfig, batch: MicroBatch, layout: Layout) -> int:
    """What a layer keeps of each row that went elsewhere or came from there: x, what came back, and places."""
    if layout.expert_parallel == 1 or not isinstance(model.ffn, MixtureConfig):
        return 0
    rows = batch.n_tokens * model.ffn.n_selected
    return rows * (model.d_model * (2 * FLOAT + batch.itemsize) + 4 * INDEX)
