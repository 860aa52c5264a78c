"""The methods: each public module beside this one is one method, found without a list to edit."""

from sparseffn.ffn._collect import collect_stats
from sparseffn.ffn._config import BlockShape, FFNConfig, describe
from sparseffn.ffn._layer import FeedForward
from sparseffn.ffn._options import FieldInfo, field_infos, option, parse_options
from sparseffn.ffn._registry import (
    config_from_json,
    list_methods,
    load_builtin_methods,
    make_config,
    method_class,
    register,
    unregister,
)
from sparseffn.ffn._stats import CollectedStats, Routed, RoutingStats

load_builtin_methods(__name__, list(__path__))

ffn_config_from_json = config_from_json

__all__ = [
    "BlockShape",
    "CollectedStats",
    "FFNConfig",
    "FeedForward",
    "FieldInfo",
    "Routed",
    "RoutingStats",
    "collect_stats",
    "config_from_json",
    "describe",
    "ffn_config_from_json",
    "field_infos",
    "list_methods",
    "make_config",
    "method_class",
    "option",
    "parse_options",
    "register",
    "unregister",
]
