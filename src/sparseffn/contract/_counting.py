"""Checks of what is counted: parameters, matching, FLOPs, saved bytes, and that parameters matter."""

from __future__ import annotations

import itertools

import torch

from sparseffn.accounting import built_params, measured_flops, measured_saved_bytes
from sparseffn.contract._harness import contract, make_layer, require, tokens
from sparseffn.ffn import FFNConfig
from sparseffn.matching import match

_TOKENS = 16


@contract
def parameter_count(config: FFNConfig) -> None:
    """Closed form, layer on the meta device and layer in memory have the same number of parameters."""
    real = sum(p.numel() for p in config.build().parameters())
    require(config.num_params() == real, f"num_params() is {config.num_params()}, the layer has {real}")
    require(built_params(config) == real, f"on the meta device there are {built_params(config)}, in memory {real}")
    require(0 < config.active_params() <= real, f"active_params() is {config.active_params()} of {real}")
    require(config.active_channels > 0 and config.n_channels > 0, "channels are not positive")


@contract
def matching(config: FFNConfig) -> None:
    """The count grows with each size field, and matching finds a size for a reachable budget."""
    require(len(config.size_fields) > 0, "no size_fields are declared")
    for field in config.size_fields:
        value = getattr(config, field)
        if value is None:
            continue
        more = [config.replace(**{field: value + i}).num_params() for i in range(4)]
        require(all(a < b for a, b in itertools.pairwise(more)), f"the count does not grow with {field}: {more}")
    target = config.replace(**{config.size_fields[0]: 40}).num_params()
    found = match(config, target)
    require(found.block_params == target, f"matching misses a reachable budget {target}: {found.block_params}")


@contract
def flops(config: FFNConfig) -> None:
    """Closed form FLOPs are what the flop counter sees, forward and with backward."""
    x = tokens(config, _TOKENS, dtype=torch.float32)
    layer = make_layer(config, dtype=torch.float32)
    with torch.no_grad():
        seen = measured_flops(layer, x)
    wanted = _TOKENS * config.forward_flops()
    require(seen == wanted, f"forward_flops() says {wanted}, the counter {seen}")
    seen = measured_flops(layer.train(), x, backward=True)
    wanted = 3 * _TOKENS * config.forward_flops(training=True)
    require(seen == wanted, f"forward and backward should be 3 x forward_flops(training=True) = {wanted}, counted {seen}")


@contract
def saved_bytes(config: FFNConfig) -> None:
    """Closed form bytes are what autograd keeps in a training forward, in float32 and in bfloat16."""
    for dtype in (torch.float32, torch.bfloat16):
        layer = make_layer(config, dtype=dtype, training=True)
        seen = measured_saved_bytes(layer, tokens(config, _TOKENS, dtype=dtype))
        wanted = config.saved_bytes(_TOKENS, dtype.itemsize)
        require(seen == wanted, f"saved_bytes() says {wanted} in {dtype}, autograd keeps {seen}")


@contract
def gradients(config: FFNConfig) -> None:
    """Every parameter gets a gradient in training, and not only zeros over a few batches."""
    layer = make_layer(config, training=True)
    touched: dict[str, bool] = {name: False for name, _ in layer.named_parameters()}
    for seed in range(4):
        layer.zero_grad(set_to_none=True)
        x = tokens(config, 64, seed=seed)
        (layer(x) * tokens(config, 64, seed=90 + seed)).sum().backward()
        for name, parameter in layer.named_parameters():
            require(parameter.grad is not None, f"{name} gets no gradient")
            touched[name] |= bool(parameter.grad is not None and parameter.grad.any())
    dead = [name for name, has in touched.items() if not has]
    require(not dead, f"the gradient is zero everywhere for {', '.join(dead)}")
