"""A whole training step, relative attention against plain `scaled_dot_product_attention`, interleaved in one run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sparseffn.bench.timing import interleaved, medians
from sparseffn.evaluate import token_losses
from sparseffn.models import PlainAttention, RelativeAttention, TransformerXL, TransformerXLConfig


def training_step(model: TransformerXL, *, batch: int, context: int, memory: int) -> Callable[[], None]:
    """A call that trains one step on random tokens with a full memory."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (batch, context + 1), generator=generator)
    states = tuple(torch.randn(batch, memory, model.config.d_model, generator=generator) for _ in model.layers)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    model.train()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        output = model(tokens[:, :-1], states, memory_length=memory)
        token_losses(output.logits, tokens[:, 1:]).mean().backward()
        optimizer.step()

    return step


def attention_ratio(
    config: TransformerXLConfig, *, batch: int = 4, context: int = 256, memory: int = 256, rounds: int = 5
) -> dict[str, Any]:
    """Time of a training step with relative over one with plain attention, all else equal.

    Args:
        config: the model.
        batch: streams.
        context: tokens of a window.
        memory: positions before the window that are attended to.
        rounds: timed steps of each.

    Returns:
        Median seconds of both, their ratio, and all timings.
    """
    candidates = {}
    for name, attention in (("relative", RelativeAttention), ("plain", PlainAttention)):
        model = TransformerXL(config, attention)
        candidates[name] = training_step(model, batch=batch, context=context, memory=memory)
    times = interleaved(candidates, rounds=rounds, warmup=1)
    middle = medians(times)
    return {"seconds": middle, "ratio": middle["relative"] / middle["plain"], "times": times}
