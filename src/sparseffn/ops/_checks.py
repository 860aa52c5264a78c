"""Errors of input that only a look at the numbers shows; made where that look is cheap."""

from __future__ import annotations

from torch import Tensor

from sparseffn.errors import NonFiniteError, UserError


def bad_index(what: str, n: int) -> UserError:
    """An index outside 0..n-1."""
    return UserError(f"`indices` must be between 0 and {n - 1}, {what} each; got one outside; fix: check what selects them")


def non_finite_gates() -> NonFiniteError:
    """A score of a selection that is NaN or infinite."""
    return NonFiniteError(
        "`gates` must be finite; got NaN or infinity; fix: the router's scores diverged, train with a lower lr or in float32"
    )


def non_finite_scores() -> NonFiniteError:
    """Scores of an assignment that are NaN or infinite."""
    return NonFiniteError("`scores` must be finite; got NaN or infinity; fix: check the router's input")


def check_routing(gates: Tensor, indices: Tensor, n_experts: int) -> None:
    """Look at indices and gates where that needs no synchronisation with a device: on the CPU.

    Raises:
        UserError: an index is that of no expert.
        NonFiniteError: a gate is NaN or infinite.
    """
    if indices.device.type != "cpu" or indices.numel() == 0:
        return
    _check_range(indices, "an expert", n_experts)
    if not bool(gates.isfinite().all()):
        raise non_finite_gates()


def check_rows(indices: Tensor, n_rows: int) -> None:
    """The same for indices of value rows.

    Raises:
        UserError: an index is that of no row.
    """
    if indices.device.type == "cpu" and indices.numel():
        _check_range(indices, "a row of `values`", n_rows)


def _check_range(indices: Tensor, what: str, n: int) -> None:
    if int(indices.min()) < 0 or int(indices.max()) >= n:
        raise bad_index(what, n)


def require_one_device(*tensors: Tensor) -> None:
    """Kernels take addresses, which mean nothing on another device.

    Raises:
        UserError: the tensors are on several devices.
    """
    devices = {t.device for t in tensors}
    if len(devices) > 1:
        named = " and ".join(sorted(map(str, devices)))
        raise UserError(f"all tensors must be on one device; got {named}; fix: move them with .to(device)")
