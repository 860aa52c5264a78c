"""The compiled kernels as functions of tensors. Shapes: see ops/README.md."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from sparseffn.ops._checks import bad_index, non_finite_gates, non_finite_scores
from sparseffn.ops.cpu.build import library

# As in csrc: vectors.h and activations.h.
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}
_ACTIVATIONS = {"relu": 0, "gelu": 1, "silu": 2, "identity": 3}

_GATES = {"sigmoid": 0, "softmax": 1, "renormalised": 2}

# What kernels compute in and gates are.
_WIDE = {torch.float32: torch.float32, torch.float64: torch.float64, torch.bfloat16: torch.float32}

# What sort_by_expert returns.
_BAD_INDEX = 1

# Argument types of each function of the library: i an int, n an int64, d a double, p an address.
_SIGNATURES = {
    "sort_by_expert": "pnnippp",
    "experts": "ippdp",
    "experts_backward": "ippdp",
    "experts_inner": "ippdnpp",
    "experts_inner_backward": "ippdnpp",
    "weighted_rows": "ippppp",
    "weighted_rows_backward": "ippppppp",
    "assign": "pnnp",
    "routed_experts": "ippppnnnnniiippp",
    "routed_training": "ippppnnnnniii" + "p" * 7,
    "routed_training_backward": "ippppnnnnniii" + "p" * 12,
    "linear": "ipppp",
    "topk": "ippp",
    "product_key_topk": "ippppp",
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


def _routed(
    x: Tensor, keys: Tensor, values: Tensor, gates: Tensor, indices: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor, Tensor]:
    """The first four in memory order, and the selections sorted by expert."""
    n_experts = keys.shape[0]
    indices, gates = indices.contiguous(), gates.contiguous()
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
    if problem:
        raise non_finite_gates()
    return (x.contiguous(), keys.contiguous(), values.contiguous(), gates), order, offsets


def _experts_sizes(keys: Tensor, gates: Tensor, activation: str) -> ctypes.Array[ctypes.c_int64]:
    n_experts, width, size = keys.shape
    return _sizes(gates.shape[0], width, n_experts, size, gates.shape[1], _ACTIVATIONS[activation])


def expert_mlp(
    x: Tensor, keys: Tensor, values: Tensor, gates: Tensor, indices: Tensor, keep: Tensor | None, keep_scale: float,
    activation: str, *, save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See `ops.expert_mlp`; with `save` also the kept hidden units, else an empty tensor."""
    keep = _in_memory_order(keep)
    inputs, order, offsets = _routed(x, keys, values, gates, indices)
    hidden = x.new_empty(indices.numel() if save else 0, keys.shape[2])
    y = torch.empty_like(inputs[0])
    _functions()["experts"](
        _DTYPES[x.dtype],
        _addresses(*inputs, hidden if save else None, keep, order, offsets),
        _experts_sizes(keys, gates, activation),
        keep_scale,
        y.data_ptr(),
    )
    return y, hidden, order, offsets


