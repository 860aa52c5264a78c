"""Draw shapes, routings and options without end and hold every compiled kernel against PyTorch's, in float64.

    python tools/fuzz_kernels.py --minutes 10

Stops at the first disagreement and prints the seed that repeats it: `--seed N --rounds 1`.
"""

from __future__ import annotations

import argparse
import random
import sys
import time

import torch
from torch import Tensor

from sparseffn import ops
from sparseffn.ops.backends import kernel

F64 = torch.float64
BACKENDS = ("cpu", "torch")


def near(got: Tensor, wanted: Tensor) -> None:
    """To rounding, or exactly for integers."""
    torch.testing.assert_close(got, wanted, atol=1e-11, rtol=1e-11)


def experts(draw: random.Random) -> None:
    """The whole expert computation, forward and backward."""
    n_experts = draw.choice([1, 2, 5, 16, 40])
    k, size, width = draw.randint(1, n_experts), draw.randint(1, 150), draw.randint(1, 300)
    n_tokens = draw.choice([0, 1, 2, 7, 64, draw.randint(1, 900)])
    scores = torch.randn(n_tokens, n_experts) + draw.choice([0.0, 4.0]) * torch.randn(n_experts)
    indices = scores.topk(k, dim=1).indices
    x, direction = torch.randn(n_tokens, width, dtype=F64), torch.randn(n_tokens, width, dtype=F64)
    keys, values = torch.randn(n_experts, width, size, dtype=F64), torch.randn(n_experts, size, width, dtype=F64)
    gates = torch.rand(n_tokens, k, dtype=F64)
    keep = torch.rand(n_tokens, k, size) >= 0.3 if draw.random() < 0.3 else None
    activation = draw.choice(["relu", "gelu", "silu", "identity"])
    inner_k = draw.randint(1, k * size) if draw.random() < 0.4 else None
    found = []
    for backend in BACKENDS:
        name = "expert_mlp" if inner_k is None else "expert_mlp_inner"
        forward, backward = kernel(name, x, backend), kernel(f"{name}_backward", x, backend)
        if inner_k is None:
            y, *kept = forward(x, keys, values, gates, indices, keep, 1.5, activation, save=True)
            grads = backward(direction, x, keys, values, gates, *kept, keep, 1.5, activation)
        else:
            y, *kept = forward(x, keys, values, gates, indices, keep, 1.5, activation, inner_k)
            grads = backward(direction, x, keys, values, gates, *kept, 1.5, activation)
        found.append([y, *grads])
    scale = max(1.0, float(found[1][0].abs().max()) if n_tokens else 1.0)
    for got, wanted in zip(*found, strict=True):
        near(got / scale, wanted / scale)


def rows(draw: random.Random) -> None:
    """Weighted value rows and their gradients."""
    n_values, width, k = draw.choice([1, 3, 50, 2000]), draw.randint(1, 200), draw.randint(1, 60)
    n_tokens = draw.choice([0, 1, 5, 130, draw.randint(1, 600)])
    values, weights = torch.randn(n_values, width, dtype=F64), torch.randn(n_tokens, k, dtype=F64)
    indices, grad = torch.randint(n_values, (n_tokens, k)), torch.randn(n_tokens, width, dtype=F64)
    found = []
    for backend in BACKENDS:
        y = kernel("weighted_rows", values, backend)(values, indices, weights)
        found.append([y, *kernel("weighted_rows_backward", values, backend)(grad, values, indices, weights)])
    for got, wanted in zip(*found, strict=True):
        near(got, wanted)


def selection(draw: random.Random) -> None:
    """Top-K and product-key top-K, with ties."""
    n, n_b, n_rows = draw.randint(1, 700), draw.randint(1, 90), draw.randint(0, 40)
    scores = torch.randn(n_rows, n)
    scores = (scores * draw.choice([1, 3])).round() if draw.random() < 0.5 else scores
    k = draw.randint(0, n)
    near(ops.topk(scores, k, backend="cpu"), (scores + 0.0).sort(dim=-1, descending=True, stable=True).indices[:, :k])
    a, b = torch.randn(n_rows, min(n, 90)), torch.randn(n_rows, n_b)
    k = draw.randint(1, min(a.shape[1] * n_b, 300))
    near(*(ops.product_key_topk(a, b, k, backend=backend)[0] for backend in BACKENDS))


def assignment(draw: random.Random) -> None:
    """Balanced assignment: as good a total, balanced loads."""
    scores = torch.randn(draw.randint(0, 300), draw.randint(1, 20), dtype=F64)
    scores = scores.round() if draw.random() < 0.5 else scores
    totals = []
    for backend in BACKENDS:
        assigned = ops.balanced_assignment(scores, backend=backend)
        loads = assigned.bincount(minlength=scores.shape[1])
        low = scores.shape[0] // scores.shape[1]
        if int(loads.min()) < low or int(loads.max()) > low + 1:
            raise AssertionError(f"{backend}: loads {loads.tolist()} are not balanced")
        totals.append(scores.gather(1, assigned[:, None]).sum())
    near(*totals)


KERNELS = (experts, rows, selection, assignment)


def main() -> int:
    """Fuzz until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long")
    parser.add_argument("--rounds", type=int, help="how many rounds instead")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the first round")
    options = parser.parse_args()
    end, seed = time.monotonic() + 60 * options.minutes, options.seed
    while seed - options.seed < options.rounds if options.rounds is not None else time.monotonic() < end:
        for check in KERNELS:
            torch.manual_seed(seed)
            try:
                check(random.Random(seed))
            except Exception:
                sys.stderr.write(f"{check.__name__} fails: python tools/fuzz_kernels.py --seed {seed} --rounds 1\n")
                raise
        seed += 1
    sys.stdout.write(f"{seed - options.seed:,} rounds of {len(KERNELS)} kernels from seed {options.seed}: nothing found\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
