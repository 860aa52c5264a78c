"""The backends: `triton` for GPUs, `cpu` where there is a compiler, `torch` everywhere, `grouped_mm` and `reference` for
comparison.
"""

from __future__ import annotations

import torch

from sparseffn.ops import reference
from sparseffn.ops.backends import Backend, functions_of, register_backend
from sparseffn.ops.cpu import cpu_backend
from sparseffn.ops.grouped_mm import grouped_mm_backend
from sparseffn.ops.library import OPERATIONS
from sparseffn.ops.triton import triton_backend


def register_builtin_backends() -> None:
    """Register them in the order in which `auto` tries them; only an explicit request takes the last two."""
    slow = functions_of(reference)
    register_backend(triton_backend())
    register_backend(cpu_backend())
    compositions = {name: operation.eager for name, operation in OPERATIONS.items()}
    register_backend(Backend(name="torch", functions=compositions, unavailable=_always))
    register_backend(grouped_mm_backend())
    register_backend(Backend(name="reference", functions=slow, unavailable=_always, automatic=False))


def _always(device: torch.device, dtype: torch.dtype) -> None:
    """Nothing hinders them."""
