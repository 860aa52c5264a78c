"""Checks of configs: what is counted, matching, round trip, options that act, values that are refused."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import torch
from torch import Tensor

from sparseffn.accounting import built_params, measured_flops, measured_saved_bytes
from sparseffn.contract.harness import contract, make_layer, require, tokens
from sparseffn.errors import UserError
from sparseffn.ffn import FFNConfig, FieldInfo, field_infos, make_config
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
    require(seen == wanted, f"forward_flops() is {wanted}, the counter {seen}")
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
        require(seen == wanted, f"saved_bytes() is {wanted} in {dtype}, autograd keeps {seen}")


@contract
def config_json(config: FFNConfig) -> None:
    """A config survives JSON."""
    data = json.loads(json.dumps(config.to_json()))
    require(data.pop("method") == config.name, "to_json() does not name the method")
    again = make_config(type(config), data)
    require(again == config, f"JSON gives back {again!r}")


@contract
def no_dead_option(config: FFNConfig) -> None:
    """Changing any field changes parameters, output, statistics or initialisation of some example."""
    examples = config.examples()
    for name, info in field_infos(type(config)).items():
        acts = any(_acts(example, name, value) for example in examples for value in _others(info, getattr(example, name)))
        require(acts, f"changing `{name}` changes nothing in any example")


def _others(info: FieldInfo, value: Any) -> list[Any]:
    """Other values of a field; some may not go with the rest of a config."""
    if info.choices:
        return [choice for choice in info.choices if choice != value]
    if info.kind is bool:
        return [not value]
    if info.kind is float:
        return [x for x in (0.0, 0.5) if x != value]
    base = 2 if value is None else value
    return [x for x in (base + 1, base + 2, base - 1, 1, None if info.optional else base) if x != value]


def _acts(config: FFNConfig, name: str, value: Any) -> bool:
    try:
        changed = config.replace(**{name: value})
    except UserError:
        return False
    if changed.num_params() != config.num_params() or changed.d_model != config.d_model:
        return True
    pairs = zip(_signature(config), _signature(changed), strict=True)
    return any(a.shape != b.shape or not torch.equal(a, b) for a, b in pairs)


def _signature(config: FFNConfig) -> list[Tensor]:
    """What a user can see of a config: outputs and statistics in both modes."""
    torch.manual_seed(0)
    layer = config.build().double()
    seen = []
    for training in (False, True):
        torch.manual_seed(3)
        y, stats = layer.train(training)(tokens(config, 24), return_stats=True)
        seen += [y.detach(), stats.counts, stats.weights, stats.balance_loss.detach(), stats.dropped]
    return seen


@contract
def bad_values(config: FFNConfig) -> None:
    """A value out of range or of another type is refused by an error that names field and value."""
    for name, info in field_infos(type(config)).items():
        bad: list[Any] = ["no such value", [], math.nan]
        o = info.option
        if not info.choices and info.kind in (int, float):
            bad += [o.low - 1] if o.low > -math.inf else []
            bad += [o.below] if o.below < math.inf else []
            bad += [o.high + 1] if o.high < math.inf else []
        if not info.optional:
            bad.append(None)
        for value in bad:
            _refuses(config, name, value)


def _refuses(config: FFNConfig, name: str, value: Any) -> None:
    try:
        config.replace(**{name: value})
    except UserError as error:
        for what, text in (("field", f"`{name}`"), ("value", repr(value))):
            require(text in str(error), f"the error for {name}={value!r} does not name the {what}: {error}")
        return
    require(False, f"{name}={value!r} is accepted")
