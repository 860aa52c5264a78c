"""Is one checkout as fast as another? `tools/same_speed.py OLD NEW` times every operation of the CPU in each.

A change of one kernel can slow another that shares a file with it. Processes of both checkouts alternate; within each, calls
of an operation take turns with a product of PyTorch's, by whose time theirs is divided, as a shared machine's speed drifts.
Nothing else should run; about eight minutes on 2 cores, and as long again for what seems slower. Exit code 1: something takes
longer by more than `--allowed`, twice. One checkout against itself (`OLD OLD`) shows what is noise.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

Call = Callable[[], object]
Times = dict[str, tuple[float, float]]
"""Microseconds of each call, and over the product that takes turns with it."""

WARMUP, CALLS, LEAST_CALLS = 3, 24, 5
SECONDS = 1.5
"""What has taken so long ends with fewer calls."""
# More than a cache holds.
FLUSHED_BYTES = 64 << 20


def counted(n: int) -> str:
    """So many tokens."""
    return "1 token" if n == 1 else f"{n:,} tokens"


def expert_calls(
    name: str, sizes: tuple[int, int, int, int], dtype: torch.dtype, tokens: list[int], *, gated: bool
) -> Iterator[tuple[str, Call]]:
    """Of experts `D x G x E x K`: plain ones as they are trained here, gated ones `[E, out, in]` as in Hugging Face."""
    from sparseffn import ops

    d, g, e, k = sizes
    if gated:
        both = (torch.randn(e, 2 * g, d) / d**0.5).to(dtype).requires_grad_()
        stored = (torch.randn(e, d, g) / g**0.5).to(dtype).requires_grad_()
        (keys, gate_keys), values, leaves = both.mT.chunk(2, dim=2), stored.mT, [both, stored]
    else:
        keys, values = ((torch.randn(shape) / 20).to(dtype).requires_grad_() for shape in ((e, d, g), (e, g, d)))
        gate_keys, leaves = None, [keys, values]
    for n in tokens:
        x, gates = torch.randn(n, d).to(dtype), torch.rand(n, k)
        indices, direction = torch.rand(n, e).topk(k, dim=1).indices, torch.randn(n, d).to(dtype)

        def forward(x: Tensor = x, gates: Tensor = gates, indices: Tensor = indices) -> Tensor:
            return ops.experts(x, keys, values, gates, indices, activation="silu", gate_keys=gate_keys)

        def backward(forward: Callable[[], Tensor] = forward, direction: Tensor = direction) -> object:
            return torch.autograd.grad(forward(), leaves, direction)

        yield f"experts {name}, {counted(n)}{', cold' if n <= 64 else ''}", forward
        if n >= 64:
            yield f"experts {name}, {counted(n)}, forward + backward", backward


def row_calls(dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    """Blocks of single pairs, and what they are made of."""
    from sparseffn import ops

    name = str(dtype).removeprefix("torch.")
    keys, values = (torch.randn(2053, 412) / 20).to(dtype), (torch.randn(2053, 412) / 20).to(dtype)
    keys_a, keys_b = ((torch.randn(4, 62, 206) / 14).to(dtype) for _ in range(2))
    many = (torch.randn(62 * 62, 412) / 60).to(dtype)
    for n in (16, 256, 1024):
        x = torch.randn(n, 412).to(dtype)
        yield f"topk_rows {name}, {counted(n)}", lambda x=x: ops.topk_rows(x, keys, values, k=512)
        yield f"product_key_rows {name}, {counted(n)}", lambda x=x: ops.product_key_rows(x, keys_a, keys_b, many, k=32)
    indices, weights = torch.randint(2053, (1024, 128)), torch.rand(1024, 128)
    yield f"weighted_rows {name}, 1,024 tokens", lambda: ops.weighted_rows(values, indices, weights)


def routing_calls() -> Iterator[tuple[str, Call]]:
    """Routers, choices and balancing."""
    from sparseffn import ops

    selector = torch.randn(16, 412) / 20
    for n in (16, 256, 4096):
        x = torch.randn(n, 412)
        yield f"route, {counted(n)}", lambda x=x: ops.route(x, selector, k=4, gate="sigmoid")
    scores = torch.randn(1024, 2053)
    yield "topk, 1,024 rows", lambda: ops.topk(scores, 512)
    logits = torch.randn(4096, 16)
    mask, indices, weights = torch.rand(4096) > 0.1, logits.topk(2, dim=1).indices, torch.rand(4096, 2)
    yield "choose, 4,096 tokens", lambda: ops.choose(logits, k=2, gate="renormalised")
    yield "sinkhorn, 4,096 tokens", lambda: ops.sinkhorn(logits, mask)
    yield "balanced_assignment, 512 tokens", lambda: ops.balanced_assignment(logits[:512])
    yield "over_capacity, 4,096 tokens", lambda: ops.over_capacity(indices, weights, n_experts=16, factor=1.0)
    yield "routing_counts, 4,096 tokens", lambda: ops.routing_counts(indices, weights, 16)
    x, experts, matrices = torch.randn(4096, 412), indices[:, 0].contiguous(), torch.randn(16, 412, 128) / 20
    yield "cvmm, 4,096 rows", lambda: ops.cvmm(x, experts, matrices)


def layer_calls() -> Iterator[tuple[str, Call]]:
    """One token of a whole layer, where calling is what costs, and steps of training."""
    from sparseffn.ffn.sigma_moe import SigmaMoEConfig

    layer = SigmaMoEConfig(d_model=412, n_experts=16, expert_size=128, k=4).build()
    one, many = torch.randn(1, 412), torch.randn(1024, 412)
    yield "sigma-moe, 1 token", lambda: layer(one)

    def step(x: Tensor) -> None:
        layer(x).sum().backward()
        layer.zero_grad(set_to_none=True)

    yield "sigma-moe, 1 token, forward + backward", lambda: step(one)
    yield "sigma-moe, 1,024 tokens, forward + backward", lambda: step(many)


def all_calls() -> Iterator[tuple[str, Call]]:
    """Every operation; a name that ends in "cold" is of weights that come from memory."""
    single, half = torch.float32, torch.bfloat16
    yield from expert_calls("412x128x16x4 float32", (412, 128, 16, 4), single, [1, 8, 64, 1024], gated=False)
    yield from expert_calls("1024x128x32x4 bfloat16", (1024, 128, 32, 4), half, [1, 64, 1024], gated=False)
    yield from expert_calls("gated 1024x512x32x8 float32", (1024, 512, 32, 8), single, [1, 64, 512], gated=True)
    yield from expert_calls("gated 1024x512x32x8 bfloat16", (1024, 512, 32, 8), half, [1, 64, 512], gated=True)
    for dtype in (single, half):
        yield from row_calls(dtype)
    yield from routing_calls()
    yield from layer_calls()


def timed(call: Call, *, cold: bool) -> tuple[float, float]:
    """Median microseconds of a call, and median of what it takes over the product after it."""
    flushed, product = torch.zeros(FLUSHED_BYTES // 4), torch.randn(512, 512)
    times, ratios, begun = [], [], time.perf_counter()
    for index in range(WARMUP + CALLS):
        if index >= WARMUP + LEAST_CALLS and time.perf_counter() - begun > SECONDS:
            break
        if cold:
            flushed.add_(1)
        start = time.perf_counter()
        call()
        between = time.perf_counter()
        torch.mm(product, product)
        end = time.perf_counter()
        if index >= WARMUP:
            times.append(between - start)
            ratios.append((between - start) / (end - between))
    return 1e6 * statistics.median(times), statistics.median(ratios)


def measure(only: str) -> Times:
    """Of this process, and without what its checkout does not have."""
    torch.manual_seed(0)
    found = {}
    for name, call in all_calls():
        if re.search(only, name):
            try:
                with torch.inference_mode("backward" not in name):
                    found[name] = timed(call, cold=name.endswith("cold"))
            except (AttributeError, TypeError) as error:
                sys.stderr.write(f"left out: {name}: {error}\n")
    return found


def run(tree: Path, only: str) -> Times:
    """The measurements of a process that imports a checkout."""
    environment = {**os.environ, "PYTHONPATH": str(tree / "src")}
    command = [sys.executable, str(Path(__file__)), str(tree), str(tree), "--only", only, "--measure"]
    return json.loads(subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE).stdout)


Rounds = list[tuple[Times, Times]]
"""Of the old and the new checkout, one process each."""


def compare(old: Path, new: Path, only: str, n_rounds: int) -> Rounds:
    """Who comes second finds a warmer machine: in one round the old one, in the next the new."""
    rounds: Rounds = []
    for index in range(n_rounds):
        if index % 2:
            of_new, of_old = run(new, only), run(old, only)
        else:
            of_old, of_new = run(old, only), run(new, only)
        rounds.append((of_old, of_new))
        sys.stderr.write(f"round {index + 1} of {n_rounds}\n")
    return rounds


def ratios_of(rounds: Rounds) -> dict[str, list[float]]:
    """NEW over OLD of each round, sorted, for the calls that both have."""
    both = [name for name in rounds[0][0] if name in rounds[0][1]]
    return {name: sorted(new[name][1] / old[name][1] for old, new in rounds) for name in both}


def slower_calls(rounds: Rounds, allowed: float) -> list[str]:
    """The median exceeds what is allowed, and three quarters of the rounds have seen it."""
    return [
        name
        for name, ratios in ratios_of(rounds).items()
        if statistics.median(ratios) > 1 + allowed and ratios[len(ratios) // 4] > 1
    ]


def report(rounds: Rounds, slower: list[str]) -> None:
    """A line a call."""
    sys.stdout.write(f"{'':70} {'OLD, us':>10} {'NEW / OLD':>10}   of each round\n")
    for name, ratios in ratios_of(rounds).items():
        us, each = statistics.median(old[name][0] for old, _ in rounds), " ".join(f"{r:.2f}" for r in ratios)
        mark = "   slower" if name in slower else ""
        sys.stdout.write(f"{name:70} {us:10,.0f} {statistics.median(ratios):10.2f}   {each}{mark}\n")


def main() -> int:
    """Compare; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--rounds", type=int, default=6, help="processes of each checkout (default: 6)")
    parser.add_argument("--only", default="", help="a regular expression that the names of calls match")
    parser.add_argument("--allowed", type=float, default=0.05, help="by how much a call may take longer (default: 0.05)")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        json.dump(measure(options.only), sys.stdout)
        return 0
    first = compare(options.old, options.new, options.only, options.rounds)
    suspects = slower_calls(first, options.allowed)
    report(first, suspects)
    if not suspects:
        return 0
    # A busy neighbour finds some of so many calls: what is slow by itself is so again.
    only = "|".join(f"^{re.escape(name)}$" for name in suspects)
    again = compare(options.old, options.new, only, options.rounds)
    slower = slower_calls(again, options.allowed)
    sys.stdout.write("\nonce more:\n")
    report(again, slower)
    return int(bool(slower))


if __name__ == "__main__":
    sys.exit(main())
