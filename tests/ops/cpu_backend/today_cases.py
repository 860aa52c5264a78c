"""Inputs of today's models for the compiled experts: gated, biased, in any layout; and the same computation in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from expert_cases import Case
from torch import Tensor

from sparseffn.ops.cpu.kernels import ExpertsInputs, experts_backward, experts_forward

GRADIENTS = ("x", "keys", "gate_keys", "values", "key_bias", "gate_bias", "value_bias", "gates")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu2": lambda h: F.relu(h).square(),
    "gelu": F.gelu,
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "silu": F.silu,
    "identity": lambda h: h,
}
# Keys, gate keys and values of a layout, from dense [E, D, G] and [E, G, D].
Layout = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def _turned(weights: Tensor) -> Tensor:
    """The same as a view of [E, out, in]."""
    return weights.mT.contiguous().mT


def _halves(keys: Tensor, gate_keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    both = torch.cat([keys, gate_keys], dim=-1)
    return *both.chunk(2, dim=-1), values


def _turned_halves(keys: Tensor, gate_keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    both = torch.cat([keys.mT, gate_keys.mT], dim=1)
    return both[:, : keys.shape[2]].mT, both[:, keys.shape[2] :].mT, _turned(values)


def _interleaved(keys: Tensor, gate_keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    both = torch.stack([keys, gate_keys], dim=-1).flatten(-2)
    return both[..., ::2], both[..., 1::2], values


def _turned_interleaved(keys: Tensor, gate_keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    both = torch.stack([keys.mT, gate_keys.mT], dim=2).flatten(1, 2)
    return both[:, ::2].mT, both[:, 1::2].mT, _turned(values)


def _spread(keys: Tensor, gate_keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    def every_third(weights: Tensor) -> Tensor:
        wide = weights.new_full((*weights.shape, 3), torch.nan)
        wide[..., 1] = weights
        return wide[..., 1]

    return every_third(keys), every_third(gate_keys), every_third(values)


LAYOUTS: dict[str, Layout] = {
    "in-out": lambda *weights: weights,
    "out-in": lambda keys, gate_keys, values: (_turned(keys), _turned(gate_keys), _turned(values)),
    "halves": _halves,
    "out-in-halves": _turned_halves,
    "interleaved": _interleaved,
    "out-in-interleaved": _turned_interleaved,
    "spread": _spread,
}


@dataclass(frozen=True)
class Options:
    """What the experts are beside their sizes."""

    layout: str = "in-out"
    activation: str = "silu"
    gated: bool = True
    biased: bool = False
    dropout: bool = False
    inner_k: int | None = None


def draw(case: Case, options: Options, dtype: torch.dtype) -> tuple[ExpertsInputs, Tensor, Tensor]:
    """Inputs of unit-scale results, the chosen experts, and the direction of the gradient."""
    (x, keys, values, gates), direction = case.inputs(dtype)
    gate_keys = (torch.randn(keys.shape) / case.d_model**0.5).to(dtype)
    keys, gate_keys, values = LAYOUTS[options.layout](keys, gate_keys, values)
    shapes = ((case.n_experts, case.size), (case.n_experts, case.size), (case.n_experts, case.d_model))
    biases = [torch.randn(shape).to(dtype) / 2 if options.biased else None for shape in shapes]
    keep = torch.rand(case.n_tokens, case.k, case.size) >= 0.5 if options.dropout else None
    inputs = ExpertsInputs(
        x, keys, values, gates, gate_keys=gate_keys if options.gated else None, key_bias=biases[0],
        gate_bias=biases[1] if options.gated else None, value_bias=biases[2], keep=keep,
        keep_scale=2.0 if options.dropout else 1.0, activation=options.activation, alpha=1.3, limit=0.8,
    )  # fmt: skip
    return inputs, case.indices(), direction


def compiled(inputs: ExpertsInputs, indices: Tensor, direction: Tensor, inner_k: int | None) -> dict[str, Tensor]:
    """Output and gradients of the kernels."""
    y, *kept = experts_forward(inputs, indices, save=True, inner_k=inner_k)
    grads = experts_backward(direction, inputs, *kept)
    return {"": y} | {name: grad for name, grad in zip(GRADIENTS, grads, strict=True) if grad is not None}


def composed(
    inputs: ExpertsInputs, indices: Tensor, direction: Tensor, inner_k: int | None, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The same by PyTorch in a dtype, one expert after the other."""
    leaves = {name: t for name in GRADIENTS if (t := getattr(inputs, name)) is not None}
    wide = torch.promote_types(dtype, torch.float32)
    leaves = {n: t.detach().to(wide if n == "gates" else dtype).requires_grad_() for n, t in leaves.items()}
    y = _compose(replace(inputs, **leaves), indices, inner_k)
    grads = torch.autograd.grad(y, list(leaves.values()), direction.to(dtype), materialize_grads=True)
    return {"": y.detach()} | dict(zip(leaves, grads, strict=True))


def _compose(p: ExpertsInputs, indices: Tensor, inner_k: int | None) -> Tensor:
    n_tokens, k = indices.shape
    hidden = p.x.new_zeros(n_tokens, k, p.keys.shape[2])
    for e in indices.unique().tolist():
        token, slot = torch.where(indices == e)
        hidden = hidden.index_put((token, slot), _activated(p, p.x[token], e))
    if p.keep is not None:
        hidden = hidden * p.keep * p.keep_scale
    hidden = hidden * p.gates[..., None].to(hidden.dtype)
    if inner_k is not None:
        alpha = hidden.flatten(1)
        mask = torch.zeros_like(alpha).scatter(1, alpha.topk(inner_k, dim=1).indices, 1.0)
        hidden = (alpha * mask).view_as(hidden)
    y = 0 * p.x
    for e in indices.unique().tolist():
        token, slot = torch.where(indices == e)
        rows = hidden[token, slot] @ p.values[e]
        if p.value_bias is not None:
            rows = rows + p.gates[token, slot, None].to(rows.dtype) * p.value_bias[e]
        y = y.index_add(0, token, rows)
    return y


def _activated(p: ExpertsInputs, rows: Tensor, e: int) -> Tensor:
    h = rows @ p.keys[e] + (0.0 if p.key_bias is None else p.key_bias[e])
    if p.gate_keys is None:
        return ACTIVATIONS[p.activation](h)
    u = rows @ p.gate_keys[e] + (0.0 if p.gate_bias is None else p.gate_bias[e])
    if p.activation != "clamped_swiglu":
        return ACTIVATIONS[p.activation](h) * u
    h, u = h.clamp(max=p.limit), u.clamp(-p.limit, p.limit)
    return (u + 1) * h * torch.sigmoid(p.alpha * h)


__all__ = ["ACTIVATIONS", "GRADIENTS", "LAYOUTS", "Options", "compiled", "composed", "draw"]
