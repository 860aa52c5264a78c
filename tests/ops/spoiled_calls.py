"""Call every operation of the library with one argument after the other spoiled: `python spoiled_calls.py SEED`.

Each call must raise, or give what its composition gives; a public function that raises raises an error for users. A call that
crashes ends the process; its name is the last printed.
"""

from __future__ import annotations

import inspect
import resource
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from test_opcheck import CASES, LIBRARY
from torch import Tensor

from sparseffn import ops
from sparseffn.errors import UserError
from sparseffn.ops.library import OPERATIONS

# What PyTorch's dispatcher and kernels raise; the others would be faults of our own.
REFUSED = (RuntimeError, ValueError, IndexError)
# Autograd alone calls these, whose compositions look at nothing before they compute.
REFUSED_BACKWARD = (*REFUSED, TypeError, AttributeError)
# What public functions raise: where a tensor has no values, PyTorch says so.
REFUSED_IN_WORDS = (UserError, NotImplementedError)

SELECTING = ("topk", "product_key")
TIES = ("expanded", "same-everywhere", "torch.bool")


def spoiled_tensors(t: Tensor) -> Iterator[tuple[str, Any]]:
    """Tensors that are not what the operation wants, or want care."""
    yield "rank-less", t.flatten()
    yield "rank-more", t[None]
    if t.dim():
        yield "short", t[:-1]
        yield "none", t[:0]
        yield "narrow", t[..., :-1]
        yield "no-width", t[..., :0]
        yield "wide", torch.cat([t, t], dim=-1)
        yield "long", torch.cat([t, t])
        yield "expanded", t[:1].expand_as(t)
        yield "same-everywhere", t.flatten()[:1].expand(t.shape) if t.numel() else t
        yield "strided", torch.stack([t, t], dim=-1)[..., 0]
    if t.dim() > 1:
        yield "turned", t.transpose(-1, -2)
        yield "turned-memory", t.transpose(-1, -2).contiguous().transpose(-1, -2)
    yield "meta", t.to("meta")
    for dtype in (torch.float32, torch.float16, torch.int64, torch.int32, torch.bool, torch.complex64):
        if dtype != t.dtype:
            yield str(dtype), t.detach().to(dtype)
    if t.dtype in (torch.int64, torch.int32):
        large = torch.iinfo(t.dtype).max
        for value in (-1, large, -large, 1000):
            yield f"holds {value}", t.index_fill(-1, torch.tensor([0]), value) if t.numel() and t.dim() else t
            yield f"full of {value}", torch.full_like(t, value)
    if t.is_floating_point():
        yield "nan", torch.full_like(t, torch.nan)
    yield "number", torch.tensor(1.0)
    yield "absent", None


def spoiled(argument: Any) -> Iterator[tuple[str, Any]]:
    """What may stand in an argument's place."""
    if isinstance(argument, Tensor):
        yield from spoiled_tensors(argument)
    elif isinstance(argument, str):
        yield from (("empty", ""), ("unknown", "tanh"), ("another", "clamped_swiglu"))
    elif isinstance(argument, float):
        yield from (("zero", 0.0), ("infinite", float("inf")))
    else:
        # Integers, and optional ones and tensors that are not given.
        yield from (("zero", 0), ("negative", -1), ("large", 1000), ("tensor", torch.ones(3, 2)))


def same(name: str, arguments: tuple[Any, ...], got: Any) -> bool:
    """Whether a result is that of the operation's composition, which looks at nothing but the equation."""
    composed = getattr(LIBRARY, f"{name}_eager", None) or getattr(LIBRARY, f"{name}_plain", None)
    if composed is None or any(isinstance(a, Tensor) and a.is_meta for a in arguments):
        return True
    wanted = composed(*arguments)
    first, *others = zip(*(r if isinstance(r, tuple | list) else [r] for r in (got, wanted)), strict=True)
    # What is selected stands in any order beside the result.
    ordered = [first, *((in_order(a), in_order(b)) for a, b in others)]
    return all(torch.allclose(a.cdouble(), b.cdouble(), atol=tolerance(a), equal_nan=True) for a, b in ordered)


def tolerance(t: Tensor) -> float:
    """Of sums of a few products."""
    return 4 * torch.finfo(t.dtype).eps if t.is_floating_point() and t.dtype.itemsize < 4 else 1e-5


def in_order(t: Tensor) -> Tensor:
    """Sorted lines, where there is an order of such numbers."""
    return t if t.is_complex() or not t.dim() else t.sort(-1).values


def public(name: str, arguments: tuple[Any, ...]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The function that users call for an operation, and the arguments that it shares with it; with dropout if it has that."""
    function = getattr(ops, name)
    parameters = inspect.signature(function).parameters
    given = dict(zip(OPERATIONS[name].arguments, arguments, strict=False))
    shared = {key: value for key, value in given.items() if key in parameters}
    return function, shared | ({"dropout": 0.1} if "dropout" in parameters else {})


def spoil_public(name: str, arguments: tuple[Any, ...]) -> int:
    """Spoil the arguments of a public function, by the dispatcher and by the compositions; how many calls were refused."""
    function, given = public(name, arguments)
    refused = 0
    for backend in ("auto", "torch") if "backend" in inspect.signature(function).parameters else (None,):
        named = given if backend is None else given | {"backend": backend}
        for key, argument in given.items():
            for how, value in spoiled(argument):
                sys.stdout.write(f"ops.{name}, backend {backend}, {key}: {how}\n")
                sys.stdout.flush()
                try:
                    function(**{**named, key: value})
                except REFUSED_IN_WORDS:
                    refused += 1
    return refused


def main() -> int:
    """Every case of `test_opcheck.py`, with each argument spoiled in every way."""
    # A size that nobody refuses must not take the machine's memory.
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    torch.manual_seed(int(sys.argv[1]))
    refused = answered = 0
    for name, draws in CASES.items():
        operation = getattr(LIBRARY, name)
        refusals = REFUSED_BACKWARD if name.endswith("_backward") else REFUSED
        for draw in draws:
            arguments = draw()
            for i, argument in enumerate(arguments):
                for how, value in spoiled(argument):
                    sys.stdout.write(f"{name}, argument {i}: {how}\n")
                    sys.stdout.flush()
                    given = (*arguments[:i], value, *arguments[i + 1 :])
                    try:
                        got = operation(*given)
                    except refusals:
                        refused += 1
                        continue
                    answered += 1
                    # Which of equal keys are selected is nobody's to say, and a NaN times nothing may be nothing.
                    if how == "nan" or (name.startswith(SELECTING) and how in TIES):
                        continue
                    assert same(name, given, got), "another result than that of the composition"
            if name in OPERATIONS:
                refused += spoil_public(name, draw())
    sys.stdout.write(f"{refused} refused, {answered} answered\n")
    return 0 if refused and answered else 1


if __name__ == "__main__":
    sys.exit(main())
