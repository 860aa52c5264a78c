"""The methods: one module beside this one is one method, found because it calls `register`; there is no list to edit.

What a method is made of stands beside them: `block_config` and `feedforward` (its two bases), `options` (its fields), `mixture`
and `routers` (mixtures of experts), `routing_stats`, `collect`, and `methods`, the registry;
`released_layers` loads what others trained; `expert_parallel` and `gradient_means` spread experts over processes.
"""

from sparseffn.ffn.block_config import BlockShape, FFNConfig, GatedConfig, describe
from sparseffn.ffn.collect import CollectedStats, collect_stats
from sparseffn.ffn.expert_parallel import replicate_rest, shard_experts, shard_rest, unshard_experts
from sparseffn.ffn.feedforward import FeedForward, configured_by
from sparseffn.ffn.methods import (
    build,
    config_from_json,
    list_methods,
    load_builtin_methods,
    make_config,
    method_class,
    register,
    unregister,
)
from sparseffn.ffn.options import FieldInfo, field_infos, option, parse_options
from sparseffn.ffn.released_layers import load_released_layer
from sparseffn.ffn.routers import set_batch_group
from sparseffn.ffn.routing_stats import Routed, RoutingStats
from sparseffn.ops import BatchGroup

load_builtin_methods(__name__, list(__path__))

ffn_config_from_json = config_from_json

__all__ = [
    "BatchGroup",
    "BlockShape",
    "CollectedStats",
    "FFNConfig",
    "FeedForward",
    "FieldInfo",
    "GatedConfig",
    "Routed",
    "RoutingStats",
    "build",
    "collect_stats",
    "config_from_json",
    "configured_by",
    "describe",
    "ffn_config_from_json",
    "field_infos",
    "list_methods",
    "load_released_layer",
    "make_config",
    "method_class",
    "option",
    "parse_options",
    "register",
    "replicate_rest",
    "set_batch_group",
    "shard_experts",
    "shard_rest",
    "unregister",
    "unshard_experts",
]
