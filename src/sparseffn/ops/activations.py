"""Activations of hidden units by name, their derivatives, and which of input and output determines these."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

ActivationName = Literal["relu", "gelu", "silu", "identity"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "identity": lambda x: x,
}

# These are determined by their output as far as the derivative is concerned; of the others the input is kept.
KEEPS_OUTPUT = ("relu", "identity")


def from_kept(name: str, kept: Tensor) -> Tensor:
    """The activation from what was kept of it."""
    return kept if name in KEEPS_OUTPUT else ACTIVATIONS[name](kept)


def activation_backward(name: str, grad: Tensor, kept: Tensor) -> Tensor:
    """Gradient of the activation's input."""
    match name:
        case "relu":
            return grad.masked_fill(kept <= 0, 0.0)
        case "gelu":
            return torch.ops.aten.gelu_backward(grad, kept)
        case "silu":
            return torch.ops.aten.silu_backward(grad, kept)
        case _:
            return grad


def saved_activations(activation: str, dropout: float = 0.0) -> int:
    """Tensors of u's size that PyTorch's activation, dropout and the product after them keep for backward.

    ReLU needs no more than its output, which the product keeps too; GELU and SiLU need their input. Dropout keeps its
    scales and makes the product keep a tensor of its own.
    """
    if dropout > 0:
        return 2 if activation == "identity" else 3
    return 1 if activation in KEEPS_OUTPUT else 2
