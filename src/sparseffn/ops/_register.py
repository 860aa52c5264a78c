"""The backends: `triton` for GPUs, `cpu` where there is a compiler, `torch` everywhere, `grouped_mm` and `reference` for
comparison.
"""

from __future__ import annotations

from sparseffn.ops import _torch_kernels, reference
from sparseffn.ops._compose import compose_expert_mlp
from sparseffn.ops.backends import Backend, register_backend
from sparseffn.ops.cpu import cpu_backend
from sparseffn.ops.grouped_mm import grouped_mm_backend
from sparseffn.ops.triton import triton_backend

FORWARD = (
    "expert_up",
    "expert_down",
    "weighted_rows",
    "product_key_topk",
    "sinkhorn",
    "balanced_assignment",
    "router_logits",
    "topk",
)
BACKWARD = ("expert_up_backward", "expert_down_backward", "weighted_rows_backward", "sinkhorn_backward")
REFERENCES = (
    "routed_mlp",
    "expert_mlp",
    "expert_up",
    "expert_down",
    "weighted_rows",
    "product_key_topk",
    "sinkhorn",
    "balanced_assignment",
    "router_logits",
    "topk",
)


def register_builtin_backends() -> None:
    """Register them in the order in which `auto` tries them; only an explicit request takes the last two."""
    register_backend(triton_backend())
    register_backend(cpu_backend())
    kernels = {name: getattr(_torch_kernels, name) for name in (*FORWARD, *BACKWARD)}
    kernels |= compose_expert_mlp(kernels)
    register_backend(Backend(name="torch", kernels=kernels, unavailable=lambda device, dtype: None))
    register_backend(grouped_mm_backend())
    slow = {name: getattr(reference, name) for name in REFERENCES}
    register_backend(
        Backend(name="reference", kernels=slow, unavailable=lambda device, dtype: None, automatic=False, direct=True)
    )