def expert_mlp_backward(
    grad: Tensor, x: Tensor, keys: Tensor, values: Tensor, gates: Tensor, hidden: Tensor, order: Tensor,
    offsets: Tensor, keep: Tensor | None, keep_scale: float, activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, keys, values and gates."""
    keep = _in_memory_order(keep)
    inputs = tuple(t.contiguous() for t in (x, keys, values, gates))
    grads = tuple(torch.empty_like(t) for t in inputs)
    grad = grad.contiguous()
    _functions()["experts_backward"](
        _DTYPES[x.dtype],
        _addresses(*inputs, hidden, keep, order, offsets),
        _experts_sizes(keys, gates, activation),
        keep_scale,
        _addresses(grad, *grads),
    )
    return grads[0], grads[1], grads[2], grads[3]


def expert_mlp_inner(
    x: Tensor, keys: Tensor, values: Tensor, gates: Tensor, indices: Tensor, keep: Tensor | None, keep_scale: float,
    activation: str, inner_k: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See `ops.expert_mlp_inner`."""
    keep = _in_memory_order(keep)
    inputs, order, offsets = _routed(x, keys, values, gates, indices)
    survivors = x.new_empty(x.shape[0], inner_k)
    positions = survivors.new_empty(survivors.shape, dtype=torch.int32)
    y = torch.empty_like(inputs[0])
    _functions()["experts_inner"](
        _DTYPES[x.dtype],
        _addresses(*inputs, survivors, keep, order, offsets),
        _experts_sizes(keys, gates, activation),
        keep_scale,
        inner_k,
        positions.data_ptr(),
        y.data_ptr(),
    )
    return y, survivors, positions, order, offsets


def expert_mlp_inner_backward(
    grad: Tensor, x: Tensor, keys: Tensor, values: Tensor, gates: Tensor, survivors: Tensor, positions: Tensor,
    order: Tensor, offsets: Tensor, keep_scale: float, activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, keys, values and gates."""
    inputs = tuple(t.contiguous() for t in (x, keys, values, gates))
    grads = tuple(torch.empty_like(t) for t in inputs)
    grad = grad.contiguous()
    _functions()["experts_inner_backward"](
        _DTYPES[x.dtype],
        _addresses(*inputs, survivors, None, order, offsets),
        _experts_sizes(keys, gates, activation),
        keep_scale,
        survivors.shape[1],
        positions.data_ptr(),
        _addresses(grad, *grads),
    )
    return grads[0], grads[1], grads[2], grads[3]


def _routed_inputs(
    x: Tensor, selector: Tensor, keys: Tensor, values: Tensor, k: int, gate: str, activation: str
) -> tuple[int, ...]:
    """What every operation that routes is called with first."""
    (n_tokens, width), (n_experts, _, size) = x.shape, keys.shape
    addresses = x.data_ptr(), selector.data_ptr(), keys.data_ptr(), values.data_ptr()
    codes = _ACTIVATIONS[activation], _GATES[gate], torch.get_num_threads()
    return _DTYPES[x.dtype], *addresses, n_tokens, width, n_experts, size, k, *codes


def routed_mlp(
    x: Tensor, selector: Tensor, keys: Tensor, values: Tensor, k: int, gate: str, activation: str, *, selection: bool = True
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See `ops.routed_mlp`; without `selection` the output alone."""
    x, selector, keys, values = x.contiguous(), selector.contiguous(), keys.contiguous(), values.contiguous()
    y = torch.empty_like(x)
    indices = x.new_empty(x.shape[0], k, dtype=torch.int64) if selection else None
    gates = x.new_empty(x.shape[0], k, dtype=_WIDE[x.dtype]) if selection else None
    problem = _functions()["routed_experts"](
        *_routed_inputs(x, selector, keys, values, k, gate, activation),
        y.data_ptr(),
        _address(indices),
        _address(gates),
    )
    if problem:
        raise non_finite_gates()
    return y, indices, gates


def routed_training(
    x: Tensor, selector: Tensor, keys: Tensor, values: Tensor, k: int, gate: str, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """See `ops.routed_training`; last what backward needs beside the inputs, indices and gates."""
    x, selector, keys, values = x.contiguous(), selector.contiguous(), keys.contiguous(), values.contiguous()
    n_tokens, n_experts, size = x.shape[0], keys.shape[0], keys.shape[2]
    y, logits, gates = torch.empty_like(x), x.new_empty(n_tokens, n_experts), x.new_empty(n_tokens, k)
    indices, hidden = x.new_empty(n_tokens, k, dtype=torch.int64), x.new_empty(n_tokens * k, size)
    order, offsets = indices.new_empty(n_tokens * k), indices.new_empty(n_experts + 1)
    problem = _functions()["routed_training"](
        *_routed_inputs(x, selector, keys, values, k, gate, activation),
        y.data_ptr(),
        logits.data_ptr(),
        indices.data_ptr(),
        gates.data_ptr(),
        hidden.data_ptr(),
        order.data_ptr(),
        offsets.data_ptr(),
    )
    if problem:
        raise non_finite_gates()
    return y, logits, indices, gates, (hidden, order, offsets)


def routed_training_backward(
    grad: Tensor, grad_gates: Tensor | None, grad_logits: Tensor | None, x: Tensor, selector: Tensor, keys: Tensor,
    values: Tensor, indices: Tensor, gates: Tensor, hidden: Tensor, order: Tensor, offsets: Tensor, gate: str,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, selector, keys and values."""
    x, selector, keys, values = x.contiguous(), selector.contiguous(), keys.contiguous(), values.contiguous()
    grad, grad_gates, grad_logits = grad.contiguous(), _in_memory_order(grad_gates), _in_memory_order(grad_logits)
    grad_x, grad_selector = torch.empty_like(x), torch.empty_like(selector)
    grad_keys, grad_values = torch.empty_like(keys), torch.empty_like(values)
    _functions()["routed_training_backward"](
        *_routed_inputs(x, selector, keys, values, indices.shape[1], gate, activation),
        indices.data_ptr(),
        gates.data_ptr(),
        hidden.data_ptr(),
        order.data_ptr(),
        offsets.data_ptr(),
        grad.data_ptr(),
        _address(grad_gates),
        _address(grad_logits),
        grad_x.data_ptr(),
        grad_selector.data_ptr(),
        grad_keys.data_ptr(),
        grad_values.data_ptr(),
    )
    return grad_x, grad_selector, grad_keys, grad_values


def router_logits(x: Tensor, selector: Tensor) -> Tensor:
    """See `ops.router_logits`."""
    x, selector = x.contiguous(), selector.contiguous()
    logits = x.new_empty(x.shape[0], selector.shape[0])
    sizes = _sizes(*x.shape, selector.shape[0])
    _functions()["linear"](_DTYPES[x.dtype], x.data_ptr(), selector.data_ptr(), sizes, logits.data_ptr())
    return logits


def weighted_rows(values: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """See `ops.weighted_rows`."""
    values, indices = values.contiguous(), indices.contiguous()
    weights = weights.to(torch.promote_types(values.dtype, torch.float32)).contiguous()
    y = values.new_empty(indices.shape[0], values.shape[1])
    if _functions()["weighted_rows"](
        _DTYPES[values.dtype],
        values.data_ptr(),
        indices.data_ptr(),
        weights.data_ptr(),
        _sizes(*values.shape, *indices.shape),
        y.data_ptr(),
    ):
        raise bad_index("a row of `values`", values.shape[0])
    return y


def weighted_rows_backward(grad: Tensor, values: Tensor, indices: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the value table and of the weights."""
    grad, values, indices = grad.contiguous(), values.contiguous(), indices.contiguous()
    wide = weights.to(torch.promote_types(values.dtype, torch.float32)).contiguous()
    grad_values, grad_weights = torch.empty_like(values), torch.empty_like(wide)
    _functions()["weighted_rows_backward"](
        _DTYPES[values.dtype],
        values.data_ptr(),
        indices.data_ptr(),
        wide.data_ptr(),
        _sizes(*values.shape, *indices.shape),
        grad.data_ptr(),
        grad_values.data_ptr(),
        grad_weights.data_ptr(),
    )
    return grad_values, grad_weights.to(weights.dtype)


def topk(scores: Tensor, k: int, ordered: bool) -> Tensor:
    """See `ops.topk`."""
    wide = scores if scores.dtype == torch.float64 else scores.float()
    wide, n = wide.contiguous(), scores.shape[-1]
    chosen = wide.new_empty(*scores.shape[:-1], k, dtype=torch.int64)
    n_rows = chosen.numel() // k if k else 0
    _functions()["topk"](_DTYPES[wide.dtype], wide.data_ptr(), _sizes(n_rows, n, k, int(ordered)), chosen.data_ptr())
    return chosen


def product_key_topk(scores_a: Tensor, scores_b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `ops.product_key_topk`."""
    wide = torch.promote_types(scores_a.dtype, torch.float32)
    a, b = scores_a.to(wide).contiguous(), scores_b.to(wide).contiguous()
    sums = a.new_empty(*a.shape[:-1], k)
    indices = sums.new_empty(sums.shape, dtype=torch.int64)
    _functions()["product_key_topk"](
        _DTYPES[wide],
        a.data_ptr(),
        b.data_ptr(),
        _sizes(sums.numel() // k, a.shape[-1], b.shape[-1], k),
        sums.data_ptr(),
        indices.data_ptr(),
    )
    return sums.to(scores_a.dtype), indices


def balanced_assignment(scores: Tensor) -> Tensor:
    """See `ops.balanced_assignment`."""
    wide = scores.double().contiguous()
    if not bool(wide.isfinite().all()):
        raise non_finite_scores()
    assigned = wide.new_empty(scores.shape[0], dtype=torch.int64)
    if scores.shape[0]:
        _functions()["assign"](wide.data_ptr(), *scores.shape, assigned.data_ptr())
    return assigned
