"""Draw shapes, routings, dtypes and options without end and hold every compiled kernel against the truth.

    python tests/ops/cpu_backend/fuzz_kernels.py --minutes 10

Truth is the reference in float64, for large draws PyTorch's operations in float64, which the tests hold against it. In float64
a kernel must agree to rounding, in float32 and bfloat16 come as near as `ops/spec.py` says. Stops at the first disagreement and
prints the seed that repeats it: `--seed N --rounds 1`.
"""

from __future__ import annotations

import argparse
import ctypes
import random
import sys
import time
from collections.abc import Sequence

import torch
from sparseffn.ops.routed_mlp import gates_of
from torch import Tensor

from sparseffn import ops
from sparseffn.ops.backends import direct_kernel, kernel
from sparseffn.ops.cpu import build, kernels
from sparseffn.ops.spec import check_against_truth
from sparseffn.storage import default_cache_dir

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
INPUTS = ("x", "keys", "values", "gates")
# The reference takes some tenths of a second for so many selections, or products.
MOST_SELECTIONS, MOST_PRODUCTS = 150, 1_000_000
# A relative error says nothing of a few sums, all of which may happen to cancel: those are drawn in float64 alone.
FEWEST_SUMS = 16
# The relative bounds of ops/spec.py are for sums of fewer terms than this. A value row's gradient is one long sum, and so are
# an inner top-K's survivors where tokens are few, in these kernels and in PyTorch's: of 1,300 float32 terms both err by 5 to 6
# epsilons, of 900 by 4.0 and 4.6, where 4 are allowed.
MOST_TERMS = 300


def near(got: Tensor, wanted: Tensor) -> None:
    """To rounding, or exactly for integers."""
    torch.testing.assert_close(got, wanted, atol=1e-11, rtol=1e-11)


def hold(name: str, results: Sequence[Tensor], dtype: torch.dtype) -> None:
    """A kernel's result, plain PyTorch's and the truth, computed in a dtype: the first is right."""
    got, plain, truth = results
    if dtype == F64:
        near(got, truth)
    else:
        check_against_truth(name, got, plain, truth, dtype)


def numbers(*shape: int, coarse: bool = False, terms: int = 1) -> Tensor:
    """Values whose sums of so many products have unit scale, in float64.

    Coarse ones have 5 bits, so that sums of 300 products of two are exact in float32. No unit then lies on the other side of
    ReLU's edge, or of the K-th largest, by rounding alone; and ties are common.
    """
    values = torch.randn(*shape, dtype=F64)
    if not coarse:
        return values / terms**0.5
    # A factor of a power of two costs no bits.
    return (values * 4).round() / 4 / 2 ** round(torch.tensor(terms).log2().item() / 2)


def draw_dtype(draw: random.Random, sums: int, width: int) -> torch.dtype:
    """Float64 half of the time, and where there are few sums."""
    return draw.choice([F64, F64, F32, BF16]) if sums >= FEWEST_SUMS and width >= FEWEST_SUMS else F64


def truth_backend(selections: int, products: int) -> str:
    """The reference where it does not take long."""
    return "reference" if selections <= MOST_SELECTIONS and products <= MOST_PRODUCTS else "torch"


def expert_results(
    backend: str,
    inputs: list[Tensor],
    indices: Tensor,
    direction: Tensor,
    keep: Tensor | None,
    activation: str,
    inner_k: int | None,
) -> list[Tensor]:
    """Output and gradients of x, keys, values and gates."""
    scale = 1.0 if keep is None else 1.5
    if backend == "reference":
        leaves = [t.detach().requires_grad_() for t in inputs]
        run = direct_kernel("expert_mlp", backend)
        assert run is not None, "the reference differentiates itself"
        y = run(*leaves, indices, keep, scale, activation, inner_k)
        return [y.detach(), *torch.autograd.grad(y, leaves, direction)]
    name = "expert_mlp" if inner_k is None else "expert_mlp_inner"
    forward, backward = kernel(name, inputs[0], backend), kernel(f"{name}_backward", inputs[0], backend)
    if inner_k is None:
        y, *kept = forward(*inputs, indices, keep, scale, activation, save=True)
        return [y, *backward(direction, *inputs, *kept, keep, scale, activation)]
    y, *kept = forward(*inputs, indices, keep, scale, activation, inner_k)
    return [y, *backward(direction, *inputs, *kept, scale, activation)]


