"""Checks of configs: round trip, options that act, values that are refused."""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import Tensor

from sparseffn.contract._harness import contract, require, tokens
from sparseffn.errors import UserError
from sparseffn.ffn import FFNConfig, FieldInfo, field_infos, make_config


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
