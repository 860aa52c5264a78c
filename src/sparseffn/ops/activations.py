"""Hidden units from their products: activations by name, gated units, their derivatives, and what autograd keeps of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseffn.errors import UserError, unknown_name

ActivationName = Literal["relu", "gelu", "silu", "identity", "relu2", "gelu_tanh"]
"""Functions of one number, see `ACTIVATIONS`; relu2 is ReLU squared, gelu is exact, gelu_tanh its approximation."""

GatedActivationName = Literal["relu", "gelu", "silu", "identity", "relu2", "gelu_tanh", "clamped_swiglu"]
"""With the one that has no form without a gate: gpt-oss's clamped SwiGLU."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "identity": lambda x: x,
    "relu2": lambda x: torch.relu(x).square(),
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}

CLAMPED_SWIGLU = "clamped_swiglu"

# Of gpt-oss (`swiglu_alpha`, `swiglu_limit`).
SWIGLU_ALPHA, SWIGLU_LIMIT = 1.702, 7.0

# These are determined by their output as far as the derivative is concerned; of the others the input is kept.
KEEPS_OUTPUT = ("relu", "identity")


def hidden_units(
    name: str, h: Tensor, up: Tensor | None = None, *, alpha: float = SWIGLU_ALPHA, limit: float = SWIGLU_LIMIT
) -> Tensor:
    """Units from the keys' product h and, of a gated block, the gate keys' product `up`.

    `act(h)`, gated `act(h) up`, and for clamped_swiglu `(u + 1) g sigmoid(alpha g)` with `g = min(h, limit)` and
    `u = clamp(up, -limit, limit)`.
    """
    if name == CLAMPED_SWIGLU:
        assert up is not None, "the public functions refuse clamped_swiglu without a gate"
        g = h.clamp(max=limit)
        return (up.clamp(-limit, limit) + 1) * g * torch.sigmoid(alpha * g)
    a = ACTIVATIONS[name](h)
    return a if up is None else a * up


def draw_keep(shape: tuple[int, ...], rate: float, device: torch.device) -> tuple[Tensor, float]:
    """Which hidden units dropout leaves, and what scales them.

    Raises:
        UserError: the rate is outside [0, 1).
    """
    if not 0.0 <= rate < 1.0:
        raise UserError(f"`dropout` must be at least 0 and below 1; got {rate}; fix: a rate such as 0.1")
    return torch.rand(shape, device=device) >= rate, 1.0 / (1.0 - rate)


def check_activation(name: str, gate_keys: Tensor | None, gate_bias: Tensor | None, limit: float = SWIGLU_LIMIT) -> None:
    """That there is such an activation, gate keys where it or their bias needs them, and a limit that leaves something.

    Raises:
        UserError: there is not.
    """
    if name not in ACTIVATIONS and name != CLAMPED_SWIGLU:
        raise unknown_name("activation", name, (*ACTIVATIONS, CLAMPED_SWIGLU))
    if gate_keys is None and (name == CLAMPED_SWIGLU or gate_bias is not None):
        what = "gate_bias" if gate_bias is not None else f"activation={name!r}"
        raise UserError(f"`gate_keys` must be given with {what}; got none; fix: pass the second half of a gated block's keys")
    # A NaN too is not above 0.
    if name == CLAMPED_SWIGLU and not limit > 0:
        raise UserError(f"`limit` must be above 0 for activation={name!r}; got {limit}; fix: gpt-oss has {SWIGLU_LIMIT}")


def saved_activations(activation: str, dropout: float = 0.0, *, gated: bool = False) -> int:
    """Tensors of u's size that PyTorch's activation, gate, dropout and the product after them keep for backward.

    ReLU needs no more than its output, which the product keeps too; the others need their input. A gate keeps both of its
    factors. Dropout keeps its scales and makes the product keep a tensor of its own.
    """
    if activation == CLAMPED_SWIGLU:
        # Both products, both clamped, the sigmoid, and two products of these three.
        return 7 + (dropout > 0)
    inputs = activation not in KEEPS_OUTPUT
    if gated:
        return inputs + 3 + (dropout > 0)
    if dropout > 0:
        return 2 if activation == "identity" else 3
    return 1 + inputs
