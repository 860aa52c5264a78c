"""Activations by name, and what each keeps for its backward."""

from __future__ import annotations

from sparseffn.ops.activations import ACTIVATIONS

__all__ = ["ACTIVATIONS", "saved_activations"]


def saved_activations(activation: str, dropout: float = 0.0) -> int:
    """Tensors of u's size that activation, dropout and the product after them keep.

    ReLU needs no more than its output, which the product keeps too; GELU and SiLU need their input. Dropout keeps its
    scales and makes the product keep a tensor of its own.
    """
    if dropout > 0:
        return 2 if activation == "identity" else 3
    return 1 if activation in ("relu", "identity") else 2
