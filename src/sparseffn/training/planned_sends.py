"""Bytes that a device sends in a training step; the model is the docstring of `planner`."""

from __future__ import annotations

from dataclasses import dataclass

from sparseffn.ffn.mixture import MixtureConfig
from sparseffn.models import ModelConfig
from sparseffn.training.layout import Layout, expert_params
from sparseffn.training.step_costs import FLOAT, INDEX, MicroBatch


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


def communication_plan(model: ModelConfig, batch: MicroBatch, layout: Layout, accumulation: int) -> CommunicationPlan:
    """What a device sends for all micro-batches of a step."""
    n, spread = layout.gpus, layout.expert_parallel
    experts = FLOAT * model.n_blocks * expert_params(model) // spread
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
