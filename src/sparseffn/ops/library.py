"""The operations behind PyTorch's dispatcher: schemas, compositions of PyTorch's own operations, and what takes their place.

An operation NAME is up to five schemas of the library `sparseffn`:

    NAME(arguments) -> outputs
    NAME_plain(arguments) -> outputs                  the composition that transforms look into: it reads no values on the host
    NAME_eager(arguments) -> outputs                  another one, which may; what runs where there are no kernels
    NAME_kept(arguments) -> (outputs..., kept...)     what a step of training runs forward
    NAME_backward(grad_OUTPUT..., arguments, outputs and kept, by name, needed) -> gradients, named as the arguments are

The C++ of `cpu/csrc` brings autograd, autocast and the CPU's kernels; `dispatch.cpp` says how. It is compiled and loaded when
the first operation is called, which reaches what is registered here for every device. Where it cannot be compiled, the
composition is the operation. All but the kernels stands where an operation is defined: what autocast casts, what is refused.
"""

from __future__ import annotations

import functools
import itertools
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._C import _current_graph_task_id

from sparseffn.ops._checks import is_watched, require_kind, require_one_device
from sparseffn.ops.autocast import is_autocast_on, to_autocast

LIBRARY = torch.library.Library("sparseffn", "FRAGMENT")

# Devices whose autograd is that of the compiled library.
_DEVICES = ("cpu", "cuda", "meta")

Function = Callable[..., Any]
# From shapes, and values of arguments that are no tensors, in the order of the schema.
Flops = Callable[..., int]

# Of NAME_backward over those of NAME, by the names of the gradients that are wanted and of those that there could be.
FlopsOfBackward = Callable[[set[str], set[str]], float]

OPERATIONS: dict[str, Operation] = {}
"""Every operation by its name."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What an operation keeps for its backward."""

    returns: str
    """Further results of NAME_kept: "Tensor hidden, Tensor order"; may be none."""
    fake: Function
    """All results of NAME_kept for fake tensors."""
    backward: str
    """Arguments of NAME_backward. `bool[]? needed` gets which of the gradients are wanted, in their order; None: all. Those of
    frozen weights are not. `bool joint` says whether gradients may lie in one memory."""
    gradients: tuple[str, ...]
    """Arguments that have one, in the order of NAME_backward's results; an empty tensor stands for one that is left out."""
    flops_of_backward: FlopsOfBackward = lambda wanted, _: len(wanted)
    """FLOPs of NAME_backward over those of NAME: a product for each factor whose gradient is wanted."""
    kernels: tuple[Function, Function] | None = None
    """NAME_kept and NAME_backward for every device that has none of its own; None: they are the library's."""


