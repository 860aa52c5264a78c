"""The operations as Triton kernels, for CUDA and ROCm devices: routers, experts and weighted value rows.

Nothing here imports `triton` before the first call, so that `import sparseffn` stays light and works without it:

    ops.experts(x.cuda(), keys.cuda(), values.cuda(), gates.cuda(), indices.cuda())

Kernels: `router.py` (logits, top-K, gates), `choice.py` (a row's K largest, survivors of an inner top-K), `sorting.py`
(selections by expert), `products.py` (rows times the matrix of their expert) with `units.py` (activations), `outer.py`
(gradients of the matrices), `sums.py` (sums of rows), `statistics_kernels.py` (counts, entropies). They are launched, through
`launch.py`, by `operations.py` and the files that it names.
Tile sizes: `tuning.py`. Registers and spills: `resources.py`. Shapes: see ops/README.md.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch

from sparseffn.ops.backends import Backend, Kernel
from sparseffn.ops.library import kernels_missing

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Those that PyTorch's dispatcher finds for tensors on a GPU.
REGISTERED = (
    "experts",
    "experts_kept",
    "experts_backward",
    "route",
    "route_kept",
    "route_backward",
    "router_logits",
    "router_logits_kept",
    "router_logits_backward",
    "choose",
    "choose_kept",
    "choose_backward",
    "sinkhorn",
    "over_capacity",
    "cvmm",
    "cvmm_kept",
    "cvmm_backward",
    "weighted_rows",
    "weighted_rows_kept",
    "weighted_rows_backward",
    "routing_counts",
    "topk",
    "batch_entropy",
    "batch_entropy_kept",
    "batch_entropy_backward",
    "switch_balance",
    "switch_balance_kept",
    "switch_balance_backward",
    "load_variation",
    "load_variation_kept",
    "load_variation_backward",
)


def is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def triton_backend() -> Backend:
    """The backend `triton`: automatic on GPUs.

    Kernels that TRITON_INTERPRET=1 interprets take tensors of the CPU, but from their tests alone, which call the functions of
    `operations.py`: the dispatcher finds the CPU's own kernels.
    """

    def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cuda":
            return "it needs a CUDA or ROCm device"
        if dtype not in DTYPES:
            return f"it computes in float32, bfloat16 and float16, not in {dtype}"
        if not is_installed():
            return "the package triton is not installed; `pip install triton` brings it"
        # Autograd and autocast of the operations are compiled, whatever computes them.
        reason = kernels_missing()
        return None if reason is None else f"it needs the compiled library: {reason}"

    return Backend(name="triton", unavailable=unavailable)


def lazily(name: str) -> Kernel:
    def call(*arguments: Any) -> Any:
        return getattr(importlib.import_module(f"{__name__}.operations"), name)(*arguments)

    call.__name__ = name
    return call
