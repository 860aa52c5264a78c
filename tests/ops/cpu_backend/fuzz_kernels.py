"""Draw shapes, routings, dtypes and options without end and hold every compiled kernel against the truth.

    python tests/ops/cpu_backend/fuzz_kernels.py --minutes 10

Truth is the reference in float64, for large draws PyTorch's operations in float64, which the tests hold against it. In float64
a kernel must agree to rounding, in float32 and bfloat16 come as near as `ops/spec.py` says. Stops at the first disagreement and
prints the seed that repeats it: `--seed N --rounds 1`.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from block_draws import product_key_block, topk_block
from expert_cases import DTYPES, LAYOUTS, NAMES, UNITS, Case, Options, Problem, verify
from torch import Tensor
from variants import compile_variant, kernel_files, run_with

from sparseffn import ops
from sparseffn.ops.cpu import build
from sparseffn.ops.route import GATES
from sparseffn.ops.spec import check_against_truth

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
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
    return (values * 4).round() / 4 / 2 ** round(math.log2(terms) / 2)


def draw_dtype(draw: random.Random, sums: int, width: int) -> torch.dtype:
    """Float64 half of the time, and where there are few sums."""
    return draw.choice([F64, F64, F32, F32, BF16, BF16, F16]) if sums >= FEWEST_SUMS and width >= FEWEST_SUMS else F64


def truth_backend(selections: int, products: int) -> str:
    """The reference where it does not take long."""
    return "reference" if selections <= MOST_SELECTIONS and products <= MOST_PRODUCTS else "torch"


def coarse(problem: Problem) -> None:
    """See `numbers`; the products of the keys stay exact, so that rounding opens no unit and chooses no other."""
    given = problem.inputs
    for name in given.keys() & {"x", "keys", "gate_keys", "key_bias", "gate_bias"}:
        terms = given[name].shape[1] if "keys" in name else 1
        given[name].copy_((given[name].double() * 4 * terms**0.5).round() / 4 / 2 ** round(math.log2(terms) / 2))
    given["gates"].copy_((given["gates"] * 8).round() / 8)


def experts(draw: random.Random) -> None:
    """The whole expert computation, forward and backward: any sizes, layout, units, routing, dtype."""
    n_experts = draw.choice([1, 2, 5, 16, 40])
    k, size, width = draw.randint(1, n_experts), draw.randint(1, 150), draw.randint(1, 300)
    n_tokens = draw.choice([0, 1, 2, 7, 64, draw.randint(1, 900)])
    inner_k = draw.randint(1, k * size) if draw.random() < 0.4 else None
    sums = n_tokens * min(k, inner_k or k)
    dtype = draw_dtype(draw, sums, min(width, 2 * size)) if (inner_k or 0) <= MOST_TERMS else F64
    activation, gated = draw.choice(UNITS)
    biased, dropout = draw.random() < 0.4, draw.random() < 0.3
    if dtype != F64 and (inner_k or activation == "clamped_swiglu"):
        # Coarse coefficients stay exact through these alone; and a clamp has an edge.
        activation, gated = draw.choice(["relu", "identity"]), False
    # A sum over an expert's rows is one long sum, and what a bias adds hides how its terms cancel.
    biased = biased and (dtype == F64 or n_tokens * k <= MOST_TERMS)
    routing = draw.choice(["random", "hot", "few", "twice"])
    case = Case(n_tokens, width, n_experts, size, k, routing)
    problem = case.draw(Options(draw.choice(list(LAYOUTS)), activation, gated, biased, dropout, inner_k), dtype)
    if dtype != F64 and (activation in ("relu", "relu2") or inner_k):
        coarse(problem)
    judge = truth_backend(n_tokens * k, n_tokens * k * size * width)
    truth, got = problem.results(judge, F64), problem.results("cpu")
    plain = truth if dtype == F64 else problem.results("torch")
    for name, wanted in truth.items():
        hold("experts" if name not in NAMES else f"experts.{name}", [got[name], plain[name], wanted], dtype)


def routes(draw: random.Random) -> None:
    """Scores, selection and gates, with gradients through logits and gates; equal scores are common."""
    n_experts, width = draw.choice([1, 2, 5, 16, 40, 130]), draw.randint(1, 300)
    k, n_tokens = draw.randint(1, n_experts), draw.choice([0, 1, 2, 7, 64, draw.randint(1, 500)])
    dtype = draw_dtype(draw, n_tokens * k, min(width, 2 * n_experts))
    gate: ops.GateName = draw.choice(GATES)
    x, selector = numbers(n_tokens, width, coarse=True), numbers(n_experts, width, coarse=True, terms=width)
    directions = [numbers(n_tokens, n) for n in (n_experts, k)]
    keep = torch.rand(n_tokens, n_experts) >= draw.choice([0.1, 0.5, 0.9]) if draw.random() < 0.5 else None
    found = []
    for backend, cast in (("cpu", dtype), ("torch", dtype), ("reference", F64)):
        leaves = [t.to(cast).requires_grad_() for t in (x, selector)]
        logits, indices, gates = ops.route(*leaves, k=k, gate=gate, keep=keep, backend=backend)
        grads = torch.autograd.grad([logits, gates], leaves, [d.to(logits.dtype) for d in directions])
        found.append([indices, logits.detach(), gates.detach(), *grads])
    near(found[0][0], found[2][0])
    for i, name in enumerate(("route", "route.gates", "route.x", "route.selector"), start=1):
        wide = torch.promote_types(dtype, F32) if i < 3 else dtype
        hold(name, [results[i] for results in found], wide)


def logits(draw: random.Random) -> None:
    """Scores of a router, which are computed in float32 or wider, and their gradients."""
    n_tokens, n_experts, width = draw.choice([0, 1, 7, draw.randint(1, 700)]), draw.randint(1, 200), draw.randint(1, 300)
    # The selector's gradient is one sum over the tokens, that of x one over the experts.
    few = min(width, 2 * n_experts) if n_tokens <= MOST_TERMS else 0
    dtype = draw_dtype(draw, n_tokens * n_experts, few)
    x, selector = numbers(n_tokens, width).to(dtype), numbers(n_experts, width, terms=width).to(dtype)
    direction, found = numbers(n_tokens, n_experts).float(), []
    for backend, cast in (("cpu", dtype), ("torch", dtype), ("reference", F64)):
        leaves = [t.to(cast).requires_grad_() for t in (x, selector)]
        y = ops.router_logits(*leaves, backend=backend)
        found.append([y.detach(), *torch.autograd.grad(y, leaves, direction.to(y.dtype))])
    # The gradients are those of `route`.
    for name, *three in zip(("router_logits", "route.x", "route.selector"), *found, strict=True):
        hold(name, three, torch.promote_types(dtype, F32) if name == "router_logits" else dtype)


def rows(draw: random.Random) -> None:
    """Weighted value rows and their gradients."""
    n_values, width, k = draw.choice([1, 3, 50, 2000]), draw.randint(1, 200), draw.randint(1, 60)
    n_tokens = draw.choice([0, 1, 5, 130, draw.randint(1, 600)])
    # Pairs of one token and one value row have one gradient.
    sums = n_tokens * min(k, n_values)
    dtype = draw_dtype(draw, sums, width) if n_tokens * k <= MOST_TERMS * n_values else F64
    values, weights = numbers(n_values, width).to(dtype), numbers(n_tokens, k).to(dtype)
    indices, grad, found = torch.randint(n_values, (n_tokens, k)), numbers(n_tokens, width).to(dtype), []
    for backend, cast in (("cpu", dtype), ("torch", dtype), ("reference", F64)):
        leaves = [t.detach().to(cast).requires_grad_() for t in (values, weights)]
        y = ops.weighted_rows(leaves[0], indices, leaves[1], backend=backend)
        found.append([y.detach(), *torch.autograd.grad(y, leaves, grad.to(cast))])
    for name, *three in zip(("", ".values", ".weights"), *found, strict=True):
        hold(f"weighted_rows{name}", three, dtype)


def selection(draw: random.Random) -> None:
    """Top-K and product-key top-K, with ties."""
    n, n_b, n_rows = draw.randint(1, 700), draw.randint(1, 90), draw.randint(0, 40)
    scores = torch.randn(n_rows, n)
    scores = (scores * draw.choice([1, 3])).round() if draw.random() < 0.5 else scores
    scores, k = scores.to(draw.choice(DTYPES)), draw.randint(1, n)
    near(ops.topk(scores, k, backend="cpu"), (scores + 0.0).sort(dim=-1, descending=True, stable=True).indices[:, :k])
    halves = [torch.randn(n_rows, min(n, 90)), torch.randn(n_rows, n_b)]
    if draw.random() < 0.5:
        halves = [half.round() for half in halves]
    dtype, k = draw.choice(DTYPES), draw.randint(1, min(halves[0].shape[1] * n_b, 300))
    a, b = (half.to(dtype).requires_grad_() for half in halves)
    direction = numbers(n_rows, k).to(dtype)
    sums, indices = ops.product_key_topk(a, b, k, backend="cpu")
    near(sums.detach(), ops.product_key_topk(a, b, k, backend="torch")[0].detach())
    # Which of equal sums is taken is the kernel's to say; its gradients are those of what it took.
    i_a, i_b = indices % a.shape[1], indices // a.shape[1]
    near(sums.detach(), a.detach().gather(1, i_a) + b.detach().gather(1, i_b))
    for got, place, half in zip(torch.autograd.grad(sums, (a, b), direction), (i_a, i_b), (a, b), strict=True):
        wide = torch.zeros(half.shape, dtype=F64).scatter_add(1, place, direction.double())
        most = torch.zeros(half.shape, dtype=F64).scatter_add(1, place, direction.double().abs())
        n_terms = torch.zeros(half.shape, dtype=F64).scatter_add(1, place, torch.ones_like(wide[:, :1]).expand(place.shape))
        if bool(((got.double() - wide).abs() > torch.finfo(dtype).eps * most * n_terms).any()):
            raise AssertionError("a gradient of product-key sums is not that of what was chosen")


def assignment(draw: random.Random) -> None:
    """Balanced assignment: as good a total, balanced loads."""
    scores = torch.randn(draw.randint(0, 300), draw.randint(1, 20), dtype=F64)
    scores = (scores.round() if draw.random() < 0.5 else scores).to(draw.choice(DTYPES))
    totals = []
    for backend in ("cpu", "torch"):
        assigned = ops.balanced_assignment(scores, backend=backend)
        loads = assigned.bincount(minlength=scores.shape[1])
        low = scores.shape[0] // scores.shape[1]
        if int(loads.min()) < low or int(loads.max()) > low + 1:
            raise AssertionError(f"{backend}: loads {loads.tolist()} are not balanced")
        totals.append(scores.double().gather(1, assigned[:, None]).sum())
    near(*totals)


def joint_halves(draw: random.Random) -> None:
    """Keys and gate keys as halves of one tensor, whose gradient is written into one, and some of the gradients alone."""
    n_experts, size, width = draw.choice([1, 2, 5, 16]), draw.randint(1, 90), draw.randint(1, 120)
    k, n_tokens = draw.randint(1, n_experts), draw.choice([0, 1, 2, 7, 64, draw.randint(1, 500)])
    turned, interleaved, dtype = draw.random() < 0.5, draw.random() < 0.5, draw.choice(DTYPES)
    dim = draw.choice([1, -2]) if turned else draw.choice([2, -1])
    inner_k = draw.randint(1, k * size) if draw.random() < 0.3 else None
    activation = draw.choice([name for name, gated in UNITS if gated])
    indices, wide = Case(n_tokens, width, n_experts, size, k).indices(), torch.promote_types(dtype, F32)
    both = numbers(n_experts, *((2 * size, width) if turned else (width, 2 * size)), terms=width)
    inputs = {"both": both, "values": numbers(n_experts, size, width, terms=k * size), "x": numbers(n_tokens, width)}
    if draw.random() < 0.4:
        inputs |= {"key_bias": numbers(n_experts, size), "value_bias": numbers(n_experts, width)}
    inputs = {name: t.to(dtype) for name, t in inputs.items()} | {"gates": torch.rand(n_tokens, k).to(wide)}
    direction = numbers(n_tokens, width).to(dtype)

    def gradients(wanted: Sequence[str], *, views: bool = False, backend: str = "cpu") -> list[Tensor]:
        leaves = {name: t.detach().requires_grad_(name in wanted) for name, t in inputs.items()}
        both = leaves["both"]
        if not views:
            pair = ops.halves(both, dim=dim, interleaved=interleaved)
        else:
            pair = both.unflatten(dim % 3, (-1, 2)).unbind(dim % 3 + 1) if interleaved else both.chunk(2, dim)
        keys, gate_keys = (half.mT if turned else half for half in pair)
        given = {name: leaves[name] for name in ("key_bias", "value_bias") if name in leaves}
        y = ops.experts(
            leaves["x"], keys, leaves["values"], leaves["gates"], indices,
            gate_keys=gate_keys, activation=activation, inner_k=inner_k, backend=backend, **given,
        )  # fmt: skip
        return list(torch.autograd.grad(y, [leaves[name] for name in wanted], direction))

    names = tuple(inputs)
    whole = gradients(names)
    chosen = [name for name in names if draw.random() < 0.5] or [draw.choice(names)]
    for how, wanted, got in (("of views", names, gradients(names, views=True)), ("alone", chosen, gradients(chosen))):
        for name, grad in zip(wanted, got, strict=True):
            if not torch.equal(grad, whole[names.index(name)]):
                raise AssertionError(f"the gradient of {name} {how} has other bits; {chosen} were wanted")
    if dtype == F64:
        for got, wanted in zip(whole, gradients(names, views=True, backend="torch"), strict=True):
            near(got, wanted)


def deep_experts(draw: random.Random) -> None:
    """Many bfloat16 rows of experts so large that weights are read in pieces, for several panels at a time."""
    n_experts = draw.randint(1, 3)
    k = draw.randint(1, n_experts)
    n_tokens = draw.randint(24 * n_experts // k + 1, 150)
    case = Case(n_tokens, draw.randint(200, 600), n_experts, draw.randint(257, 600), k, draw.choice(["random", "hot", "few"]))
    verify(case, BF16, Options(draw.choice(list(LAYOUTS)), "silu", gated=draw.random() < 0.5))


KERNELS = (experts, routes, logits, rows, selection, assignment, joint_halves, topk_block, product_key_block, deep_experts)


def poisoned(arguments: list[str]) -> int:
    """The same in a process whose kernels find NaN in scratch memory where nothing was written."""
    with tempfile.TemporaryDirectory() as folder:
        library = compile_variant(Path(folder) / "poisoned", kernel_files(), [*build.FLAGS, "-DSPARSEFFN_POISON"])
        done = run_with(library, __file__, *arguments, timeout=None)
    sys.stdout.write(done.stdout)
    sys.stderr.write(done.stderr)
    return done.returncode


def main() -> int:
    """Fuzz until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long")
    parser.add_argument("--rounds", type=int, help="how many rounds instead")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the first round")
    parser.add_argument("--poison", action="store_true", help="fill scratch memory with NaN first")
    options = parser.parse_args()
    if options.poison:
        return poisoned([argument for argument in sys.argv[1:] if argument != "--poison"])
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
