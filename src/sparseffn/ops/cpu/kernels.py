"""The compiled kernels as functions of tensors. Shapes: see ops/README.md."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparseffn.ops._checks import bad_index, non_finite_gates
from sparseffn.ops.cpu.build import library

# As in csrc: vectors.h and activations.h.
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_ACTIVATIONS = {"relu": 0, "gelu": 1, "silu": 2, "identity": 3, "relu2": 4, "gelu_tanh": 5, "clamped_swiglu": 6}

_GATES = {"sigmoid": 0, "softmax": 1, "renormalised": 2}

# What kernels compute in and gates are.
_WIDE = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}

# What sort_by_expert returns, and every function that takes memory.
_BAD_INDEX, _NO_MEMORY = 1, 3

# Argument types of each function of the library: i an int, n an int64, d a double, p an address.
_SIGNATURES = {
    "sort_by_expert": "pnnippp",
    "experts": "ipppp",
    "experts_backward": "ippppp",
    "experts_inner": "ipppnpp",
    "experts_inner_backward": "ipppnppp",
}
_TYPES = {"i": ctypes.c_int, "n": ctypes.c_int64, "d": ctypes.c_double, "p": ctypes.c_void_p}


@functools.cache
def _functions() -> dict[str, Callable[..., int]]:
    lib, functions = library(), {}
    for name, types in _SIGNATURES.items():
        function = getattr(lib, f"sparseffn_{name}")
        function.argtypes = [_TYPES[t] for t in types]
        functions[name] = function
    return functions


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _in_memory_order(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _addresses(*tensors: Tensor | None) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*map(_address, tensors))


def _sizes(*numbers: int) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * (len(numbers) + 1))(*numbers, torch.get_num_threads())


def _sorted(indices: Tensor, gates: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    """The selections in stable order of their expert, and where each expert's begin."""
    indices = indices.contiguous()
    order, offsets = indices.new_empty(indices.numel()), indices.new_empty(n_experts + 1)
    problem = _functions()["sort_by_expert"](
        indices.data_ptr(),
        indices.numel(),
        n_experts,
        _DTYPES[gates.dtype],
        gates.data_ptr(),
        order.data_ptr(),
        offsets.data_ptr(),
    )
    if problem == _BAD_INDEX:
        raise bad_index("an expert", n_experts)
    _check_memory(problem)
    if problem:
        raise non_finite_gates()
    return order, offsets


def _check_memory(result: int) -> None:
    if result == _NO_MEMORY:
        raise MemoryError("the system refuses the memory that the experts' kernels need")


@dataclass(frozen=True)
class ExpertsInputs:
    """What the expert computation takes; weights may have any strides. See `ops.experts`."""

    x: Tensor
    keys: Tensor
    values: Tensor
    gates: Tensor
    gate_keys: Tensor | None = None
    key_bias: Tensor | None = None
    gate_bias: Tensor | None = None
    value_bias: Tensor | None = None
    keep: Tensor | None = None
    keep_scale: float = 1.0
    activation: str = "relu"
    alpha: float = 1.702
    limit: float = 7.0

    def in_memory_order(self) -> ExpertsInputs:
        """The same with everything contiguous but the weights."""
        small = ("x", "gates", "key_bias", "gate_bias", "value_bias", "keep")
        return replace(self, **{name: _in_memory_order(getattr(self, name)) for name in small})

    @property
    def n_kept(self) -> int:
        """Numbers that backward needs of each hidden unit."""
        return 1 if self.gate_keys is None else 2

    def arguments(self, hidden: Tensor | None, order: Tensor, offsets: Tensor) -> tuple[object, ...]:
        """What every function of the library is called with first."""
        n_experts, width, size = self.keys.shape
        weights = (self.keys, self.gate_keys, self.values)
        biases = (self.key_bias, self.gate_bias, self.value_bias)
        sizes = self.gates.shape[0], width, n_experts, size, self.gates.shape[1], _ACTIVATIONS[self.activation]
        strides = _strides(*weights)
        return (
            _DTYPES[self.x.dtype],
            _addresses(self.x, *weights, *biases, self.gates, hidden, self.keep, order, offsets),
            (ctypes.c_int64 * (7 + len(strides)))(*sizes, torch.get_num_threads(), *strides),
            (ctypes.c_double * 3)(self.keep_scale, self.alpha, self.limit),
        )

    def gradients(self, grad_y: Tensor) -> tuple[tuple[Tensor | None, ...], tuple[object, ...]]:
        """Memory for those of x, keys, gate_keys, values, key_bias, gate_bias, value_bias and gates; last arguments for it."""
        names = ("x", "keys", "gate_keys", "values", "key_bias", "gate_bias", "value_bias", "gates")
        inputs = (getattr(self, name) for name in names)
        grads = tuple(None if t is None else _lines_like(t) for t in inputs)
        strides = _strides(*grads[1:4])
        return grads, (_addresses(grad_y, *grads), (ctypes.c_int64 * len(strides))(*strides))


