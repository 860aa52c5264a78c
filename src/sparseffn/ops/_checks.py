"""Checks that operations share, with the words that a user reads.

Values are looked at where that waits for nothing. On a GPU nothing looks: the host would wait for the numbers, and an assert on
the device loses its context. Kernels there never read through a bad index, and a NaN reaches the output of its token.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterable

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack

from sparseffn.errors import UserError

# Of a schema's arguments: in words, and what Python has for it. Compilers have numbers of their own.
_KINDS: dict[str, tuple[str, tuple[type, ...]]] = {
    "Tensor": ("a tensor", (Tensor,)),
    "int": ("an integer", (numbers.Integral, torch.SymInt)),
    "float": ("a number", (numbers.Real, torch.SymInt, torch.SymFloat)),
    "bool": ("a bool", (bool, torch.SymBool)),
    "str": ("a string", (str,)),
}


def is_watched(tensors: Iterable[Tensor]) -> bool:
    """Whether values cannot be read on the host: a compiler, a transform of `torch.func` or a mode is at work, or the tensors
    are none.
    """
    if torch.compiler.is_compiling() or _len_torch_dispatch_stack() or peek_interpreter_stack() is not None:
        return True
    return any(type(t) not in (Tensor, torch.nn.Parameter) or t.is_meta for t in tensors)


def check_indices(indices: Tensor, what: str, n: int, name: str = "indices") -> None:
    """Look at indices of `what`, of which there are n, where that waits for nothing.

    Raises:
        UserError: one is outside 0..n-1.
    """
    if indices.numel() == 0 or indices.device.type != "cpu" or is_watched((indices,)):
        return
    least, most = indices.detach().aminmax()
    if least.item() < 0 or most.item() >= n:
        raise UserError(f"`{name}` must be between 0 and {n - 1}, {what} each; got one outside; fix: check what selects them")


def check_selections(indices: Tensor, weights: Tensor, n: int, *, size: str = "n_experts", what: str = "an expert") -> None:
    """That they are a choice of each token among n experts, or of `what` else, whose number is called `size`.

    Raises:
        UserError: shapes, dtypes or devices do not fit together, or an index is outside 0..n-1.
    """
    if indices.dim() != 2 or weights.shape != indices.shape or indices.dtype != torch.int64 or n < 1:
        raise UserError(
            f"`indices` must be int64 [T, K], `weights` alike and `{size}` at least 1; got {indices.dtype} "
            f"{tuple(indices.shape)}, {tuple(weights.shape)} and {n}; fix: flatten leading dimensions first"
        )
    if not weights.is_floating_point():
        raise UserError(f"`weights` must be floating; got {weights.dtype}; fix: cast them")
    require_one_device(indices, weights)
    check_indices(indices, what, n)


def check_mask(mask: Tensor | None, rows: Tensor, n_dims: int = 1) -> None:
    """That it says of each row whether it counts; the first `n_dims` dimensions of `rows` are those of its rows.

    Raises:
        UserError: it is not bool, of another shape, or on another device.
    """
    if mask is not None and (mask.shape != rows.shape[:n_dims] or mask.dtype != torch.bool):
        raise UserError(
            f"`mask` must be bool, one a token, shape {tuple(rows.shape[:n_dims])}; "
            f"got {mask.dtype} in shape {tuple(mask.shape)}; fix: reshape it, compare with 0"
        )
    require_one_device(rows, mask)


def require_kind(name: str, kind: str, argument: object) -> None:
    """That an argument is what its schema says: "Tensor", or "int?" for one that may be None. Lists are PyTorch's to check.

    Raises:
        UserError: it is something else.
    """
    if kind.removesuffix("?") not in _KINDS:
        return
    words, types = _KINDS[kind.removesuffix("?")]
    optional = kind.endswith("?")
    if not isinstance(argument, types) and not (optional and argument is None):
        got = "None" if argument is None else f"a {type(argument).__name__}"
        raise UserError(f"`{name}` must be {words}{' or None' if optional else ''}; got {got}; fix: pass {words}")


def require_tensors(**tensors: object) -> None:
    """For what a public function reads of its arguments before the operation sees them.

    Raises:
        UserError: one is no tensor.
    """
    for name, tensor in tensors.items():
        require_kind(name, "Tensor", tensor)


def require_one_device(*tensors: Tensor | None) -> None:
    """Kernels take addresses, which mean nothing on another device.

    Raises:
        UserError: the tensors are on several devices.
    """
    devices = {str(tensor.device) for tensor in tensors if tensor is not None}
    if len(devices) > 1:
        named = " and ".join(sorted(devices))
        raise UserError(f"all tensors must be on one device; got {named}; fix: move them with .to(device)")


def require_shapes(**shapes: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """That tensors which are there have the shape beside them.

    Raises:
        UserError: one has another.
    """
    for name, (tensor, shape) in shapes.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise UserError(f"`{name}` must be {shape}; got {tuple(tensor.shape)}; fix: check its layout")


def require_one_dtype(names: str, *tensors: Tensor | None) -> None:
    """That tensors which are there share a floating dtype; messages call them `names`.

    Raises:
        UserError: they do not.
    """
    dtypes = [tensor.dtype for tensor in tensors if tensor is not None]
    if len(set(dtypes)) > 1 or not dtypes[0].is_floating_point:
        raise UserError(f"{names} must share a floating dtype; got {', '.join(map(str, dtypes))}; fix: cast them")
