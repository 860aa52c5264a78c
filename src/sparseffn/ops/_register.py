"""The two backends that every installation has: `torch`, and `reference` for comparison."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparseffn.ops import _torch_kernels, reference
from sparseffn.ops.backends import Backend, Kernel, register_backend

FORWARD = ("expert_up", "expert_down", "weighted_rows", "product_key_topk", "sinkhorn", "balanced_assignment")
BACKWARD = ("expert_up_backward", "expert_down_backward", "weighted_rows_backward")


def _derive(function: Callable[..., Tensor], n_trailing: int) -> Kernel:
    """The backward kernel of a reference: autograd through the slow forward.

    Args:
        function: the reference, whose floating inputs are the differentiable ones.
        n_trailing: how many arguments after the saved tensors it takes that only the gradient's shape tells.
    """

    def backward(grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() if x.is_floating_point() else x for x in inputs]
            y = function(*leaves, *(grad.shape[:1] if n_trailing else ()))
            wanted = [x for x in leaves if x.requires_grad]
            return torch.autograd.grad(y, wanted, grad)

    return backward


def register_builtin_backends() -> None:
    """Register `torch` for every device, and `reference`, which only an explicit request takes."""
    kernels = {name: getattr(_torch_kernels, name) for name in (*FORWARD, *BACKWARD)}
    register_backend(Backend(name="torch", kernels=kernels, unavailable=lambda device: None))
    slow: dict[str, Kernel] = {name: getattr(reference, name) for name in FORWARD}
    slow["expert_up_backward"] = _derive(reference.expert_up, 0)
    slow["expert_down_backward"] = _derive(reference.expert_down, 1)
    slow["weighted_rows_backward"] = _derive(reference.weighted_rows, 0)
    register_backend(Backend(name="reference", kernels=slow, unavailable=lambda device: None, automatic=False))
