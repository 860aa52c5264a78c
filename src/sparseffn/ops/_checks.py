"""Errors of input that only a look at the numbers shows; made where that look is cheap.

On a CPU a failed check raises immediately. On a GPU nothing looks: the host would wait for the numbers, and an assert on the
device loses its context. Kernels there never read through a bad index, and a NaN reaches the output of its token.
"""

from __future__ import annotations

from torch import Tensor

from sparseffn.errors import UserError


def bad_index(what: str, n: int, name: str = "indices") -> UserError:
    return UserError(f"`{name}` must be between 0 and {n - 1}, {what} each; got one outside; fix: check what selects them")


def check_indices(indices: Tensor, what: str, n: int, name: str = "indices") -> None:
    """Look at indices of `what`, of which there are n, where that waits for nothing.

    Raises:
        UserError: one is outside 0..n-1.
    """
    if indices.numel() == 0 or indices.device.type != "cpu":
        return
    least, most = indices.detach().aminmax()
    if least.item() < 0 or most.item() >= n:
        raise bad_index(what, n, name)


def check_rows(indices: Tensor, n_rows: int) -> None:
    """Look at indices of value rows.

    Raises:
        UserError: an index is that of no row.
    """
    check_indices(indices, "a row of `values`", n_rows)


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
