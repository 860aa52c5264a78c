"""The experts of a mixture in one operation (equation 12 of arXiv 2310.10837), plain or gated, with or without biases:

    y[t] = sum over the selections (e, s) of token t:  s (a values[e] + value_bias[e])
    a = drop * act(x[t] keys[e] + key_bias[e])                                           plain
    a = drop * act(x[t] keys[e] + key_bias[e]) (x[t] gate_keys[e] + gate_bias[e])        gated (Shazeer 2020, arXiv 2002.05202)

Shapes: see ops/README.md.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparseffn.errors import UserError
from sparseffn.ops._checks import check_indices, require_one_device, require_one_dtype, require_shapes, require_tensors
from sparseffn.ops.activations import SWIGLU_ALPHA, SWIGLU_LIMIT, check_activation, draw_keep, hidden_units
from sparseffn.ops.backends import call
from sparseffn.ops.library import Kept, define, flops_of_pairs
from sparseffn.ops.plain import experts_plain


def check_experts(
    x: Tensor, keys: Tensor, values: Tensor, gates: Tensor, indices: Tensor, gate_keys: Tensor | None = None,
    key_bias: Tensor | None = None, gate_bias: Tensor | None = None, value_bias: Tensor | None = None,
    keep: Tensor | None = None, keep_scale: float = 1.0, activation: str = "relu", alpha: float = SWIGLU_ALPHA,
    limit: float = SWIGLU_LIMIT, inner_k: int | None = None,
) -> None:  # fmt: skip
    """That they fit together, without a look at values; raises as `experts` documents."""
    fits = x.dim() == 2 and keys.dim() == 3 and values.dim() == 3 and keys.shape[1] == x.shape[1]
    if not fits or values.shape != (keys.shape[0], keys.shape[2], keys.shape[1]):
        raise UserError(
            "`x`, `keys` and `values` must be [T, D], [E, D, G] and [E, G, D]; "
            f"got {tuple(x.shape)}, {tuple(keys.shape)} and {tuple(values.shape)}; fix: flatten leading dimensions first"
        )
    if indices.dim() != 2 or gates.shape != indices.shape or indices.shape[0] != x.shape[0] or indices.shape[1] == 0:
        raise UserError(
            f"`gates` and `indices` must both be [T, K] with T = {x.shape[0]} and K >= 1; "
            f"got {tuple(gates.shape)} and {tuple(indices.shape)}"
        )
    n_experts, width, size = keys.shape
    require_shapes(
        gate_keys=(gate_keys, (n_experts, width, size)),
        key_bias=(key_bias, (n_experts, size)),
        gate_bias=(gate_bias, (n_experts, size)),
        value_bias=(value_bias, (n_experts, width)),
        keep=(keep, (*indices.shape, size)),
    )
    require_one_dtype("`x`, the weights and the biases", x, keys, values, gate_keys, key_bias, gate_bias, value_bias)
    wide = torch.promote_types(x.dtype, torch.float32)
    if gates.dtype != wide or indices.dtype != torch.int64:
        raise UserError(f"`gates` must be {wide} and `indices` int64; got {gates.dtype} and {indices.dtype}; fix: cast them")
    require_one_device(x, keys, values, gates, indices, gate_keys, key_bias, gate_bias, value_bias, keep)
    check_activation(activation, gate_keys, gate_bias, limit)
    n_units = indices.shape[1] * size
    if inner_k is not None and not 1 <= inner_k <= n_units:
        raise UserError(f"`inner_k` must be between 1 and K G = {n_units}; got {inner_k}; fix: lower it, or None for all")


def _check(*arguments: Any) -> None:
    check_experts(*arguments)
    check_indices(arguments[4], "an expert", arguments[1].shape[0])


# Rows sorted by expert [R, M], matrices [E, M, L], where each expert's rows begin [E + 1]: their products [R, L].
Product = Callable[[Tensor, Tensor, Tensor], Tensor]


def experts_sorted(multiply: Product, x: Tensor, keys: Tensor, values: Tensor, gates: Tensor, *rest: Any) -> Tensor:
    """`experts` by PyTorch's operations over rows sorted by expert, as `multiply` does their products."""
    filled: tuple[Any, ...] = (*rest, *_DEFAULTS[len(rest) :])
    indices, gate_keys, key_bias, gate_bias, value_bias, keep, keep_scale, activation, alpha, limit, inner_k = filled
    (n_tokens, k), wide = indices.shape, gates.dtype
    experts_R, order = indices.flatten().sort(stable=True)
    offsets = torch.searchsorted(experts_R, torch.arange(keys.shape[0] + 1, device=order.device))
    x_RD, gates_R = x.index_select(0, order // k), gates.flatten()[order]

    def product(weight: Tensor, bias: Tensor | None) -> Tensor:
        scores_RG = multiply(x_RD, weight, offsets)
        return scores_RG if bias is None else scores_RG + bias[experts_R]

    gate_scores = None if gate_keys is None else product(gate_keys, gate_bias)
    u_RG = hidden_units(activation, product(keys, key_bias), gate_scores, alpha=alpha, limit=limit)
    if keep is not None:
        u_RG = torch.where(keep.flatten(0, 1)[order], u_RG * keep_scale, 0.0)
    alpha_RG = u_RG * gates_R[:, None]
    if inner_k is not None:
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        alpha_TU = alpha_RG[back].view(n_tokens, k * keys.shape[2])
        best = alpha_TU.detach().sort(dim=1, descending=True, stable=True).indices[:, :inner_k]
        chosen = torch.zeros_like(alpha_TU, dtype=torch.bool).scatter_(1, best, True)
        alpha_RG = torch.where(chosen, alpha_TU, 0.0).view(len(order), keys.shape[2])[order]
    out_RD = multiply(alpha_RG.to(x.dtype), values, offsets).to(wide)
    if value_bias is not None:
        out_RD = out_RD + gates_R[:, None] * value_bias[experts_R].to(wide)
    return x.new_zeros(n_tokens, values.shape[2], dtype=wide).index_add(0, order // k, out_RD).to(x.dtype)


def _one_by_one(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    bounds = itertools.pairwise(offsets.tolist())
    return torch.cat([rows[start:stop] @ weight[e] for e, (start, stop) in enumerate(bounds)])


experts_eager = functools.partial(experts_sorted, _one_by_one)


# Of the schema's arguments from `indices` on.
_DEFAULTS = (None, None, None, None, None, None, 1.0, "relu", SWIGLU_ALPHA, SWIGLU_LIMIT, None)

_ARGUMENTS = (
    "Tensor x, Tensor keys, Tensor values, Tensor gates, Tensor indices, Tensor? gate_keys=None, Tensor? key_bias=None, "
    "Tensor? gate_bias=None, Tensor? value_bias=None, Tensor? keep=None, float keep_scale=1.0, str activation='relu', "
    f"float alpha={SWIGLU_ALPHA}, float limit={SWIGLU_LIMIT}, int? inner_k=None"
)
_WITHOUT_DEFAULTS = re.sub(r"=[^,]*", "", _ARGUMENTS)


def _inner_k(rest: tuple[Any, ...]) -> int | None:
    """Of the arguments behind `gate_keys`, which may be fewer; it is the last of nine."""
    return rest[8] if len(rest) > 8 else None


def _fake(x, keys, values, *rest):
    return x.new_empty(x.shape[0], values.shape[2])


def _fake_kept(x, keys, values, gates, indices, gate_keys=None, *rest):
    inner_k = _inner_k(rest)
    n_tokens, k = indices.shape
    n_parts = 1 if gate_keys is None else 2
    if inner_k is None:
        hidden, positions = x.new_empty(n_tokens * k, n_parts * keys.shape[2]), indices.new_empty(0, dtype=torch.int32)
    else:
        hidden = x.new_empty(n_tokens, n_parts * inner_k)
        positions = indices.new_empty(n_tokens, inner_k, dtype=torch.int32)
    return _fake(x, keys, values), hidden, positions, indices.new_empty(n_tokens * k), indices.new_empty(keys.shape[0] + 1)


def _flops(x, keys, values, gates, indices, gate_keys=None, *rest):
    """Both products of the keys and that of the values, of K experts; with an inner top-K the values of the survivors."""
    n_units = gates[1] * keys[2]
    return 2 * x[0] * keys[1] * (n_units * (1 if gate_keys is None else 2) + (_inner_k(rest) or n_units))


_experts = define(
    "experts",
    _ARGUMENTS,
    "Tensor y",
    check=_check,
    cast=("x", "keys", "values", "gate_keys", "key_bias", "gate_bias", "value_bias"),
    plain=experts_plain,
    eager=experts_eager,
    fake=_fake,
    flops=_flops,
    kept=Kept(
        # Positions of an inner top-K's survivors are each device's own: below 0 where dropout removed one.
        returns="Tensor hidden, Tensor positions, Tensor order, Tensor offsets",
        fake=_fake_kept,
        backward=f"Tensor grad_y, {_WITHOUT_DEFAULTS}, Tensor hidden, Tensor positions, Tensor order, Tensor offsets, "
        "bool[]? needed=None, bool joint=False",
        gradients=("x", "keys", "values", "gates", "gate_keys", "key_bias", "gate_bias", "value_bias"),
        flops_of_backward=flops_of_pairs,
    ),
)


def experts(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: Tensor,
    indices: Tensor,
    *,
    gate_keys: Tensor | None = None,
    key_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
    value_bias: Tensor | None = None,
    activation: str = "relu",
    alpha: float = SWIGLU_ALPHA,
    limit: float = SWIGLU_LIMIT,
    dropout: float = 0.0,
    inner_k: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """`y[t] = sum_k gates[t, k] (a values[e] + value_bias[e])` with `e = indices[t, k]`, summed in float32 or wider.

    `a = drop(act(x keys[e] + key_bias[e]))`, times `x gate_keys[e] + gate_bias[e]` where there are gate keys. Weights may have
    any strides: `[E, out, in]` as a transposed view, keys and gate keys as two tensors, halves of one, or interleaved.

    Args:
        x: `[T, D]`; under autocast it, the weights and the biases are cast as `nn.Linear` casts.
        keys: `[E, D, G]`; the activation acts on their product.
        values: `[E, G, D]`.
        gates: `[T, K]`, float32 (float64 for float64 x). A token of fewer experts
            has gates of 0, whose experts are computed all the same.
        indices: int64 `[T, K]`, 0 to E - 1.
        gate_keys: `[E, D, G]`.
        key_bias: `[E, G]`.
        gate_bias: `[E, G]`.
        value_bias: `[E, D]`.
        activation: relu, relu2 (its square), gelu (exact), gelu_tanh, silu, identity; clamped_swiglu, which needs gate keys:
            `(clamp(x gate_keys, -limit, limit) + 1) h sigmoid(alpha h)` with `h = min(x keys, limit)`, as gpt_oss has it.
        alpha: of clamped_swiglu.
        limit: of clamped_swiglu, above 0.
        dropout: rate at which hidden units are removed; the others are scaled by 1 / (1 - rate).
        inner_k: of a token's K G coefficients `gate x unit` only so many, the largest, take part; None: all.
        backend: see `ops.backends`.

    Returns:
        `[T, D]` in the dtype of `x`. NaN and infinity of a token reach its own row alone.

    Raises:
        UserError: ranks, widths, dtypes or devices do not fit together, `K` is 0, `inner_k` is not in 1..K G, an index is
            that of no expert (in a Triton kernel such a selection adds nothing), the activation is unknown, or its `limit` is
            not above 0.
    """
    keep, keep_scale = None, 1.0
    if dropout != 0.0:
        require_tensors(keys=keys, indices=indices)
        keep, keep_scale = draw_keep((*indices.shape, *keys.shape[2:]), dropout, indices.device)
    arguments: tuple[Any, ...] = (x, keys, values, gates, indices)
    # Ten arguments more take a microsecond to pass, a tenth of one token's experts.
    if not (gate_keys is key_bias is gate_bias is value_bias is keep is inner_k is None and activation == "relu"):
        options = (keep, keep_scale, activation, alpha, limit, inner_k)
        arguments = (*arguments, gate_keys, key_bias, gate_bias, value_bias, *options)
    return call(_experts, arguments, backend)
