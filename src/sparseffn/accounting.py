"""Parameters, FLOPs and saved bytes of a block: the closed forms of its config, and what a built layer measures.

The two must agree: the contract suite holds every method's closed forms against the layer built on the meta device, against
`torch.utils.flop_counter` and against the tensors that autograd really keeps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sparseffn.ffn import FeedForward, FFNConfig
from sparseffn.ops.library import register_flops

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


register_flops()
