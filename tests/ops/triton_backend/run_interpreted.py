"""Computes cases through Triton's interpreter and writes what went wrong with each; a process of its own.

    TRITON_INTERPRET=1 python run_interpreted.py quick|full OUT.json

Without the variable the same cases run as compiled kernels on the GPU.
Inputs stand in front of guard rows, NaN and index 0, so that reading past the end shows; outputs start as NaN.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import interpreted_checks
import patched_interpreter
import torch
from torch import Tensor
from triton import knobs
from triton_cases import CHECKS, FULL, MUTANTS, QUICK, SHAPES, Case, Mutant, Shape

from sparseffn import ops
from sparseffn.ops.spec import check_against_truth
from sparseffn.ops.triton import launch, operations, outer, products, sums, tuning
from sparseffn.ops.triton.tuning import Tile

SMALL = Tile(16, 32, 32, 1, 1)
SMALL_SUM = Tile(1, 64, 4, 1, 1)

# Rows behind every input.
GUARD = 512

DEFAULT_TILE = tuning.default_tile


def poison_new_tensors() -> None:
    """What is allocated without a value is NaN, or -1 for integers."""

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: object, **kwargs: object) -> Tensor:
            made = allocate(*args, **kwargs)
            return made if made.device.type == "meta" else made.fill_(torch.nan if made.is_floating_point() else -1)

        return call

    for place, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        setattr(place, name, poisoned(getattr(place, name)))


def guarded(x: Tensor) -> Tensor:
    """The same values in front of `GUARD` rows of NaN, or of zeros for integers."""
    tail = x.new_full((GUARD, *x.shape[1:]), torch.nan if x.is_floating_point() else 0)
    return torch.cat((x, tail))[: x.shape[0]]


def strided(x: Tensor) -> Tensor:
    """The same values with the last two dimensions swapped in memory."""
    return guarded(x.transpose(-1, -2).contiguous()).transpose(-1, -2)


def route(shape: Shape) -> ops.ExpertRows:
    """The selection of a shape, sorted by expert."""
    n, e, k = shape.n_tokens, shape.n_experts, shape.k
    if shape.routing == "ragged":
        lengths = torch.arange(n) % 3
        offsets = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
        units = torch.arange(int(offsets[-1])) * 2 % e
        selection = ops.Selection(units, torch.ones(len(units)), offsets, e, None)
    else:
        indices = torch.rand(n, e).topk(k, dim=1).indices
        indices = torch.arange(k).expand(n, k) if shape.routing == "hot" else indices
        indices = torch.randint(e, (n, k)) if shape.routing == "repeats" else indices
        selection = ops.Selection.fixed(indices, torch.ones(n, k), e)
    routed = ops.sort_by_expert(selection)
    return ops.ExpertRows(routed.order, guarded(routed.tokens), routed.offsets, routed.n_tokens)


def problem(case: Case) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    """The operation as a function of its differentiable inputs, and those inputs."""
    shape, dtype = SHAPES[case.shape], getattr(torch, case.dtype)
    routed = route(shape)
    n_rows, d, g = len(routed.order), shape.d_model, shape.expert_size
    place = strided if shape.strided else guarded

    def normal(*sizes: int) -> Tensor:
        return place(torch.randn(*sizes).to(dtype))

    if case.operation == "expert_up":
        inputs = {"x": normal(shape.n_tokens, d), "weight": normal(shape.n_experts, d, g)}
        return lambda x, weight, backend: ops.expert_up(x, weight, routed, backend=backend), inputs
    if case.operation == "expert_down":
        gates = guarded(torch.rand(n_rows) + 0.5)
        inputs = {"a": normal(n_rows, g), "weight": normal(shape.n_experts, g, d), "gates": gates}
        return lambda a, weight, gates, backend: ops.expert_down(a, weight, gates, routed, backend=backend), inputs
    n_values, k = 3 * shape.n_experts, 3 * shape.k
    indices = torch.randint(1 if shape.routing == "hot" else n_values, (shape.n_tokens, k))
    inputs = {"values": normal(n_values, d), "weights": place(torch.randn(shape.n_tokens, k))}
    return lambda values, weights, backend: ops.weighted_rows(values, guarded(indices), weights, backend=backend), inputs


def results(function: Callable[..., Tensor], inputs: dict[str, Tensor], direction: Tensor | None, backend: str) -> list[Tensor]:
    """Output and gradients; an all-ones direction that takes no memory where none is given."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    y = function(**leaves, backend=backend)
    grad = y.new_ones(()).expand_as(y) if direction is None else direction.to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), grad)]


def use_tiles(small: bool) -> None:
    """Tiles so small that every side has several, or the shipped ones."""
    tuning.default_tile = (lambda *_: SMALL) if small else DEFAULT_TILE
    launch.SUM_TILE = SMALL_SUM if small else tuning.SUM_TILE


def check(case: Case) -> str:
    """What is wrong with a case, empty if nothing."""
    torch.manual_seed(0)
    use_tiles(case.small_tiles)
    function, inputs = problem(case)
    y_shape = function(**inputs, backend="torch").shape
    dtype = getattr(torch, case.dtype)
    # Expanded gradients, as of a sum, have strides of zero.
    direction = None if SHAPES[case.shape].strided else guarded(torch.randn(y_shape).to(dtype))
    truth = results(function, {name: x.double() for name, x in inputs.items()}, direction, "reference")
    plain, got = (results(function, inputs, direction, backend) for backend in ("torch", "triton"))
    names = [case.operation, *(f"{case.operation}.{name}" for name in inputs)]
    try:
        for name, *tensors in zip(names, got, plain, truth, strict=True):
            check_against_truth(name, *tensors, dtype)
    except AssertionError as error:
        return str(error)
    return ""


def load(path: Path) -> ModuleType:
    """The module in a file."""
    spec = importlib.util.spec_from_file_location(f"mutant_{path.stem}", path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_mutant(mutant: Mutant) -> str:
    """What the check says about a kernel with a mistake; empty would mean that it went unnoticed."""
    right = {"products": products, "outer": outer, "sums": sums}[mutant.file]
    source = Path(right.__file__).read_text()
    assert mutant.old in source, f"{mutant.old!r} is not in {right.__file__}"
    # Triton reads the text of a kernel from its file, so the mistake needs one.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{mutant.file}.py"
        path.write_text(source.replace(mutant.old, mutant.new))
        wrong = load(path)
        users = [module for module in (launch, operations) if mutant.file in vars(module)]
        for module in users:
            setattr(module, mutant.file, wrong)
        said = check(Case(mutant.operation, mutant.shape, "float32", True))
        for module in users:
            setattr(module, mutant.file, right)
    return said


def said_by(function: Callable[[], None]) -> str:
    """The message of a failed check, empty where it passes."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main() -> None:
    """Run what the first argument names and write {case: message} to the second."""
    what, out = sys.argv[1:]
    if knobs.runtime.interpret:
        patched_interpreter.mend()
    else:
        torch.set_default_device("cuda")
    poison_new_tensors()
    found = {case.name: check(case) for case in {"quick": QUICK, "full": FULL}[what]}
    if what == "quick":
        found |= {mutant.name: check_mutant(mutant) for mutant in MUTANTS}
        use_tiles(small=True)
        found |= {name: said_by(getattr(interpreted_checks, name)) for name in CHECKS}
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
