"""Expert matrix products (CVMM, equation 26): each row is multiplied with the matrix of its expert.

`expert_up` gathers its input rows and `expert_down` scales rows by the router's scores and sums them per token, so that a
mixture-of-experts layer is sort, up, activation, down. Shapes: see ops/README.md.
"""
# Annotations stay real objects here: torch.library reads them to infer the schema.

import torch
from torch import Tensor

from sparseffn.errors import UserError
from sparseffn.ops._checks import check_expert_rows, check_finite, check_indices, require_one_device
from sparseffn.ops.autocast import to_autocast
from sparseffn.ops.backends import direct_kernel, is_traced, kernel
from sparseffn.ops.selection import ExpertRows


@torch.library.custom_op("sparseffn::expert_up", mutates_args=())
def _expert_up(x: Tensor, weight: Tensor, tokens: Tensor, offsets: Tensor, backend: str) -> Tensor:
    check_expert_rows(tokens, offsets, x.shape[0])
    return kernel("expert_up", x, backend)(x, weight, tokens, offsets)


@_expert_up.register_fake
def _(x: Tensor, weight: Tensor, tokens: Tensor, offsets: Tensor, backend: str) -> Tensor:
    return x.new_empty(tokens.shape[0], weight.shape[2])


@torch.library.custom_op("sparseffn::expert_up_backward", mutates_args=())
def _expert_up_backward(
    grad: Tensor, x: Tensor, weight: Tensor, tokens: Tensor, offsets: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    return kernel("expert_up_backward", x, backend)(grad, x, weight, tokens, offsets)


@_expert_up_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, tokens: Tensor, offsets: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    dense = torch.contiguous_format
    return torch.empty_like(x, memory_format=dense), torch.empty_like(weight, memory_format=dense)


def _save_up(ctx, inputs, output) -> None:
    x, weight, tokens, offsets, ctx.backend = inputs
    ctx.save_for_backward(x, weight, tokens, offsets)


def _differentiate_up(ctx, grad):
    grad_x, grad_weight = torch.ops.sparseffn.expert_up_backward(grad, *ctx.saved_tensors, ctx.backend)
    return grad_x, grad_weight, None, None, None


_expert_up.register_autograd(_differentiate_up, setup_context=_save_up)


@torch.library.custom_op("sparseffn::expert_down", mutates_args=())
def _expert_down(
    a: Tensor, weight: Tensor, gates: Tensor, tokens: Tensor, offsets: Tensor, n_tokens: int, backend: str
) -> Tensor:
    check_expert_rows(tokens, offsets, n_tokens)
    check_finite(gates, "gates")
    return kernel("expert_down", a, backend)(a, weight, gates, tokens, offsets, n_tokens)


@_expert_down.register_fake
def _(a: Tensor, weight: Tensor, gates: Tensor, tokens: Tensor, offsets: Tensor, n_tokens: int, backend: str) -> Tensor:
    return a.new_empty(n_tokens, weight.shape[2])


@torch.library.custom_op("sparseffn::expert_down_backward", mutates_args=())
def _expert_down_backward(
    grad: Tensor, a: Tensor, weight: Tensor, gates: Tensor, tokens: Tensor, offsets: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return kernel("expert_down_backward", a, backend)(grad, a, weight, gates, tokens, offsets)


@_expert_down_backward.register_fake
def _(
    grad: Tensor, a: Tensor, weight: Tensor, gates: Tensor, tokens: Tensor, offsets: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    dense = torch.contiguous_format
    return torch.empty_like(a, memory_format=dense), torch.empty_like(weight, memory_format=dense), torch.empty_like(gates)


def _save_down(ctx, inputs, output) -> None:
    a, weight, gates, tokens, offsets, _, ctx.backend = inputs
    ctx.save_for_backward(a, weight, gates, tokens, offsets)


def _differentiate_down(ctx, grad):
    grads = torch.ops.sparseffn.expert_down_backward(grad, *ctx.saved_tensors, ctx.backend)
    return *grads, None, None, None, None


_expert_down.register_autograd(_differentiate_down, setup_context=_save_down)


def expert_up(x: Tensor, weight: Tensor, rows: ExpertRows, *, backend: str = "auto") -> Tensor:
    """`u[r] = x[token of r] @ weight[expert of r]`, rows sorted by expert.

    Args:
        x: `[T, D]`; under autocast it and `weight` are cast as `nn.Linear` casts.
        weight: `[E, D, G]`.
        rows: the routing, from `sort_by_expert`.
        backend: see `ops.backends`.

    Returns:
        `[R, G]` in the dtype of `x`.

    Raises:
        UserError: ranks, widths, dtypes or devices do not fit together, or a row has no expert or token.
    """
    x, weight = to_autocast(x, weight)
    _check_product("x", x, weight, rows, rows.n_tokens)
    require_one_device(x, weight, rows.tokens, rows.offsets)
    direct = direct_kernel("expert_up", backend)
    if direct is not None:
        check_expert_rows(rows.tokens, rows.offsets, rows.n_tokens)
        return direct(x, weight, rows.tokens, rows.offsets)
    return torch.ops.sparseffn.expert_up(x, weight, rows.tokens, rows.offsets, backend)


def expert_down(a: Tensor, weight: Tensor, gates: Tensor, rows: ExpertRows, *, backend: str = "auto") -> Tensor:
    """`y[t] = sum over the rows r of token t of gates[r] a[r] @ weight[expert of r]`, summed in float32 or wider.

    Args:
        a: `[R, G]`, rows sorted by expert.
        weight: `[E, G, D]`.
        gates: `[R]`, float32 or wider, finite, sorted like `a`.
        rows: the routing, from `sort_by_expert`.
        backend: see `ops.backends`.

    Returns:
        `[T, D]` in the dtype of `a`; zero for a token without rows.

    Raises:
        UserError: ranks, widths, dtypes or devices do not fit together, or a row has no expert or token.
        NonFiniteError: a gate is NaN or infinite.
    """
    a, weight = to_autocast(a, weight)
    n_rows = rows.tokens.shape[0]
    _check_product("a", a, weight, rows, n_rows)
    if gates.dim() != 1 or gates.shape[0] != n_rows or gates.dtype not in (torch.float32, torch.float64):
        raise UserError(
            f"`gates` must be [{n_rows}] in float32 or float64; got {tuple(gates.shape)} in {gates.dtype}; "
            "fix: one score a row, sorted like `a`"
        )
    require_one_device(a, weight, gates, rows.tokens, rows.offsets)
    direct = direct_kernel("expert_down", backend)
    if direct is not None:
        check_expert_rows(rows.tokens, rows.offsets, rows.n_tokens)
        check_finite(gates, "gates")
        return direct(a, weight, gates, rows.tokens, rows.offsets, rows.n_tokens)
    return torch.ops.sparseffn.expert_down(a, weight, gates, rows.tokens, rows.offsets, rows.n_tokens, backend)


def cvmm(x: Tensor, sel: Tensor, weight: Tensor, *, backend: str = "auto") -> Tensor:
    """Conditional vector-matrix multiplication (equation 26): `y[n] = x[n] @ weight[sel[n]]`.

    Args:
        x: `[N, M]`.
        sel: int64 `[N]`, the matrix of each row, 0 to E - 1.
        weight: `[E, M, L]`.
        backend: see `ops.backends`.

    Returns:
        `[N, L]`.

    Raises:
        UserError: ranks, widths, dtypes or devices do not fit together, or `sel` has another length or dtype or names a
            matrix that is not there.
    """
    if x.dim() != 2 or weight.dim() != 3:
        raise _misfit("x", x, weight)
    if sel.shape != x.shape[:1] or sel.dtype != torch.int64:
        raise UserError(
            f"`sel` must hold one index a row of x, int64 in shape {tuple(x.shape[:1])}; "
            f"got {sel.dtype} in shape {tuple(sel.shape)}; fix: flatten and cast it"
        )
    require_one_device(x, sel, weight)
    # In a compiled graph the product looks at the sorted rows.
    if not is_traced(sel):
        check_indices(sel, "a matrix of `weight`", weight.shape[0], "sel")
    sorted_sel, order = sel.sort(stable=True)
    offsets = torch.searchsorted(sorted_sel, torch.arange(weight.shape[0] + 1, device=sel.device))
    rows = ExpertRows(order, order, offsets, x.shape[0])
    sorted_y = expert_up(x, weight, rows, backend=backend)
    return torch.empty_like(sorted_y).index_copy(0, order, sorted_y)


def _check_product(name: str, left: Tensor, weight: Tensor, rows: ExpertRows, n_left: int) -> None:
    """`left` has `n_left` rows as wide as the matrices are high, and `rows` fit the matrices."""
    if left.dim() != 2 or weight.dim() != 3 or left.shape[1] != weight.shape[1]:
        raise _misfit(name, left, weight)
    if left.dtype != weight.dtype or not left.is_floating_point():
        raise UserError(
            f"`{name}` and `weight` must share a floating dtype; got {left.dtype} and {weight.dtype}; fix: cast one"
        )
    tokens, offsets = rows.tokens, rows.offsets
    if tokens.dim() != 1 or tokens.dtype != torch.int64 or offsets.dtype != torch.int64:
        raise UserError(
            f"`rows` must hold int64 vectors; got {tokens.dtype} and {offsets.dtype}; fix: make them with ops.sort_by_expert"
        )
    if offsets.dim() != 1 or offsets.shape[0] != weight.shape[0] + 1:
        raise UserError(
            f"`rows` must be sorted over the {weight.shape[0]} experts of `weight`, with offsets [{weight.shape[0] + 1}]; "
            f"got offsets {tuple(offsets.shape)}; fix: n_units = {weight.shape[0]} in the selection"
        )
    if left.shape[0] != n_left:
        raise UserError(
            f"`{name}` must have the {n_left} rows that `rows` speak of; got {left.shape[0]}; "
            "fix: sort the selection of this input"
        )


def _misfit(name: str, left: Tensor, weight: Tensor) -> UserError:
    return UserError(
        f"`{name}` must be [rows, {weight.shape[1] if weight.dim() == 3 else 'm'}] and `weight` [n_experts, m, l]; "
        f"got {tuple(left.shape)} and {tuple(weight.shape)}; fix: flatten leading dimensions first"
    )
