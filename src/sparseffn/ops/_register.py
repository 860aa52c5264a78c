"""The backends: `triton` for GPUs, `torch`, which every installation has, `grouped_mm` and `reference` for comparison."""

from __future__ import annotations

from sparseffn.ops import _torch_kernels, reference
from sparseffn.ops.backends import Backend, register_backend
from sparseffn.ops.grouped_mm import grouped_mm_backend
from sparseffn.ops.triton import triton_backend

FORWARD = ("expert_up", "expert_down", "weighted_rows", "product_key_topk", "sinkhorn", "balanced_assignment")
BACKWARD = ("expert_up_backward", "expert_down_backward", "weighted_rows_backward", "sinkhorn_backward")


def register_builtin_backends() -> None:
    """Register `triton` where it runs, `torch` for every device, and two that only an explicit request takes."""
    register_backend(triton_backend())
    kernels = {name: getattr(_torch_kernels, name) for name in (*FORWARD, *BACKWARD)}
    register_backend(Backend(name="torch", kernels=kernels, unavailable=lambda device: None))
    register_backend(grouped_mm_backend())
    slow = {name: getattr(reference, name) for name in FORWARD}
    register_backend(Backend(name="reference", kernels=slow, unavailable=lambda device: None, automatic=False, direct=True))
