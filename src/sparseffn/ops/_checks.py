"""Errors of input that only a look at the numbers shows; made where that look is cheap.

On a CPU a failed check raises immediately. On a GPU nothing looks: the host would wait for the numbers, and an assert on the
device loses its context. Kernels there never read through a bad index, and a NaN reaches the output of its token.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from sparseffn.errors import NonFiniteError, UserError


def bad_index(what: str, n: int, name: str = "indices") -> UserError:
    return UserError(f"`{name}` must be between 0 and {n - 1}, {what} each; got one outside; fix: check what selects them")


def non_finite_gates() -> NonFiniteError:
    return NonFiniteError(
        "`gates` must be finite; got NaN or infinity; fix: the router's scores diverged, train with a lower lr or in float32"
    )


def non_finite(name: str) -> NonFiniteError:
    return NonFiniteError(
        f"`{name}` must be finite; got NaN or infinity; fix: train with a lower lr, or check the layer's input"
    )


def non_finite_scores() -> NonFiniteError:
    return NonFiniteError("`scores` must be finite; got NaN or infinity; fix: check the router's input")


def check_routing(gates: Tensor, indices: Tensor, n_experts: int) -> None:
    """Look at the indices and gates of a selection of experts.

    Raises:
        UserError: an index is that of no expert.
        NonFiniteError: a gate is NaN or infinite.
    """
    check_indices(indices, "an expert", n_experts)
    _demand_between(gates, -math.inf, math.inf, non_finite_gates)


def check_indices(indices: Tensor, what: str, n: int, name: str = "indices") -> None:
    """Look at indices of `what`, of which there are n.

    Raises:
        UserError: one is outside 0..n-1.
    """
    _demand_between(indices, -1, n, lambda: bad_index(what, n, name))


def check_rows(indices: Tensor, n_rows: int) -> None:
    """Look at indices of value rows.

    Raises:
        UserError: an index is that of no row.
    """
    check_indices(indices, "a row of `values`", n_rows)


def check_finite(tensor: Tensor, name: str) -> None:
    """Look at scores or weights.

    Raises:
        NonFiniteError: one is NaN or infinite.
    """
    _demand_between(tensor, -math.inf, math.inf, lambda: non_finite(name))


def check_expert_rows(tokens: Tensor, offsets: Tensor, n_tokens: int) -> None:
    """Look at rows sorted by expert: no row may be without an expert or a token.

    Raises:
        UserError: one is.
    """
    starts_and_ends = (offsets[0] == 0) & (offsets[-1] == tokens.shape[0]) & (offsets.diff() >= 0).all()
    _demand(starts_and_ends & ((tokens >= 0) & (tokens < n_tokens)).all(), _bad_rows)


def require_one_device(*tensors: Tensor) -> None:
    """Kernels take addresses, which mean nothing on another device.

    Raises:
        UserError: the tensors are on several devices.
    """
    device = tensors[0].device
    for tensor in tensors:
        if tensor.device != device:
            named = " and ".join(sorted({str(tensor.device) for tensor in tensors}))
            raise UserError(f"all tensors must be on one device; got {named}; fix: move them with .to(device)")


def _bad_rows() -> UserError:
    return UserError(
        "`rows` must be sorted by expert and belong to tokens and experts that exist; got a row that does not; "
        "fix: make them with ops.sort_by_expert, from indices below n_units"
    )


def _demand_between(tensor: Tensor, low: float, high: float, error: Callable[[], UserError]) -> None:
    """Every entry lies strictly between two numbers; NaN never does."""
    if tensor.numel() == 0 or not _is_on_host(tensor):
        return
    least, most = tensor.detach().aminmax()
    # NaN is the least and the most of whatever holds one.
    if not (least.item() > low and most.item() < high):
        raise error()


def _demand(holds: Tensor, error: Callable[[], UserError]) -> None:
    if _is_on_host(holds) and not holds:
        raise error()


def _is_on_host(tensor: Tensor) -> bool:
    """Whether a look at the numbers waits for nothing."""
    return tensor.device.type == "cpu"
