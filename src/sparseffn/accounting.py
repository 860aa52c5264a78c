"""Parameters, FLOPs and saved bytes of a block: the closed forms of its config, and what a built layer measures.

The two must agree: the contract suite holds every method's closed forms against the layer built on the meta device, against
`torch.utils.flop_counter` and against the tensors that autograd really keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from sparseffn.ffn import FeedForward, FFNConfig

# Backward of a matrix product is one product for each factor.
BACKWARD_OVER_FORWARD = 2


@dataclass(frozen=True, kw_only=True)
class BlockCounts:
    """What one feedforward block costs."""

    total_params: int
    active_params: int
    """Parameters that one token's output depends on."""
    forward_flops: int
    """FLOPs a token, evaluation, selector included."""
    training_flops: int
    """FLOPs a token, forward and backward."""
    saved_bytes: int
    """Bytes kept for backward, a token."""
    active_fraction: float
    """The paper's convention for relative FLOPs: active over all channels, K / N_E for mixtures."""


def count_block(config: FFNConfig, *, n_tokens: int = 1024, itemsize: int = 4) -> BlockCounts:
    """Closed-form counts of a block; `n_tokens` of a batch share the few saved bytes that do not depend on their number."""
    return BlockCounts(
        total_params=config.num_params(),
        active_params=config.active_params(),
        forward_flops=config.forward_flops(),
        training_flops=(1 + BACKWARD_OVER_FORWARD) * config.forward_flops(training=True),
        saved_bytes=round(config.saved_bytes(n_tokens, itemsize) / n_tokens),
        active_fraction=config.active_channels / config.n_channels,
    )


def built_params(config: FFNConfig) -> int:
    """Parameters of the layer, built on the meta device."""
    with torch.device("meta"):
        layer = config.build()
    return sum(p.numel() for p in layer.parameters())


def measured_flops(layer: nn.Module, x: Tensor, *, backward: bool = False) -> int:
    """FLOPs of a call as `torch.utils.flop_counter` sees them, our operations included."""
    x = x.detach().requires_grad_(backward)
    with FlopCounterMode(display=False) as counter:
        y = layer(x)
        if backward:
            y.sum().backward()
    return counter.get_total_flops()


def kept_tensors(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """A tensor of each distinct storage that autograd keeps in a call, without parameters and without x."""
    x = x.detach().requires_grad_()
    known = {p.untyped_storage().data_ptr() for p in layer.parameters()} | {x.untyped_storage().data_ptr()}
    # The tensors are kept alive so that no address is used twice.
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in known:
            kept[pointer] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    del y
    return list(kept.values())


def measured_saved_bytes(layer: FeedForward, x: Tensor) -> int:
    """Bytes of distinct storages that autograd keeps in a call, without parameters and without x."""
    return sum(t.untyped_storage().nbytes() for t in kept_tensors(layer, x))


def _product(rows: tuple[int, ...], weight: tuple[int, ...]) -> int:
    """Every row times one matrix of the stack."""
    return 2 * rows[0] * weight[1] * weight[2]


def _inner(keys: tuple[int, ...], gates: tuple[int, ...], inner_k: int) -> int:
    """All units of the selected experts, the survivors' values."""
    return 2 * gates[0] * keys[1] * (gates[1] * keys[2] + inner_k)


# FLOPs of each operation from the shapes of its first arguments; `_` are those that do not matter.
_FLOPS: dict[str, Callable[..., int]] = {
    "expert_up": lambda x, weight, tokens, *_: _product(tokens, weight),
    "expert_up_backward": lambda grad, x, weight, tokens, *_: 2 * _product(tokens, weight),
    "expert_down": lambda a, weight, *_: _product(a, weight),
    "expert_down_backward": lambda grad, a, weight, *_: 2 * _product(a, weight),
    "expert_mlp": lambda x, keys, values, gates, *_: 2 * gates[1] * _product(gates, keys),
    "expert_mlp_backward": lambda grad, x, keys, values, gates, *_: 4 * gates[1] * _product(gates, keys),
    "expert_mlp_inner": lambda x, keys, values, gates, *rest: _inner(keys, gates, rest[4]),
    "expert_mlp_inner_backward": lambda grad, x, keys, values, gates, kept, *_: 2 * _inner(keys, gates, kept[1]),
    "router_logits": lambda x, selector, *_: 2 * x[0] * x[1] * selector[0],
    "weighted_rows": lambda values, indices, *_: 2 * indices[0] * indices[1] * values[1],
    "weighted_rows_backward": lambda grad, values, indices, *_: 4 * indices[0] * indices[1] * values[1],
}


def _register(operation: str, flops: Callable[..., int]) -> None:
    @register_flop_formula(getattr(torch.ops.sparseffn, operation))
    def count(*shapes: Any, **_: Any) -> int:
        return flops(*shapes)


for _operation, _formula in _FLOPS.items():
    _register(_operation, _formula)