@dataclass(frozen=True, kw_only=True)
class Operation:
    """An operation of the library."""

    name: str
    arguments: tuple[str, ...]
    """Names of its arguments."""
    kinds: tuple[str, ...]
    """What each of them is, as the schema says it: "Tensor", "int?"."""
    overload: Any
    """What PyTorch's dispatcher calls."""
    check: Function
    """Raises UserError where the arguments do not fit together."""
    cast: tuple[str, ...]
    """Arguments that autocast casts, as those of `nn.Linear`; the others are taken as they come."""
    eager: Function
    """The composition for those who ask for it by name."""
    kept: Kept | None
    flops: Flops | None

    def check_kinds(self, arguments: tuple[Any, ...]) -> None:
        """That tensors are tensors and numbers numbers.

        Raises:
            UserError: one is something else.
        """
        for name, kind, argument in zip(self.arguments, self.kinds, arguments, strict=False):
            require_kind(name, kind, argument)

    def checked(self, composition: Function) -> Function:
        """A composition of what autocast makes of its arguments, which fit together."""

        def run(*arguments: Any) -> Any:
            given = self.check_cast(arguments)
            if given is arguments:
                return composition(*arguments)
            with torch.autocast(arguments[0].device.type, enabled=False):
                return composition(*given)

        return run

    def check_cast(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments as autocast makes them, checked; their kinds only where the check itself trips over one.

        Raises:
            UserError: they do not fit together.
        """
        try:
            given = self.as_cast(arguments)
            self.check(*given)
        except (RuntimeError, TypeError, AttributeError):
            self.check_kinds(arguments)
            raise
        return given

    def as_cast(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments as autocast makes them; themselves where it is off."""
        if not is_autocast_on(arguments[0].device.type):
            return arguments
        named = zip(self.arguments, arguments, strict=False)
        return tuple(to_autocast(a) if name in self.cast and a is not None else a for name, a in named)


def define(
    name: str,
    arguments: str,
    returns: str,
    *,
    plain: Function,
    fake: Function,
    eager: Function | None = None,
    kernel: Function | None = None,
    vmap: Function | None = None,
    kept: Kept | None = None,
    flops: Flops | None = None,
    check: Function,
    cast: tuple[str, ...] = (),
) -> Operation:
    """Define an operation's schemas and what they do before and without kernels.

    Args:
        name: in the library `sparseffn`.
        arguments: of its schema, in PyTorch's language.
        returns: its results, named: "Tensor logits, Tensor gates".
        plain: the composition that transforms look into. Defaults of its arguments are those of the schema.
        fake: the results for fake tensors.
        eager: another composition, which may read values on the host; what runs where there are no kernels.
        kernel: the operation below autograd, on every device that has no kernel of its own; None: it is the library's.
        vmap: its rule, as `torch.library.register_vmap` takes it; None: `plain` is batched.
        kept: what it keeps for backward; None: it has no gradient.
        flops: of a call, from the shapes of its arguments; a backward costs `kept.flops_of_backward` times as much.
        check: of its arguments; raises UserError.
        cast: arguments that autocast casts.

    Returns:
        The operation, for `backends.call`.
    """
    LIBRARY.define(f"{name}({arguments}) -> ({returns})")
    overload = getattr(torch.ops.sparseffn, name).default
    common = {"check": check, "cast": cast, "kept": kept, "flops": flops}
    kinds = tuple(argument.split()[0] for argument in arguments.split(","))
    bare = Operation(name=name, arguments=_names(arguments), kinds=kinds, overload=overload, eager=eager or plain, **common)
    plain, eager = bare.checked(plain), bare.checked(bare.eager)
    operation = replace(bare, eager=eager)
    for suffix, composition in (("plain", plain), ("eager", eager)):
        LIBRARY.define(f"{name}_{suffix}({arguments}) -> ({returns})")
        LIBRARY.impl(f"{name}_{suffix}", composition, "CompositeImplicitAutograd")
    _register_fake(name, fake)
    first = _until_kernels(overload, plain, eager)
    if kept is None:
        LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    else:
        gradients = ", ".join(f"Tensor {gradient}" for gradient in kept.gradients)
        LIBRARY.define(f"{name}_kept({arguments}) -> ({', '.join(filter(None, (returns, kept.returns)))})")
        LIBRARY.define(f"{name}_backward({kept.backward}) -> ({gradients})")
        _register_fake(f"{name}_kept", kept.fake)
        _register_fake(f"{name}_backward", _gradients_like(kept))
        LIBRARY.impl(name, first, "Autograd")
        if kept.kernels is not None:
            LIBRARY.impl(f"{name}_kept", bare.checked(kept.kernels[0]), "CompositeExplicitAutograd")
            LIBRARY.impl(f"{name}_backward", kept.kernels[1], "CompositeExplicitAutograd")
    LIBRARY.impl(name, first if kernel is None else bare.checked(kernel), "CompositeExplicitAutograd")
    if vmap is None:
        LIBRARY.impl(name, plain, "FuncTorchBatched")
    else:
        torch.library.register_vmap(f"sparseffn::{name}", vmap, lib=LIBRARY)
    OPERATIONS[name] = operation
    return operation


def _register_fake(name: str, fake: Function) -> None:
    """Also what runs where one tensor of several is on the meta device."""

    @functools.wraps(fake)
    def checked(*arguments: Any) -> Any:
        require_one_device(*(a for a in arguments if isinstance(a, Tensor)))
        return fake(*arguments)

    torch.library.register_fake(f"sparseffn::{name}", checked, lib=LIBRARY)


def _until_kernels(operation: Any, plain: Function, eager: Function) -> Function:
    """What is called before the library is loaded, and afterwards where it has nothing."""

    def first(*arguments: Any) -> Any:
        is_first = kernels_missing.cache_info().currsize == 0
        tensors = [a for a in arguments if isinstance(a, Tensor)]
        if kernels_missing() is None and is_first and tensors[0].device.type in _DEVICES:
            return operation(*arguments)
        return (plain if is_watched(tensors) else eager)(*arguments)

    return first


@functools.cache
def kernels_missing() -> str | None:
    """Why the compiled library is not there, logged once; None once it is loaded. Compiles it at the first call."""
    from sparseffn.ops.cpu import build

    reason = build.unavailable()
    if reason is None:
        # Of several threads that call first, one.
        with _REGISTERING:
            _register_library()
    return reason


_REGISTERING = threading.Lock()


@functools.cache
def _register_library() -> None:
    """Autograd of the loaded library for every operation, and the Triton kernels."""
    from sparseffn.ops import triton
    from sparseffn.ops.cpu import build

    for operation in OPERATIONS.values():
        if operation.kept is not None:
            build.differentiate(operation.name, operation.cast)
    if triton.is_installed():
        for name in triton.REGISTERED:
            LIBRARY.impl(name, _on_gpu(name, triton.lazily(name)), "CUDA")


def has_kernel(name: str, device_type: str) -> bool:
    """Whether an operation has a kernel for a device, and not a composition for all of them."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"sparseffn::{name}", device_type.upper())


def load() -> bool:
    """Load the library unless it is there, before a compiler traces an operation: it keeps what it found the first time.

    Returns:
        Whether it is loaded.
    """
    return kernels_missing() is None


# As `torch.compiler.assume_constant_result` does, which imports the compiler, and with it Triton.
vars(load)["_dynamo_marked_constant"] = True


def _on_gpu(name: str, function: Function) -> Function:
    """A Triton kernel; of a dtype that Triton has none for the composition, as C++ decides for calls with gradients."""

    def call(*arguments: Any) -> Any:
        if arguments[0].dtype == torch.float64 and name in OPERATIONS:
            return OPERATIONS[name].eager(*arguments)
        return function(*arguments)

    return call


@functools.cache
def register_flops() -> None:
    """Tell `torch.utils.flop_counter` what the operations cost, so that a `FlopCounterMode` made afterwards counts them.

    Not done at import, as PyTorch's module imports Triton where it is installed.
    """
    for operation in OPERATIONS.values():
        if operation.flops is not None:
            _register_flops(operation, operation.flops, operation.kept)


def _register_flops(operation: Operation, flops: Flops, kept: Kept | None) -> None:
    from torch.utils.flop_counter import register_flop_formula

    name = operation.name

    def forward(*shapes: Any, **_: Any) -> int:
        return flops(*shapes)

    def backward(*shapes: Any, **_: Any) -> int:
        assert kept is not None, "an operation without gradient has no backward"
        given = dict(zip(_names(kept.backward), shapes, strict=False))
        there = {gradient for gradient in kept.gradients if given.get(gradient) is not None}
        needed = given.get("needed") or [True] * len(kept.gradients)
        wanted = there.intersection(itertools.compress(kept.gradients, needed))
        return round(kept.flops_of_backward(wanted, there) * flops(*map(given.get, operation.arguments)))

    library = torch.ops.sparseffn
    register_flop_formula(getattr(library, name))(forward)
    if kept is not None:
        register_flop_formula(getattr(library, f"{name}_kept"))(forward)
        register_flop_formula(getattr(library, f"{name}_backward"))(backward)


def flops_of_pairs(wanted: set[str], there: set[str]) -> float:
    """`FlopsOfBackward` of key-value pairs: back through the values, back through the keys, and each weight's own product."""
    keys = {name for name in there if name.startswith(("keys", "gate_keys"))}
    through_values = bool(wanted - {"values", "value_bias"})
    through_keys = len(keys) if "x" in wanted else 0
    return (through_values + through_keys + len(wanted & (keys | {"values"}))) / (len(keys) + 1)


def runs_in_backward() -> bool:
    """Whether autograd runs this code inside a backward pass."""
    return _current_graph_task_id() != -1


def _gradients_like(kept: Kept) -> Function:
    """NAME_backward for fake tensors: gradients in the memory order of their arguments."""
    names = _names(kept.backward)
    places = [names.index(gradient) for gradient in kept.gradients]
    choice = names.index("needed") if "needed" in names else len(names)
    optional = next(i for i, name in enumerate(names) if not name.startswith("grad_"))

    def fake(*arguments: Any) -> Any:
        needed = (arguments[choice] if choice < len(arguments) else None) or [True] * len(places)
        given = [
            arguments[place] if place < len(arguments) and wanted else None
            for place, wanted in zip(places, needed, strict=True)
        ]
        some = arguments[optional]
        found: tuple[Any, ...] = tuple(some.new_empty(0) if t is None else gradient_like(t) for t in given)
        return found if len(kept.gradients) > 1 else next(iter(found))

    return fake


def gradient_like(tensor: Tensor) -> Tensor:
    """One after the other in memory; in the order of a weight if that has lines of rows or of columns."""
    if tensor.dim() == 3 and 1 in (same := torch.empty_like(tensor)).stride()[1:]:
        return same
    return tensor.new_empty(tensor.shape)


def _names(arguments: str) -> tuple[str, ...]:
    """Names of a schema's arguments."""
    return tuple(re.split(r"[ =]+", argument.strip())[1] for argument in arguments.split(","))
