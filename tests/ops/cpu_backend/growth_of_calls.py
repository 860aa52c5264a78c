"""How far calls of `experts` raise the memory in use: `python growth_of_calls.py` prints a line for each.

`dtype layout tokens pass: bytes over those of the weights`, at the highest point, without what the call returns. Run it with
MALLOC_MMAP_THRESHOLD_=65536, so that memory once had is given back.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sparseffn import ops

D_MODEL, SIZE, N_EXPERTS, K = 256, 512, 128, 2


def highest(call: Callable[[], object]) -> int:
    """Bytes by which a call raises the memory in use, at its highest point."""

    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))

    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS:")
    call()
    return status("VmHWM:") - before


def halves_of(both: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """Keys and gate keys `[E, D, G]` of what is stored: `[E, D, 2 G]`, or `[E, 2 G, D]` as Hugging Face has it."""
    if layout == "out-in":
        first, second = ops.halves(both, dim=1)
        return first.transpose(1, 2), second.transpose(1, 2)
    return ops.halves(both, dim=2, interleaved=layout == "interleaved")


def measured(dtype: torch.dtype, layout: str, n_tokens: int) -> tuple[float, float]:
    """Growth of a forward and of a training step over the bytes of the weights."""
    stored = (N_EXPERTS, 2 * SIZE, D_MODEL) if layout == "out-in" else (N_EXPERTS, D_MODEL, 2 * SIZE)
    both, x = torch.randn(stored).to(dtype), torch.randn(n_tokens, D_MODEL).to(dtype)
    down = torch.randn(N_EXPERTS, *((D_MODEL, SIZE) if layout == "out-in" else (SIZE, D_MODEL))).to(dtype)
    indices, gates = torch.rand(n_tokens, N_EXPERTS).topk(K).indices, torch.rand(n_tokens, K)

    def forward() -> Tensor:
        keys, gate_keys = halves_of(both, layout)
        values = down.transpose(1, 2) if layout == "out-in" else down
        return ops.experts(x, keys, values, gates, indices, gate_keys=gate_keys, activation="silu")

    def step() -> object:
        return torch.autograd.grad(forward().sum(), (both, down))

    growths = []
    for call, trained in ((forward, False), (step, True)):
        for weight in (both, down):
            weight.requires_grad_(trained)
        call()
        growths.append(highest(call) / (both.nbytes + down.nbytes))
    # A step returns gradients of all weights.
    return growths[0], growths[1] - 1


def main() -> int:
    """All layouts, few tokens and many."""
    for dtype in (torch.float32, torch.bfloat16):
        for layout in ("in-out", "out-in", "interleaved"):
            for n_tokens in (4, 300):
                for name, growth in zip(("forward", "training"), measured(dtype, layout, n_tokens), strict=True):
                    sys.stdout.write(f"{dtype} {layout} {n_tokens} {name}: {growth:.3f}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
