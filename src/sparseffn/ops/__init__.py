"""Tensor functions behind the layers; shapes and the list of operations stand in ops/README.md."""

import warnings

from sparseffn.ops._register import register_builtin_backends
from sparseffn.ops.backends import Backend, explain_backend, list_backends, register_backend, requested_backend
from sparseffn.ops.balance import balanced_assignment, sinkhorn
from sparseffn.ops.balance_losses import load_variation, switch_balance
from sparseffn.ops.batch_group import BatchGroup
from sparseffn.ops.blocks import product_key_rows, topk_rows
from sparseffn.ops.capacity import over_capacity
from sparseffn.ops.choose import choose
from sparseffn.ops.columns import topk
from sparseffn.ops.counts import batch_entropy, routing_counts
from sparseffn.ops.cvmm import cvmm
from sparseffn.ops.expert_dispatch import dispatched_experts
from sparseffn.ops.experts import experts
from sparseffn.ops.halves import halves
from sparseffn.ops.route import GateName, route
from sparseffn.ops.router_logits import router_logits
from sparseffn.ops.rows import product_key_topk, weighted_rows
from sparseffn.ops.selection import Selection

__all__ = [
    "Backend",
    "BatchGroup",
    "GateName",
    "Selection",
    "balanced_assignment",
    "batch_entropy",
    "choose",
    "cvmm",
    "dispatched_experts",
    "experts",
    "explain_backend",
    "halves",
    "list_backends",
    "load_variation",
    "over_capacity",
    "product_key_rows",
    "product_key_topk",
    "register_backend",
    "requested_backend",
    "route",
    "router_logits",
    "routing_counts",
    "sinkhorn",
    "switch_balance",
    "topk",
    "topk_rows",
    "weighted_rows",
]

register_builtin_backends()


def __getattr__(name: str) -> object:
    """Version 0.1's name of `experts`."""
    if name == "expert_mlp":
        warnings.warn("`expert_mlp` is called `experts` now", DeprecationWarning, stacklevel=2)
        return experts
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
