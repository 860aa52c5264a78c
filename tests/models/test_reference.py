"""The model against its equations written as loops, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.equations import attention_reference, model_reference
from models.small import METHODS, assert_same, small_model, text
from sparseffn.models import Memory, TransformerXL


def some_memory(length: int, n_layers: int = 2) -> Memory | None:
    """Random hidden states of two sequences; None for length 0."""
    generator = torch.Generator().manual_seed(7)
    states = (torch.randn(2, length, 8, generator=generator, dtype=torch.float64) for _ in range(n_layers))
    return tuple(states) if length else None


def gradients(model: TransformerXL, logits: Tensor) -> dict[str, Tensor]:
    """Of a fixed random projection of the logits, for every parameter."""
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3), dtype=logits.dtype)
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad((logits * weights).sum(), parameters), strict=True))


@pytest.mark.parametrize("n_memory", [0, 1, 6], ids=lambda n: f"memory{n}")
@pytest.mark.parametrize("n_queries", [1, 4], ids=lambda n: f"queries{n}")
def test_attention_is_its_equation(n_queries: int, n_memory: int) -> None:
    """The shift, the mask and the blocks leave the loops' numbers."""
    attention = small_model().layers[0].attention
    generator = torch.Generator().manual_seed(5)
    context = torch.randn(2, n_memory + n_queries, 8, generator=generator, dtype=torch.float64)
    x = context[:, n_memory:]
    assert_same(attention(x, context), attention_reference(attention, x, context))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n_memory", [0, 3], ids=lambda n: f"memory{n}")
def test_model_and_all_gradients_are_the_loops(method: str, n_memory: int) -> None:
    """Logits and the gradient of every parameter."""
    model, tokens, memory = small_model(method), text(4), some_memory(n_memory)
    logits, expected = model(tokens, memory).logits, model_reference(model, tokens, memory)
    assert_same(logits, expected)
    actual_grads, expected_grads = gradients(model, logits), gradients(model, expected)
    for name, grad in expected_grads.items():
        assert grad.abs().max() > 0, name
        assert_same(actual_grads[name], grad)


def test_reference_is_causal() -> None:
    """The loops do not share a mistake of the mask: the truth itself keeps to the past."""
    model, tokens = small_model(), text(5)
    changed = tokens.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 23
    difference = (model_reference(model, tokens) - model_reference(model, changed)).abs().amax(dim=(0, 2))
    assert difference[:3].max() == 0
    assert difference[3:].min() > 0
