"""`expert_mlp` from a backend's two expert products, for backends that do not fuse them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparseffn.ops.activations import ACTIVATIONS, KEEPS_OUTPUT, activation_backward, from_kept
from sparseffn.ops.backends import Kernel


def sorted_routing(indices_TK: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    """Positions of the selections in stable order of their expert, and where each expert's begin."""
    sorted_experts, order = indices_TK.flatten().sort(stable=True)
    return order, torch.searchsorted(sorted_experts, torch.arange(n_experts + 1, device=order.device))


def compose_expert_mlp(kernels: dict[str, Kernel]) -> dict[str, Kernel]:
    """`expert_mlp` and its backward over the four expert products in `kernels`."""
    up, up_backward = kernels["expert_up"], kernels["expert_up_backward"]
    down, down_backward = kernels["expert_down"], kernels["expert_down_backward"]

    def forward(
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        gates: Tensor,
        indices: Tensor,
        keep: Tensor | None,
        keep_scale: float,
        activation: str,
        *,
        save: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        order, offsets = sorted_routing(indices, keys.shape[0])
        tokens = order // indices.shape[1]
        scores_RG = up(x, keys, tokens, offsets)
        u_RG = ACTIVATIONS[activation](scores_RG)
        kept_RG = u_RG if activation in KEEPS_OUTPUT else scores_RG
        y = down(_dropped(u_RG, keep, keep_scale, order), values, gates.flatten()[order], tokens, offsets, x.shape[0])
        return y, kept_RG, order, offsets

    def backward(
        grad: Tensor,
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        gates: Tensor,
        kept_RG: Tensor,
        order: Tensor,
        offsets: Tensor,
        keep: Tensor | None,
        keep_scale: float,
        activation: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tokens = order // gates.shape[1]
        a_RG = _dropped(from_kept(activation, kept_RG), keep, keep_scale, order)
        grad_a, grad_values, grad_rows = down_backward(grad, a_RG, values, gates.flatten()[order], tokens, offsets)
        grad_scores = activation_backward(activation, _dropped(grad_a, keep, keep_scale, order), kept_RG)
        grad_x, grad_keys = up_backward(grad_scores, x, keys, tokens, offsets)
        grad_gates = torch.empty_like(grad_rows).index_copy_(0, order, grad_rows)
        return grad_x, grad_keys, grad_values, grad_gates.view(gates.shape).to(gates.dtype)

    return {"expert_mlp": forward, "expert_mlp_backward": backward}


def _dropped(u_RG: Tensor, keep: Any, scale: float, order: Tensor) -> Tensor:
    return u_RG if keep is None else u_RG * (keep.flatten(0, 1)[order] * scale).to(u_RG.dtype)
