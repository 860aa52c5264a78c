"""Triton's interpreter with bfloat16 as GPUs have it, and without what it does again for every call.

Triton 3.7 to 3.9 multiply bfloat16 matrices as if their bits were integers, and cut float32 off where they convert it to
bfloat16; hardware rounds to the nearest, ties to even.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime import interpreter

_PLAIN_CONVERT = interpreter._convert_float
_PLAIN_DOT = interpreter.InterpreterBuilder.create_dot
_PLAIN_NP_DTYPE = interpreter._get_np_dtype


def _convert(values: NDArray[Any], source: tl.dtype, target: tl.dtype, rounding: Any) -> NDArray[Any]:
    if source == tl.bfloat16 and target == tl.float32:
        return values.view(np.uint16).astype(np.uint32) << 16
    if source == tl.float32 and target == tl.bfloat16:
        bits = np.ascontiguousarray(values).view(np.uint32)
        nearest = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(values), 0x7FC0, nearest).astype(np.uint16)
    return _PLAIN_CONVERT(values, source, target, rounding)


def _upcast(block: Any) -> Any:
    if block.dtype.scalar != tl.bfloat16:
        return block
    return interpreter.TensorHandle(_convert(block.data, tl.bfloat16, tl.float32, None).view(np.float32), tl.float32)


def _dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    return _PLAIN_DOT(self, _upcast(a), _upcast(b), *rest)


# By name, as not every type of Triton's can be hashed.
_np_dtypes: dict[str, np.dtype[Any]] = {}


def _np_dtype(dtype: tl.dtype) -> np.dtype[Any]:
    name = dtype.scalar.name
    if name not in _np_dtypes:
        _np_dtypes[name] = _PLAIN_NP_DTYPE(dtype.scalar)
    return _np_dtypes[name]


def mend() -> None:
    """Put the corrections in place, for this process; the sample of cases then takes 65 seconds instead of 200."""
    interpreter._convert_float = _convert
    interpreter.InterpreterBuilder.create_dot = _dot
    # Triton redirects its whole language to the interpreter, for every call of a function; once is enough.
    changes = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    # What takes changes back after a launch has none to take back; None in Triton 3.5.
    interpreter._patch_lang = lambda _: type(changes)()
    interpreter._get_np_dtype = _np_dtype
    # It would compute sums of integers again in int64, for an assertion that is not made without `debug`.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
