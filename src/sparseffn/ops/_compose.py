"""`expert_mlp` from a backend's two expert products, for backends that do not fuse them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparseffn.ops import _torch_kernels
from sparseffn.ops._checks import check_routing
from sparseffn.ops.activations import ACTIVATIONS, KEEPS_OUTPUT, activation_backward, from_kept
from sparseffn.ops.backends import Kernel
from sparseffn.ops.routed_mlp import GateName, gates_of


def sorted_routing(indices_TK: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    """Positions of the selections in stable order of their expert, and where each expert's begin."""
    sorted_experts, order = indices_TK.flatten().sort(stable=True)
    return order, torch.searchsorted(sorted_experts, torch.arange(n_experts + 1, device=order.device))


@dataclass(frozen=True, slots=True)
class _Composed:
    """The whole computation over a backend's products; signatures as `ops.expert_mlp` and `ops.routed_mlp` call kernels."""

    up: Kernel
    up_backward: Kernel
    down: Kernel
    down_backward: Kernel
    topk: Kernel
    weighted_rows: Kernel
    router_logits: Kernel

    def forward(
        self, x: Tensor, keys: Tensor, values: Tensor, gates: Tensor, indices: Tensor, keep: Tensor | None,
        keep_scale: float, activation: str, *, save: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """Output, what the activation keeps, and the sorted routing."""
        check_routing(gates, indices, keys.shape[0])
        order, offsets = sorted_routing(indices, keys.shape[0])
        tokens = order // indices.shape[1]
        scores_RG = self.up(x, keys, tokens, offsets)
        u_RG = ACTIVATIONS[activation](scores_RG)
        kept_RG = u_RG if activation in KEEPS_OUTPUT else scores_RG
        y = self.down(_dropped(u_RG, keep, keep_scale, order), values, gates.flatten()[order], tokens, offsets, x.shape[0])
        return y, kept_RG, order, offsets

    def backward(
        self, grad: Tensor, x: Tensor, keys: Tensor, values: Tensor, gates: Tensor, kept_RG: Tensor, order: Tensor,
        offsets: Tensor, keep: Tensor | None, keep_scale: float, activation: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of x, keys, values and gates."""
        tokens = order // gates.shape[1]
        a_RG = _dropped(from_kept(activation, kept_RG), keep, keep_scale, order)
        grad_a, grad_values, grad_rows = self.down_backward(grad, a_RG, values, gates.flatten()[order], tokens, offsets)
        grad_scores = activation_backward(activation, _dropped(grad_a, keep, keep_scale, order), kept_RG)
        grad_x, grad_keys = self.up_backward(grad_scores, x, keys, tokens, offsets)
        grad_gates = torch.empty_like(grad_rows).index_copy_(0, order, grad_rows)
        return grad_x, grad_keys, grad_values, grad_gates.view(gates.shape).to(gates.dtype)

    def forward_inner(
        self, x: Tensor, keys: Tensor, values: Tensor, gates: Tensor, indices: Tensor, keep: Tensor | None,
        keep_scale: float, activation: str, inner_k: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """Output, survivors, their positions, and the sorted routing."""
        (n_tokens, k), size = indices.shape, keys.shape[2]
        check_routing(gates, indices, keys.shape[0])
        order, offsets = sorted_routing(indices, keys.shape[0])
        scores_RG = self.up(x, keys, order // k, offsets)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        scores_TU = scores_RG.index_select(0, back).view(n_tokens, k * size)
        u_TU = ACTIVATIONS[activation](scores_TU)
        scaled_TU = u_TU if keep is None else u_TU * (keep.reshape(u_TU.shape) * keep_scale).to(u_TU.dtype)
        alpha_TU = scaled_TU * gates.to(u_TU.dtype).repeat_interleave(size, dim=1)
        best = self.topk(alpha_TU, inner_k, False)
        units = indices.gather(1, best // size) * size + best % size
        y = self.weighted_rows(values.flatten(0, 1), units, alpha_TU.gather(1, best))
        kept_TU = u_TU if activation in KEEPS_OUTPUT else scores_TU
        positions = best if keep is None else best.masked_fill(~keep.reshape(u_TU.shape).gather(1, best), -1)
        return y, kept_TU.gather(1, best), positions.to(torch.int32), order, offsets

    def backward_inner(
        self, grad: Tensor, x: Tensor, keys: Tensor, values: Tensor, gates: Tensor, survivors: Tensor,
        positions: Tensor, order: Tensor, offsets: Tensor, keep_scale: float, activation: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of x, keys, values and gates, from the survivors alone."""
        (n_tokens, k), size = gates.shape, keys.shape[2]
        # One place more, for survivors that dropout removed.
        at = torch.where(positions < 0, k * size, positions).long()
        kept_TU = survivors.new_zeros(n_tokens, k * size + 1).scatter_(1, at, survivors)[:, :-1]
        alive_TU = survivors.new_zeros(n_tokens, k * size + 1, dtype=torch.bool).scatter_(1, at, True)[:, :-1]
        kept_RG = kept_TU.reshape(n_tokens * k, size)[order]
        alive = alive_TU.reshape(n_tokens, k, size)
        return self.backward(grad, x, keys, values, gates, kept_RG, order, offsets, alive, keep_scale, activation)

    @torch.no_grad()
    def routed(
        self, x: Tensor, selector: Tensor, keys: Tensor, values: Tensor, k: int, gate: GateName, activation: str, *,
        selection: bool = True,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        """Output, experts and gates; without `selection` the output and Nones."""
        wide = torch.promote_types(x.dtype, torch.float32)
        logits_TE = self.router_logits(x.to(wide), selector.to(wide))
        indices_TK = self.topk(logits_TE, k, True)
        gates_TK = gates_of(gate, logits_TE, indices_TK)
        y, *_ = self.forward(x, keys, values, gates_TK, indices_TK, None, 1.0, activation, save=False)
        return (y, indices_TK, gates_TK) if selection else (y, None, None)


def compose_expert_mlp(kernels: dict[str, Kernel]) -> dict[str, Kernel]:
    """`routed_mlp`, `expert_mlp` with and without inner top-K, and their backward over the products in `kernels`.

    Args:
        kernels: the four expert products; `weighted_rows`, `topk` and `router_logits` are PyTorch's where they are not
            among them.
    """
    composed = _Composed(
        up=kernels["expert_up"],
        up_backward=kernels["expert_up_backward"],
        down=kernels["expert_down"],
        down_backward=kernels["expert_down_backward"],
        topk=kernels.get("topk", _torch_kernels.topk),
        weighted_rows=kernels.get("weighted_rows", _torch_kernels.weighted_rows),
        router_logits=kernels.get("router_logits", _torch_kernels.router_logits),
    )
    return {
        "routed_mlp": composed.routed,
        "expert_mlp": composed.forward,
        "expert_mlp_backward": composed.backward,
        "expert_mlp_inner": composed.forward_inner,
        "expert_mlp_inner_backward": composed.backward_inner,
    }


def _dropped(u_RG: Tensor, keep: Any, scale: float, order: Tensor) -> Tensor:
    return u_RG if keep is None else u_RG * (keep.flatten(0, 1)[order] * scale).to(u_RG.dtype)