def experts(draw: random.Random) -> None:
    """The whole expert computation, forward and backward."""
    n_experts = draw.choice([1, 2, 5, 16, 40])
    k, size, width = draw.randint(1, n_experts), draw.randint(1, 150), draw.randint(1, 300)
    n_tokens = draw.choice([0, 1, 2, 7, 64, draw.randint(1, 900)])
    inner_k = draw.randint(1, k * size) if draw.random() < 0.4 else None
    sums = n_tokens * min(k, inner_k or k)
    dtype = draw_dtype(draw, sums, min(width, 2 * size)) if (inner_k or 0) <= MOST_TERMS else F64
    low = dtype != F64
    # Coarse coefficients stay exact through these alone.
    activation = draw.choice(["relu", "identity"] if low and inner_k else ["relu", "gelu", "silu", "identity"])
    coarse = low and (activation == "relu" or inner_k is not None)
    scores = torch.randn(n_tokens, n_experts) + draw.choice([0.0, 4.0]) * torch.randn(n_experts)
    indices = scores.topk(k, dim=1).indices
    gates = torch.rand(n_tokens, k, dtype=F64)
    inputs = [
        numbers(n_tokens, width, coarse=coarse).to(dtype),
        numbers(n_experts, width, size, coarse=coarse, terms=width).to(dtype),
        numbers(n_experts, size, width, terms=k * size).to(dtype),
        ((gates * 8).round() / 8 if coarse else gates).to(torch.promote_types(dtype, F32)),
    ]
    direction = numbers(n_tokens, width).to(dtype)
    keep = torch.rand(n_tokens, k, size) >= 0.3 if draw.random() < 0.3 else None
    judge = truth_backend(n_tokens * k, n_tokens * k * size * width)
    double = [t.double() for t in inputs]
    truth = expert_results(judge, double, indices, direction.double(), keep, activation, inner_k)
    plain = expert_results("torch", inputs, indices, direction, keep, activation, inner_k) if low else truth
    got = expert_results("cpu", inputs, indices, direction, keep, activation, inner_k)
    for name, *three in zip(("", *(f".{n}" for n in INPUTS)), got, plain, truth, strict=True):
        hold(f"expert_mlp{name}", three, dtype)


def routed(draw: random.Random) -> None:
    """Scores, selection, gates and experts in one call; equal scores are common."""
    n_experts = draw.choice([1, 2, 5, 16, 40, 130])
    k, size, width = draw.randint(1, n_experts), draw.randint(1, 60), draw.randint(1, 300)
    n_tokens = draw.choice([0, 1, 2, 7, 64, draw.randint(1, 500)])
    dtype = draw_dtype(draw, n_tokens * k, min(width, 2 * size))
    gate: ops.GateName = draw.choice(["sigmoid", "softmax", "renormalised"])
    activation = draw.choice(["relu", "gelu", "silu", "identity"])
    x, selector = numbers(n_tokens, width, coarse=True), numbers(n_experts, width, coarse=True, terms=width)
    keys = numbers(n_experts, width, size, coarse=activation == "relu", terms=width)
    inputs = [t.to(dtype) for t in (x, selector, keys, numbers(n_experts, size, width, terms=k * size))]
    judge = truth_backend(n_tokens * k, n_tokens * k * size * width)
    found = []
    for backend, cast in (("cpu", dtype), ("torch", dtype), (judge, F64)):
        found.append(ops.routed_mlp(*(t.to(cast) for t in inputs), k=k, gate=gate, activation=activation, backend=backend))
    got, plain, truth = found
    near(got[1], truth[1])
    hold("routed_mlp", [got[0], plain[0], truth[0]], dtype)
    hold("routed_mlp.gates", [got[2], plain[2], truth[2]], torch.promote_types(dtype, F32))


def training(draw: random.Random) -> None:
    """Router and experts of few tokens in one differentiable call, with gradients of logits and gates from elsewhere."""
    n_experts = draw.choice([2, 5, 16, 40, 130])
    k, size, width = draw.randint(2, n_experts), draw.randint(1, 60), draw.randint(1, 300)
    n_tokens = draw.choice([1, 2, 7, 64, draw.randint(1, 127)])
    dtype = F32 if draw.random() < 0.5 and n_tokens * k >= FEWEST_SUMS and width >= FEWEST_SUMS and size >= 8 else F64
    gate: ops.GateName = draw.choice(["sigmoid", "renormalised"])
    activation = draw.choice(["relu", "gelu", "silu", "identity"])
    shapes = ((n_tokens, width, 1), (n_experts, width, width))
    x, selector = (numbers(rows, columns, coarse=True, terms=terms) for rows, columns, terms in shapes)
    keys = numbers(n_experts, width, size, coarse=activation == "relu", terms=width)
    inputs = [x, selector, keys, numbers(n_experts, size, width, terms=k * size)]
    directions = [numbers(n_tokens, n) for n in (width, n_experts, k)]
    found = []
    for fused, cast in ((True, dtype), (False, dtype), (False, F64)):
        leaves = [t.to(cast).requires_grad_() for t in inputs]
        if fused:
            y, logits_TE, _, gates_TK = ops.routed_training(*leaves, k=k, gate=gate, activation=activation)
        else:
            logits_TE = leaves[0] @ leaves[1].T
            indices_TK = ops.topk(logits_TE, k, backend="torch")
            gates_TK = gates_of(gate, logits_TE, indices_TK)
            y = ops.expert_mlp(leaves[0], leaves[2], leaves[3], gates_TK, indices_TK, activation=activation, backend="torch")
        grads = torch.autograd.grad([y, logits_TE, gates_TK], leaves, [d.to(cast) for d in directions])
        found.append([y.detach(), *grads])
    names = ("routed_mlp", *(f"routed_training.{name}" for name in ("x", "selector", "keys", "values")))
    for name, *three in zip(names, *found, strict=True):
        hold(name, three, dtype)