def _strides(*tensors: Tensor | None) -> list[int]:
    return [stride for t in tensors for stride in ((0, 0, 0) if t is None else t.stride())]


def _lines_like(tensor: Tensor) -> Tensor:
    """Unwritten memory with the order of a tensor's last two dimensions."""
    if tensor.ndim < 3 or tensor.stride(-1) <= tensor.stride(-2):
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)
    return torch.empty_like(tensor.mT, memory_format=torch.contiguous_format).mT


def experts_forward(
    inputs: ExpertsInputs, indices: Tensor, *, save: bool, inner_k: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, what backward needs of the hidden units, of survivors their positions, and the selections sorted by expert."""
    inputs = inputs.in_memory_order()
    (n_tokens, k), n_experts, size = inputs.gates.shape, inputs.keys.shape[0], inputs.keys.shape[2]
    order, offsets = _sorted(indices, inputs.gates, n_experts)
    x, y = inputs.x, torch.empty_like(inputs.x)
    if inner_k is not None:
        hidden = x.new_empty(n_tokens, inputs.n_kept * inner_k)
        positions = x.new_empty(n_tokens, inner_k, dtype=torch.int32)
        first = inputs.arguments(hidden, order, offsets)
        result = _functions()["experts_inner"](*first, inner_k, positions.data_ptr(), y.data_ptr())
    else:
        hidden = x.new_empty(n_tokens * k if save else 0, inputs.n_kept * size)
        positions = x.new_empty(0, dtype=torch.int32)
        result = _functions()["experts"](*inputs.arguments(hidden if save else None, order, offsets), y.data_ptr())
    _check_memory(result)
    return y, hidden, positions, order, offsets


def experts_backward(
    grad_y: Tensor, inputs: ExpertsInputs, hidden: Tensor, positions: Tensor, order: Tensor, offsets: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of x, keys, gate_keys, values, key_bias, gate_bias, value_bias and gates, in the weights' memory order."""
    inputs, grad_y = inputs.in_memory_order(), grad_y.contiguous()
    grads, last = inputs.gradients(grad_y)
    first = inputs.arguments(hidden, order, offsets)
    if positions.numel():
        result = _functions()["experts_inner_backward"](*first, positions.shape[1], positions.data_ptr(), *last)
    else:
        result = _functions()["experts_backward"](*first, *last)
    _check_memory(result)
    return grads


def expert_mlp(
    x: Tensor, keys: Tensor, values: Tensor, gates: Tensor, indices: Tensor, keep: Tensor | None, keep_scale: float,
    activation: str, *, save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See `ops.expert_mlp`; with `save` also the kept hidden units, else an empty tensor."""
    inputs = ExpertsInputs(x, keys, values, gates, keep=keep, keep_scale=keep_scale, activation=activation)
    y, hidden, _, order, offsets = experts_forward(inputs, indices, save=save)
    return y, hidden, order, offsets


def expert_mlp_backward(
    grad: Tensor, x: Tensor, keys: Tensor, values: Tensor, gates: Tensor, hidden: Tensor, order: Tensor,
    offsets: Tensor, keep: Tensor | None, keep_scale: float, activation: str,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of x, keys, values and gates."""
    inputs = ExpertsInputs(x, keys, values, gates, keep=keep, keep_scale=keep_scale, activation=activation)
    grads = experts_backward(grad, inputs, hidden, order.new_empty(0, dtype=torch.int32), order, offsets)
    return grads[0], grads[1], grads[3], grads[7]


def expert_mlp_inner(
    x: Tensor, keys: Tensor, values: Tensor, gates: Tensor, indices: Tensor, keep: Tensor | None, keep_scale: float,
    activation: str, inner_k: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See `ops.expert_mlp_inner`."""
    inputs = ExpertsInputs(x, keys, values, gates, keep=keep, keep_scale=keep_scale, activation=activation)
    return experts_forward(inputs, indices, save=True, inner_k=inner_k)


def expert_mlp_inner_backward(
    grad: Tensor, x: Tensor, keys: Tensor, values: Tensor, gates: Tensor, survivors: Tensor, positions: Tensor,
    order: Tensor, offsets: Tensor, keep_scale: float, activation: str,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of x, keys, values and gates."""
    inputs = ExpertsInputs(x, keys, values, gates, keep_scale=keep_scale, activation=activation)
    grads = experts_backward(grad, inputs, survivors, positions, order, offsets)
    return grads[0], grads[1], grads[3], grads[7]
