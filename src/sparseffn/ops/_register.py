"""The backends: `triton` for GPUs, `cpu` where there is a compiler, `torch` everywhere, `grouped_mm` and `reference` for
comparison.
"""

from __future__ import annotations

import torch

from sparseffn.ops import reference
from sparseffn.ops.backends import Backend, functions_of, register_backend
from sparseffn.ops.balance import assign_on_host, sinkhorn_plain
from sparseffn.ops.blocks import product_key_rows_plain, topk_rows_plain
from sparseffn.ops.columns import topk_eager
from sparseffn.ops.cpu import cpu_backend
from sparseffn.ops.cvmm import cvmm_plain
from sparseffn.ops.experts import experts_eager
from sparseffn.ops.grouped_mm import grouped_mm_backend
from sparseffn.ops.route import route_checked
from sparseffn.ops.router_logits import router_logits_plain
from sparseffn.ops.rows import product_key_topk_eager, weighted_rows_eager
from sparseffn.ops.triton import triton_backend

# Differentiable compositions, for those who ask for them by name.
PLAIN = {
    "balanced_assignment": assign_on_host,
    "cvmm": cvmm_plain,
    "experts": experts_eager,
    "product_key_rows": product_key_rows_plain,
    "product_key_topk": product_key_topk_eager,
    "route": route_checked,
    "router_logits": router_logits_plain,
    "sinkhorn": sinkhorn_plain,
    "topk": topk_eager,
    "topk_rows": topk_rows_plain,
    "weighted_rows": weighted_rows_eager,
}


def register_builtin_backends() -> None:
    """Register them in the order in which `auto` tries them; only an explicit request takes the last two."""
    slow = functions_of(reference)
    register_backend(triton_backend())
    register_backend(cpu_backend())
    register_backend(Backend(name="torch", functions=PLAIN, unavailable=_always))
    register_backend(grouped_mm_backend())
    register_backend(Backend(name="reference", functions=slow, unavailable=_always, automatic=False))


def _always(device: torch.device, dtype: torch.dtype) -> None:
    """Nothing hinders them."""
