"""Is one checkout as fast as another? `tools/same_speed.py OLD NEW` times the operations of the CPU in each, with gradients.

A change of one kernel can slow another that shares a file with it. Processes of both checkouts alternate; within each, calls
of an operation take turns with a product of PyTorch's, by whose time theirs is divided, as a shared machine's speed drifts.
Nothing else should run; about twelve minutes on 2 cores, and less for what seems slower, which is timed again. Exit code 1:
something takes longer by more than `--allowed`, twice. One checkout against itself (`OLD OLD`) shows what is noise.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import sparseffn
from sparseffn import ops
from sparseffn.bench.timing import Turn, medians, ratio, take_turns
from sparseffn.ffn.sigma_moe import SigmaMoEConfig

WARMUP, LEAST_CALLS, SECONDS = 3, 5, 1.0
FLUSHED_BYTES = 64 << 20
"""Written before a cold call; of a larger cache some weights may stay there."""


class Call(NamedTuple):
    """What is timed."""

    name: str
    run: Callable[[], object]
    cold: bool = False
    trains: bool = False


class Time(NamedTuple):
    """Of a call: median microseconds, and median of what it takes over the product after it."""

    us: float
    over_product: float


Times = dict[str, Time]
Rounds = list[tuple[Times, Times]]
"""Of the old and the new checkout, one process each."""


def counted(n: int) -> str:
    """So many tokens."""
    return "1 token" if n == 1 else f"{n:,} tokens"


def with_gradients(name: str, forward: Callable[..., Tensor], *leaves: Tensor, cold: bool = False) -> Iterator[Call]:
    """A function of the leaves, alone and with the gradients of all of them."""
    for leaf in leaves:
        leaf.requires_grad_()

    def train() -> Sequence[Tensor]:
        y = forward(*leaves)
        return torch.autograd.grad(y, leaves, torch.ones_like(y))

    yield Call(f"{name}, cold" if cold else name, lambda: forward(*leaves), cold=cold)
    yield Call(f"{name}, forward + backward", train, trains=True)


def expert_calls(sizes: tuple[int, int, int, int], dtype: torch.dtype, tokens: Sequence[int]) -> Iterator[Call]:
    """Of experts `D x G x E x K`, plain ones as they are trained here."""
    d, g, e, k = sizes
    keys, values = ((torch.randn(shape) / 20).to(dtype) for shape in ((e, d, g), (e, g, d)))
    for n in tokens:
        indices = torch.rand(n, e).topk(k, dim=1).indices

        def forward(x: Tensor, keys: Tensor, values: Tensor, gates: Tensor, indices: Tensor = indices) -> Tensor:
            return ops.experts(x, keys, values, gates, indices)

        name, leaves = f"experts {d}x{g}x{e}x{k} {named(dtype)}, {counted(n)}", (torch.randn(n, d).to(dtype), keys, values)
        gates = torch.rand(n, k).to(torch.promote_types(dtype, torch.float32))
        yield from with_gradients(name, forward, *leaves, gates, cold=n <= 64)


def gated_calls(sizes: tuple[int, int, int, int], dtype: torch.dtype, tokens: Sequence[int]) -> Iterator[Call]:
    """Of gated experts `D x G x E x K`, `[E, out, in]` and keys and gate keys in one tensor, as models of Hugging Face."""
    d, g, e, k = sizes
    both, stored = ((torch.randn(shape) / 30).to(dtype) for shape in ((e, 2 * g, d), (e, d, g)))
    for n in tokens:
        indices = torch.rand(n, e).topk(k, dim=1).indices

        def forward(x: Tensor, both: Tensor, stored: Tensor, gates: Tensor, indices: Tensor = indices) -> Tensor:
            keys, gate_keys = ops.halves(both, dim=1)
            return ops.experts(x, keys.mT, stored.mT, gates, indices, gate_keys=gate_keys.mT, activation="silu")

        name, leaves = f"gated {d}x{g}x{e}x{k} {named(dtype)}, {counted(n)}", (torch.randn(n, d).to(dtype), both, stored)
        yield from with_gradients(name, forward, *leaves, torch.rand(n, k), cold=n <= 64)


def option_calls() -> Iterator[Call]:
    """Of experts with biases, dropout, an inner top-K, and in the dtypes that are not trained in."""
    n, d, g, e, k = 256, 412, 128, 16, 4
    leaves = [torch.randn(n, d), torch.randn(e, d, g) / 20, torch.randn(e, g, d) / 20, torch.rand(n, k)]
    indices = torch.rand(n, e).topk(k, dim=1).indices

    def biased(x: Tensor, keys: Tensor, values: Tensor, gates: Tensor, key_bias: Tensor, value_bias: Tensor) -> Tensor:
        return ops.experts(x, keys, values, gates, indices, key_bias=key_bias, value_bias=value_bias, dropout=0.5)

    def inner(x: Tensor, keys: Tensor, values: Tensor, gates: Tensor) -> Tensor:
        return ops.experts(x, keys, values, gates, indices, inner_k=64)

    yield from with_gradients("experts, biases and dropout", biased, *leaves, torch.randn(e, g), torch.randn(e, d))
    yield from with_gradients("experts, inner top-K", inner, *leaves)
    for dtype in (torch.float16, torch.float64):
        yield from expert_calls((d, g, e, k), dtype, [n])


def row_calls(dtype: torch.dtype) -> Iterator[Call]:
    """Blocks of single pairs, and their weighted sums of rows."""
    keys, values = (torch.randn(2053, 412) / 20).to(dtype), (torch.randn(2053, 412) / 20).to(dtype)
    keys_a, keys_b = ((torch.randn(4, 62, 206) / 14).to(dtype) for _ in range(2))
    many = (torch.randn(62 * 62, 412) / 60).to(dtype)
    for n in (16, 256, 1024):
        x, words = torch.randn(n, 412).to(dtype), f"{named(dtype)}, {counted(n)}"
        yield from with_gradients(f"topk_rows {words}", lambda *w: ops.topk_rows(*w, k=512)[0], x, keys, values)
        product_keys = (x, keys_a, keys_b, many)
        yield from with_gradients(f"product_key_rows {words}", lambda *w: ops.product_key_rows(*w, k=32)[0], *product_keys)
    indices = torch.randint(2053, (1024, 128))
    rows = (values, torch.rand(1024, 128))
    yield from with_gradients(f"weighted_rows {named(dtype)}", lambda v, w: ops.weighted_rows(v, indices, w), *rows)


def routing_calls() -> Iterator[Call]:
    """Routers, choices and balancing."""
    selector = torch.randn(16, 412) / 20
    for n in (16, 256, 4096):
        x = torch.randn(n, 412)
        yield from with_gradients(f"route, {counted(n)}", lambda *w: ops.route(*w, k=4, gate="sigmoid")[2], x, selector)
    yield from with_gradients("router_logits", ops.router_logits, torch.randn(4096, 412), selector)
    x, matrices, sel = torch.randn(4096, 412), torch.randn(16, 412, 128) / 20, torch.randint(16, (4096,))
    yield from with_gradients("cvmm", lambda x, w: ops.cvmm(x, sel, w), x, matrices)
    logits = torch.randn(4096, 16)
    mask, indices, weights = torch.rand(4096) > 0.1, logits.topk(2, dim=1).indices, torch.rand(4096, 2)
    yield from with_gradients("choose", lambda z: ops.choose(z, k=2, gate="renormalised")[0], logits.clone())
    yield from with_gradients("batch_entropy", lambda z: ops.batch_entropy(z, mask, 1.0), logits.clone())
    scores, a, b = torch.randn(1024, 2053), torch.randn(1024, 62), torch.randn(1024, 62)
    for name, run in (
        ("topk", lambda: ops.topk(scores, 512)),
        ("product_key_topk", lambda: ops.product_key_topk(a, b, 32)),
        ("sinkhorn", lambda: ops.sinkhorn(logits, mask)),
        ("balanced_assignment", lambda: ops.balanced_assignment(logits[:512])),
        ("over_capacity", lambda: ops.over_capacity(indices, weights, n_experts=16, factor=1.0)),
        ("routing_counts", lambda: ops.routing_counts(indices, weights, 16)),
    ):
        yield Call(name, run)


def layer_calls() -> Iterator[Call]:
    """One token of a whole layer, where calling is what costs, and a step of training."""
    layer = SigmaMoEConfig(d_model=412, n_experts=16, expert_size=128, k=4).build()
    for n in (1, 1024):
        x = torch.randn(n, 412)
        yield from with_gradients(f"sigma-moe, {counted(n)}", lambda x, *_: layer(x), x, *layer.parameters())


def named(dtype: torch.dtype) -> str:
    """Without the module."""
    return str(dtype).removeprefix("torch.")


def all_calls() -> Iterator[Call]:
    """Everything."""
    single, half = torch.float32, torch.bfloat16
    yield from expert_calls((412, 128, 16, 4), single, [1, 8, 64, 1024])
    yield from expert_calls((1024, 128, 32, 4), half, [1, 64, 1024])
    for dtype in (single, half):
        yield from gated_calls((1024, 512, 32, 8), dtype, [1, 64, 512])
        yield from row_calls(dtype)
    yield from option_calls()
    yield from routing_calls()
    yield from layer_calls()


class Prepared(Turn):
    """A call, and what is done before it untimed."""

    def __init__(self, ready: Callable[[], object], call: Callable[[], object]) -> None:
        self.ready, self.call = ready, call

    def prepare(self, index: int) -> Callable[[], object]:
        self.ready()
        return self.call


def timed(call: Call) -> Time:
    """Call and product take turns; the product runs once untimed, so that it does not depend on what came before."""
    flushed, product = torch.zeros(FLUSHED_BYTES // 4), torch.randn(512, 512)
    multiply = partial(torch.mm, product, product)
    turns = {
        "call": Prepared((lambda: flushed.add_(1)) if call.cold else (lambda: None), call.run),
        "product": Prepared(multiply, multiply),
    }
    times = take_turns(turns, rounds=LEAST_CALLS, warmup=WARMUP, at_least_s=SECONDS)
    return Time(1e6 * medians(times)["call"], ratio(times, "call", "product"))


def measure(only: str) -> Times:
    """Of this process, whose checkout must have kernels."""
    backend, reason = ops.explain_backend(torch.device("cpu"))
    if backend != "cpu":
        raise SystemExit(f"{Path(sparseffn.__file__).parent} must run by its CPU kernels; got {backend}, as {reason}")
    torch.manual_seed(0)
    found = {}
    for call in all_calls():
        if re.search(only, call.name):
            with torch.inference_mode(not call.trains):
                found[call.name] = timed(call)
    return found


def run(tree: Path, only: str) -> Times:
    """The measurements of a process that imports a checkout."""
    environment = {**os.environ, "PYTHONPATH": str(tree / "src")}
    environment.pop("SPARSEFFN_BACKEND", None)
    command = [sys.executable, str(Path(__file__)), str(tree), str(tree), "--only", only, "--measure"]
    found = json.loads(subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE).stdout)
    return {name: Time(*values) for name, values in found.items()}


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
    """NEW over OLD in each round, sorted."""
    return {name: sorted(new[name].over_product / old[name].over_product for old, new in rounds) for name in rounds[0][0]}


def slower_calls(rounds: Rounds, allowed: float) -> list[str]:
    """The median exceeds what is allowed, and three quarters of the rounds have seen it."""
    return [
        name
        for name, ratios in ratios_of(rounds).items()
        if statistics.median(ratios) > 1 + allowed and ratios[len(ratios) // 4] > 1
    ]


def report(rounds: Rounds, slower: list[str]) -> None:
    """A line a call."""
    sys.stdout.write(f"{'':72} {'OLD, us':>10} {'NEW / OLD':>10}   of each round, sorted\n")
    for name, ratios in ratios_of(rounds).items():
        us, each = statistics.median(old[name].us for old, _ in rounds), " ".join(f"{r:.2f}" for r in ratios)
        mark = "   slower" if name in slower else ""
        sys.stdout.write(f"{name:72} {us:10,.0f} {statistics.median(ratios):10.2f}   {each}{mark}\n")


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
    old, new = options.old.resolve(), options.new.resolve()
    if options.measure:
        json.dump(measure(options.only), sys.stdout)
        return 0
    for tree in (old, new):
        if not (tree / "src" / "sparseffn").is_dir():
            parser.error(f"a checkout must have the folder src/sparseffn; {tree} has none")
    if options.rounds < 1 or not any(re.search(options.only, call.name) for call in all_calls()):
        parser.error("nothing to compare: `--rounds` must be 1 or more, and `--only` match the name of a call")
    first = compare(old, new, options.only, options.rounds)
    suspects = slower_calls(first, options.allowed)
    report(first, suspects)
    if not suspects:
        return 0
    # A busy neighbour finds some of so many calls: what is slow by itself is so again.
    only = "|".join(f"^{re.escape(name)}$" for name in suspects)
    again = compare(old, new, only, options.rounds)
    slower = slower_calls(again, options.allowed)
    sys.stdout.write("\nonce more:\n")
    report(again, slower)
    return int(bool(slower))


if __name__ == "__main__":
    sys.exit(main())
