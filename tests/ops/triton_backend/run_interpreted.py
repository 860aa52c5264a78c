"""Computes cases through Triton's interpreter and writes what went wrong with each; a process of its own.

    TRITON_INTERPRET=1 python run_interpreted.py quick|full|mistakes OUT.json [--seconds S] [--part I N]

After S seconds no case is begun. Part I, from 0 on, is every N-th case from the I-th.

Without the variable the same cases run as compiled kernels on the GPU. OUT.json is written after every case.
Inputs stand in front of guard rows, NaN and index 0, so that reading past the end shows; outputs start as NaN.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import interpreted_checks
import launch_checks
import numpy as np
import patched_interpreter
import torch
from differentiable import choose, experts, route
from differentiable import cvmm as differentiable_cvmm
from launch_count import LaunchCount
from torch import Tensor
from triton import knobs
from triton_cases import CHECKS, EXPERTS, FULL, MUTANTS, QUICK, SHAPES, Case, Mutant

from sparseffn.ops import _torch_kernels, reference
from sparseffn.ops.columns import topk_plain
from sparseffn.ops.cvmm import cvmm_plain
from sparseffn.ops.library import OPERATIONS
from sparseffn.ops.spec import check_against_truth
from sparseffn.ops.triton import (
    balancing,
    balancing_operations,
    choice,
    cvmm_operations,
    expert_operations,
    launch,
    operations,
    outer,
    products,
    router,
    router_operations,
    sorting,
    sums,
    tuning,
    units,
)
from sparseffn.ops.triton.tuning import Tile

SMALL = Tile(16, 32, 32, 1, 1)
SMALL_SUM = Tile(2, 64, 4, 1, 1)

# Rows behind every input.
GUARD = 512

DEFAULT_TILE, PART_ROWS = tuning.default_tile, launch.PART_ROWS
USERS = (launch, operations, balancing_operations, cvmm_operations, expert_operations, router_operations)
_KERNELS = (balancing, choice, outer, products, router, sorting, sums, units)
FILES = {module.__name__.rpartition(".")[2]: module for module in _KERNELS}


def poison_new_tensors() -> None:
    """What is allocated without a value is NaN, or -1 for integers."""

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: object, **kwargs: object) -> Tensor:
            made = allocate(*args, **kwargs)
            with LaunchCount.paused():
                return made if made.device.type == "meta" else made.fill_(torch.nan if made.is_floating_point() else -1)

        return call

    for place, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        setattr(place, name, poisoned(getattr(place, name)))


def guarded(x: Tensor) -> Tensor:
    """The same values in front of `GUARD` rows of NaN, or of zeros for integers."""
    tail = x.new_full((GUARD, *x.shape[1:]), torch.nan if x.is_floating_point() else 0)
    return torch.cat((x, tail))[: x.shape[0]]


def use_tiles(small: bool) -> None:
    """Tiles so small that every side has several, or the shipped ones."""
    tuning.default_tile = (lambda *_: SMALL) if small else DEFAULT_TILE
    launch.SUM_TILE = SMALL_SUM if small else tuning.SUM_TILE
    # Sums over rows are split where there are few.
    launch.PART_ROWS = 16 if small else PART_ROWS


def check(case: Case) -> str:
    """What is wrong with a case, empty if nothing."""
    torch.manual_seed(0)
    use_tiles(case.small_tiles)
    operation, _, option = case.variant.partition("-")
    kinds = {"experts": _experts_results, "route": _route_results, "weighted_rows": _rows_results, "cvmm": _cvmm_results}
    kinds |= {"topk": _topk_results, "choose": _choose_results, "sinkhorn": _sinkhorn_results, "capacity": _capacity_results}
    try:
        for name, got, plain, truth in kinds[operation](case, option, getattr(torch, case.dtype)):
            check_against_truth(name, got, plain, truth, getattr(torch, case.dtype))
    except AssertionError as error:
        return str(error)
    return ""


# Name of the result in `RMS_BOUNDS`, then it by Triton, by PyTorch in the same dtype, and by the reference in float64.
Compared = Iterator[tuple[str, Tensor, Tensor, Tensor]]


def _experts_results(case: Case, option: str, dtype: torch.dtype) -> Compared:
    import expert_cases

    expert_cases.RUN["triton"] = experts
    s = SHAPES[case.shape]
    sizes = expert_cases.Case(s.n_tokens, s.d_model, s.n_experts, s.expert_size, s.k, s.routing)
    problem = sizes.draw(expert_cases.Options(**EXPERTS[option]), dtype)
    got, plain = problem.results("triton"), problem.results("torch")
    for name, truth in problem.results("reference", torch.float64).items():
        yield f"experts.{name}" if name not in ("", "evaluated") else "experts", got[name], plain[name], truth


def _route_results(case: Case, option: str, dtype: torch.dtype) -> Compared:
    s = SHAPES[case.shape]
    gate, _, dropped = option.partition("-")
    keep = torch.rand(s.n_experts, s.n_tokens).t() >= 0.5 if dropped else None
    # Few bits: sums are exact, so that rounding selects no other expert; neighbours tie.
    x, selector = ((torch.randn(n, s.d_model) * 2).round() / 4 for n in (s.n_tokens, s.n_experts))
    selector[1::2] = selector[: len(selector) // 2 * 2 : 2]
    runs: dict[str, Any] = {"triton": route, "torch": OPERATIONS["route"].eager, "reference": reference.route}
    found = []
    for name, run in runs.items():
        leaves = [guarded(t.to(torch.float64 if name == "reference" else dtype)).requires_grad_() for t in (x, selector)]
        logits, indices, gates = run(*leaves, s.k, gate, keep)
        directions = [torch.sin(torch.arange(y.numel(), dtype=y.dtype)).view(y.shape) for y in (logits, gates)]
        if keep is not None:
            # What arrives at a dropped expert's gate goes nowhere.
            directions[1].masked_fill_(~keep.gather(1, indices), torch.nan)
        grads = torch.autograd.grad([logits, gates], leaves, directions)
        found.append([logits.detach(), gates.detach(), *grads, indices])
    (*got, chosen), (*plain, _), (*truth, wanted) = found
    assert torch.equal(chosen, wanted), "route: other experts are chosen"
    yield from zip(("route", "route.gates", "route.x", "route.selector"), got, plain, truth, strict=True)


def _choose_results(case: Case, option: str, dtype: torch.dtype) -> Compared:
    s = SHAPES[case.shape]
    gate, _, how = option.partition("-")
    sizes = s.n_tokens, s.n_experts
    # Few bits, so that neighbours tie; small, as 1 - sigmoid of large ones has few digits.
    both = (torch.randn(s.n_tokens, 2 * s.n_experts) * 2).round() / 4
    drawn = {"ranked": {"ranks": (torch.randn(sizes) * 2).round()}, "noisy": {"noise": torch.randn(sizes)}}
    keep = torch.rand(*reversed(sizes)).t() >= 0.4 if how == "ranked" else None
    found = []
    for run, kind in ((choose, dtype), (OPERATIONS["choose"].eager, dtype), (reference.choose, torch.float64)):
        leaf = guarded(both.to(kind)).requires_grad_()
        logits, spread = leaf.chunk(2, dim=1)
        options = {name: guarded(t.to(kind)) for name, t in drawn[how].items()}
        ranks, noise = options.get("ranks"), options.get("noise")
        gates, indices = run(logits, s.k, gate, keep, ranks, None if noise is None else spread, noise)
        direction = torch.sin(torch.arange(gates.numel(), dtype=kind)).view(gates.shape)
        if keep is not None:
            # What arrives at a dropped expert's gate goes nowhere.
            direction.masked_fill_(~keep.gather(1, indices), torch.nan)
        (grad,) = torch.autograd.grad(gates, leaf, direction)
        found.append([gates.detach(), *grad.chunk(2, dim=1), indices])
    (*got, chosen), (*plain, _), (*truth, wanted) = found
    assert torch.equal(chosen, wanted), "choose: other experts are chosen"
    yield from zip(("choose", "choose.logits", "choose.spread"), got, plain, truth, strict=True)


def _sinkhorn_results(case: Case, option: str, dtype: torch.dtype) -> Compared:
    s = SHAPES[case.shape]
    scores, sign = guarded(torch.randn(s.n_tokens, s.n_experts).to(dtype)), -1.0 if option == "released" else 1.0
    for mask in (None, guarded(torch.rand(s.n_tokens) >= 0.3), torch.zeros(s.n_tokens, dtype=torch.bool)):
        arguments = (mask, 3, sign)
        run = (operations.sinkhorn, OPERATIONS["sinkhorn"].eager)
        yield "sinkhorn", *(function(scores, *arguments) for function in run), reference.sinkhorn(scores.double(), *arguments)
    # Three sequences, each balanced by itself; the last is padding.
    batch, mask = guarded(torch.randn(3, *scores.shape).to(dtype)), guarded(torch.rand(3, s.n_tokens) >= 0.3)
    mask[:, :1], mask[2] = True, False
    results = (function(batch, mask, 3, sign) for function in run)
    yield "sinkhorn", *results, reference.sinkhorn(batch.double(), mask, 3, sign)
    if s.n_tokens > 1:
        scores[0, -1] = torch.nan
        # A token that is no number takes no part.
        got, plain = (function(scores, None, 3, sign)[1:] for function in run)
        yield "sinkhorn", got, plain, reference.sinkhorn(scores[1:].double(), None, 3, sign)


def _capacity_results(case: Case, _: str, dtype: torch.dtype) -> Compared:
    """Which selections find no place, which is equal or not."""
    s = SHAPES[case.shape]
    indices = guarded(
        torch.zeros(s.n_tokens, s.k).long() if s.routing == "hot" else torch.randint(s.n_experts, (s.n_tokens, s.k))
    )
    weights = guarded(torch.rand(s.n_tokens, s.k).to(dtype) * (torch.rand(s.n_tokens, s.k) >= 0.3))
    for mask in (None, guarded(torch.rand(s.n_tokens) >= 0.3)):
        for factor in (0.0, 0.6, 1.0, 1.15, 1e30):
            arguments = (indices, weights, s.n_experts, factor, mask)
            found = operations.over_capacity(*arguments)
            assert torch.equal(found, reference.over_capacity(*arguments)), f"capacity: others lose their place at {factor}"
    yield from ()


def _cvmm_results(case: Case, _: str, dtype: torch.dtype) -> Compared:
    s = SHAPES[case.shape]
    # Strided and transposed, as gradients may be too.
    x, weight = torch.randn(s.d_model, s.n_tokens).t(), torch.randn(s.n_experts, s.expert_size, s.d_model).mT / s.d_model**0.5
    sel = guarded(torch.zeros(s.n_tokens).long() if s.routing == "hot" else torch.randint(s.n_experts, (s.n_tokens,)))
    grad = torch.randn(s.n_tokens, s.expert_size).to(dtype)
    found = []
    for run, kind in ((differentiable_cvmm, dtype), (cvmm_plain, dtype), (reference.cvmm, torch.float64)):
        leaves = [t.to(dtype).to(kind).requires_grad_() for t in (x, weight)]
        y = run(leaves[0], sel, leaves[1])
        found.append([y.detach(), *torch.autograd.grad(y, leaves, grad.to(kind))])
    yield from zip(("cvmm", "cvmm.x", "cvmm.weight"), *found, strict=True)


def _topk_results(case: Case, _: str, dtype: torch.dtype) -> Compared:
    """Indices, which are equal or not: in any order, and the largest first. Rows are up to several stretches long; many tie."""
    s = SHAPES[case.shape]
    n = min(s.d_model * s.expert_size, 2500)
    scores = guarded((torch.randn(min(s.n_tokens, 4), n) * 4).round().to(dtype) / 4)
    for k in (n // 3 + 1, n):
        wanted = topk_plain(scores, k, True)
        assert torch.equal(operations.topk(scores, k, False), wanted.sort(dim=1).values), f"topk: others than the {k} of {n}"
        assert torch.equal(operations.topk(scores, k, True), wanted), f"topk: another order of {k} of {n}"
    yield from ()


def _rows_results(case: Case, _: str, dtype: torch.dtype) -> Compared:
    s = SHAPES[case.shape]
    n_values, k = 3 * s.n_experts, 3 * s.k
    indices = guarded(torch.randint(1 if s.routing == "hot" else n_values, (s.n_tokens, k)))
    values, weights = guarded(torch.randn(n_values, s.d_model).to(dtype)), guarded(torch.randn(s.n_tokens, k).to(dtype))
    # Expanded gradients, as of a sum, have strides of zero.
    grad = torch.randn(s.n_tokens, s.d_model).to(dtype) if s.n_tokens % 2 else values.new_ones(()).expand(s.n_tokens, s.d_model)
    leaves = [t.double().requires_grad_() for t in (values, weights)]
    y = reference.weighted_rows(leaves[0], indices, leaves[1])
    truth = [y.detach(), *torch.autograd.grad(y, leaves, grad.double())]
    got = [
        operations.weighted_rows(values, indices, weights),
        *operations.weighted_rows_backward(grad, values, indices, weights),
    ]
    # Bags of embeddings have no backward in half precision on the CPU.
    wide = [t.float().requires_grad_() for t in (values, weights)]
    of_values, of_weights = torch.autograd.grad(
        _torch_kernels.weighted_rows(wide[0], indices, wide[1]), wide, grad.float().contiguous()
    )
    plain = [_torch_kernels.weighted_rows(values, indices, weights), of_values.to(dtype), of_weights.to(dtype)]
    yield from zip(("weighted_rows", "weighted_rows.values", "weighted_rows.weights"), got, plain, truth, strict=True)


def load(path: Path) -> ModuleType:
    """The module in a file."""
    spec = importlib.util.spec_from_file_location(f"mutant_{path.stem}", path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def mutated(mutant: Mutant) -> Iterator[None]:
    """The kernels of a file with a mistake in them, where they are launched from."""
    source = Path(FILES[mutant.file].__file__ or "").read_text()
    assert mutant.old in source, f"{mutant.old!r} is not in {mutant.file}.py"
    # Triton reads the text of a kernel from its file, so the mistake needs one.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{mutant.file}.py"
        path.write_text(source.replace(mutant.old, mutant.new))
        wrong = load(path)
        # Kernels name the functions of another file by themselves.
        places = [(vars(module), mutant.file, wrong) for module in USERS if mutant.file in vars(module)]
        if mutant.file == "units":
            places += [(vars(products), name, getattr(wrong, name)) for name in ("units", "units_backward")]
        right = [(names, name, names[name]) for names, name, _ in places]
        for names, name, value in places:
            names[name] = value
        try:
            yield
        finally:
            for names, name, value in right:
                names[name] = value


def check_mutant(mutant: Mutant) -> str:
    """What the check says about a kernel with a mistake; empty would mean that it went unnoticed."""
    with mutated(mutant):
        return check(Case(mutant.variant, mutant.shape, mutant.dtype, True))


def said_by(function: Callable[[], object]) -> str:
    """The message of a failed check, empty where it passes."""
    try:
        return str(function() or "")
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:2000]


def main() -> None:
    """Run what the first argument names and write {case: message} to the second."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["quick", "full", "mistakes"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1))
    options = parser.parse_args()
    what, (part, n_parts), stop = options.what, options.part, time.monotonic() + options.seconds
    if knobs.runtime.interpret:
        patched_interpreter.mend()
        # As on a GPU: exp runs into infinity, whose reciprocal is the sigmoid's zero.
        np.seterr(over="ignore", invalid="ignore")
        warnings.filterwarnings("ignore", "All-NaN slice encountered")
    else:
        torch.set_default_device("cuda")
    poison_new_tensors()
    cases = {"quick": QUICK, "full": FULL, "mistakes": []}[what]
    work: dict[str, Callable[[], object]] = {case.name: lambda case=case: check(case) for case in cases}
    if what == "mistakes":
        work = {mutant.name: lambda mutant=mutant: check_mutant(mutant) for mutant in MUTANTS}
        checks = vars(interpreted_checks) | vars(launch_checks)
        work |= {name: checks[name] for name in CHECKS}
    found: dict[str, str] = {}
    options.out.write_text("{}")
    for name, function in list(work.items())[part::n_parts]:
        if time.monotonic() > stop:
            break
        if name in CHECKS:
            use_tiles(small=True)
        found[name] = said_by(function)
        options.out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
