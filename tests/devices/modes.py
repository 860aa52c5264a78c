"""Two modes that find, without a GPU, what would fail or wait on one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import sparseffn

# As the files of functions are named; with `pathlib`, for every operation of a step, a test would take half as long again.
PACKAGE = str(sparseffn.__file__).removesuffix("__init__.py")
FACTORIES = (
    *(torch.arange, torch.as_tensor, torch.empty, torch.eye, torch.full, torch.linspace, torch.logspace, torch.normal),
    *(torch.ones, torch.rand, torch.randint, torch.randn, torch.randperm, torch.scalar_tensor, torch.tensor, torch.zeros),
)
FROM_NUMBERS = (torch.tensor, torch.as_tensor)
COPYING = (Tensor.new_tensor,)


class OneDevice(TorchDispatchMode):
    """Refuses every operation whose tensors are on two devices, 0-dimensional ones of the CPU apart; copies are meant to be."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        tensors = list(tensors_in((args, kwargs or {})))
        devices = {t.device for t in tensors if t.dim() > 0 or t.device.type != "cpu"}
        if len(devices) > 1 and func not in (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default):
            raise AssertionError(f"{func} got tensors on {sorted(map(str, devices))}")
        return func(*args, **(kwargs or {}))


class NamedDevice(TorchFunctionMode):
    """Refuses every tensor that a file of the package makes without naming its device, or on a device from Python numbers."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        caller = sys._getframe(1)
        path = caller.f_code.co_filename
        if path.startswith(PACKAGE):
            device, where = (kwargs or {}).get("device"), f"{path.removeprefix(PACKAGE)}:{caller.f_lineno}"
            assert func not in FACTORIES or device is not None, f"{where} calls {func.__name__} without a device"
            copies = func in COPYING or (func in FROM_NUMBERS and str(device) != "cpu")
            assert not copies, f"{where} copies Python numbers to a device, for which the host waits"
        return func(*args, **(kwargs or {}))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested arguments."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
