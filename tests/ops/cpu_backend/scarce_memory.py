"""Call the CPU's kernels while the process may take only a little more memory: `python scarce_memory.py`.

Memory that a kernel cannot get must become an error: a C++ exception that leaves a thread of OpenMP ends the process. Run it
with MALLOC_MMAP_THRESHOLD_=65536, so that memory once had is given back. `python scarce_memory.py once` calls each a single
time, with all the memory that there is.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from sparseffn import ops

N_TOKENS, D_MODEL, N_EXPERTS, SIZE, K = 700, 512, 16, 300, 4
# MiB beyond what the process has; results and scratch memory need more than the first and less than the last.
HEADROOM = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 512)


def problems(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Every operation with large scratch memory."""
    torch.manual_seed(0)
    x = torch.randn(N_TOKENS, D_MODEL, dtype=dtype, requires_grad=True)
    keys = torch.randn(N_EXPERTS, D_MODEL, SIZE, dtype=dtype, requires_grad=True)
    values = torch.randn(N_EXPERTS, SIZE, D_MODEL, dtype=dtype, requires_grad=True)
    selector = torch.randn(N_EXPERTS, D_MODEL, dtype=dtype, requires_grad=True)
    indices = torch.rand(N_TOKENS, N_EXPERTS).topk(K).indices
    gates = torch.rand(N_TOKENS, K, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
    rows = torch.randn(2048, D_MODEL, dtype=dtype, requires_grad=True)
    half_keys = torch.randn(2, 64, D_MODEL // 2, dtype=dtype, requires_grad=True)
    table = torch.randn(64 * 64, D_MODEL, dtype=dtype, requires_grad=True)
    yield "route", lambda: ops.route(x, selector, k=K, gate="softmax")[2]
    yield "experts", lambda: ops.experts(x, keys, values, gates, indices)
    yield "gated experts", lambda: ops.experts(x, keys, values, gates, indices, gate_keys=keys, activation="silu")
    yield "inner top-k", lambda: ops.experts(x, keys, values, gates, indices, inner_k=300)
    yield "topk_rows", lambda: ops.topk_rows(x, rows, rows, k=500)[0]
    yield "product_key_rows", lambda: ops.product_key_rows(x, half_keys, half_keys, table, k=64, activation="relu")[0]
    yield "weighted_rows", lambda: ops.weighted_rows(rows, indices, gates)
    # What sorts many needs memory for it.
    many = torch.randn(400, D_MODEL, dtype=dtype, requires_grad=True)
    wide = torch.randn(N_TOKENS, 400, dtype=gates.dtype, requires_grad=True)
    yield "route to many", lambda: ops.route(x, many, k=30, gate="softmax")[2]
    yield "router_logits", lambda: ops.router_logits(x, many)
    yield "topk", lambda: wide.gather(1, ops.topk(wide, 100))
    yield "product_key_topk", lambda: ops.product_key_topk(wide, wide.flip(1), 200)[0]
    yield "balanced_assignment", lambda: wide[:, :7] * ops.balanced_assignment(wide.detach()[:, :7].double())[:, None]


def steps(compute: Callable[[], Tensor]) -> Iterator[Callable[[], object]]:
    """In evaluation, forward and backward."""
    yield lambda: torch.no_grad()(compute)()
    yield lambda: compute().float().sum().backward()


def with_headroom(mib: int, call: Callable[[], object]) -> bool:
    """Whether the call got the memory it wanted."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (mib << 20), before[1]))
    try:
        call()
    except (RuntimeError, MemoryError):
        return False
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    return True


def once() -> int:
    """Every operation in every dtype, by a team of threads."""
    torch.set_num_threads(2)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for name, compute in problems(dtype):
            for call in steps(compute):
                call()
            sys.stdout.write(f"{name} {dtype}\n")
    return 0


def main() -> int:
    """Every operation with every headroom; the last must do."""
    refused = 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for name, compute in problems(dtype):
            for i, call in enumerate(steps(compute)):
                # The first call of anything takes memory that is not given back: threads, their stacks and variables.
                call()
                for mib in HEADROOM:
                    sys.stdout.write(f"{name} {dtype} {('evaluation', 'training')[i]}, {mib} MiB\n")
                    sys.stdout.flush()
                    done = with_headroom(mib, call)
                    refused += not done
                assert done, "memory that is there is not found"
    assert refused > 0, "every call had all the memory it wanted"
    sys.stdout.write(f"{refused} refused\n")
    return 0


if __name__ == "__main__":
    sys.exit(once() if sys.argv[1:] == ["once"] else main())