def logits(draw: random.Random) -> None:
    """Scores of a router, which are computed in float32 or wider."""
    n_tokens, n_experts, width = draw.choice([0, 1, 7, draw.randint(1, 700)]), draw.randint(1, 200), draw.randint(1, 300)
    dtype = draw_dtype(draw, n_tokens * n_experts, width)
    x, selector = numbers(n_tokens, width).to(dtype), numbers(n_experts, width, terms=width).to(dtype)
    got, plain = (ops.router_logits(x, selector, backend=backend) for backend in ("cpu", "torch"))
    truth = ops.router_logits(x.double(), selector.double(), backend="reference")
    hold("router_logits", [got, plain, truth], torch.promote_types(dtype, F32))


def rows(draw: random.Random) -> None:
    """Weighted value rows and their gradients."""
    n_values, width, k = draw.choice([1, 3, 50, 2000]), draw.randint(1, 200), draw.randint(1, 60)
    n_tokens = draw.choice([0, 1, 5, 130, draw.randint(1, 600)])
    # Pairs of one token and one value row have one gradient.
    sums = n_tokens * min(k, n_values)
    dtype = draw_dtype(draw, sums, width) if n_tokens * k <= MOST_TERMS * n_values else F64
    values, weights = numbers(n_values, width).to(dtype), numbers(n_tokens, k).to(dtype)
    indices, grad = torch.randint(n_values, (n_tokens, k)), numbers(n_tokens, width).to(dtype)
    leaves = [values.double().requires_grad_(), weights.double().requires_grad_()]
    y = ops.weighted_rows(leaves[0], indices, leaves[1], backend="reference")
    truth, found = [y.detach(), *torch.autograd.grad(y, leaves, grad.double())], []
    for backend in ("cpu", "torch"):
        y = kernel("weighted_rows", values, backend)(values, indices, weights)
        found.append([y, *kernel("weighted_rows_backward", values, backend)(grad, values, indices, weights)])
    for name, *three in zip(("", ".values", ".weights"), *found, truth, strict=True):
        hold(f"weighted_rows{name}", three, dtype)


def selection(draw: random.Random) -> None:
    """Top-K and product-key top-K, with ties."""
    n, n_b, n_rows = draw.randint(1, 700), draw.randint(1, 90), draw.randint(0, 40)
    scores = torch.randn(n_rows, n)
    scores = (scores * draw.choice([1, 3])).round() if draw.random() < 0.5 else scores
    scores, k = scores.to(draw.choice([F32, F64, BF16])), draw.randint(1, n)
    near(ops.topk(scores, k, backend="cpu"), (scores + 0.0).sort(dim=-1, descending=True, stable=True).indices[:, :k])
    a, b = torch.randn(n_rows, min(n, 90)), torch.randn(n_rows, n_b)
    k = draw.randint(1, min(a.shape[1] * n_b, 300))
    near(*(ops.product_key_topk(a, b, k, backend=backend)[0] for backend in ("cpu", "torch")))


def assignment(draw: random.Random) -> None:
    """Balanced assignment: as good a total, balanced loads."""
    scores = torch.randn(draw.randint(0, 300), draw.randint(1, 20), dtype=F64)
    scores = scores.round() if draw.random() < 0.5 else scores
    totals = []
    for backend in ("cpu", "torch"):
        assigned = ops.balanced_assignment(scores, backend=backend)
        loads = assigned.bincount(minlength=scores.shape[1])
        low = scores.shape[0] // scores.shape[1]
        if int(loads.min()) < low or int(loads.max()) > low + 1:
            raise AssertionError(f"{backend}: loads {loads.tolist()} are not balanced")
        totals.append(scores.gather(1, assigned[:, None]).sum())
    near(*totals)


KERNELS = (experts, routed, training, logits, rows, selection, assignment)


def poison() -> None:
    """From here on the kernels' scratch memory holds NaN where nothing was written."""
    path = build.compile_library(default_cache_dir() / "kernels", flags=[*build.FLAGS, "-DSPARSEFFN_POISON"])
    library = ctypes.CDLL(str(path))
    kernels.library = lambda: library


def main() -> int:
    """Fuzz until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long")
    parser.add_argument("--rounds", type=int, help="how many rounds instead")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the first round")
    parser.add_argument("--poison", action="store_true", help="fill scratch memory with NaN first")
    options = parser.parse_args()
    if options.poison:
        poison()
    end, seed = time.monotonic() + 60 * options.minutes, options.seed
    while seed - options.seed < options.rounds if options.rounds is not None else time.monotonic() < end:
        for check in KERNELS:
            torch.manual_seed(seed)
            try:
                check(random.Random(seed))
            except Exception:
                command = "tests/ops/cpu_backend/fuzz_kernels.py --rounds 1 --seed"
                sys.stderr.write(f"{check.__name__} fails: python {command} {seed}\n")
                raise
        seed += 1
    sys.stdout.write(f"{seed - options.seed:,} rounds of {len(KERNELS)} kernels from seed {options.seed}: nothing found\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
