"""The experts of a mixture in one operation (equation 12 of arXiv 2310.10837), plain or gated, with or without biases:

    y[t] = sum over the selections (e, s) of token t:  s (a values[e] + value_bias[e])
    a = drop * act(x[t] keys[e] + key_bias[e])                                           plain
    a = drop * act(x[t] keys[e] + key_bias[e]) (x[t] gate_keys[e] + gate_bias[e])        gated (Shazeer 2020, arXiv 2002.05202)

Shapes: see ops/README.md.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparseffn.errors import UserError, unknown_name
from sparseffn.ops._checks import check_indices, require_one_device
from sparseffn.ops.activations import ACTIVATIONS, CLAMPED_SWIGLU, SWIGLU_ALPHA, SWIGLU_LIMIT, hidden_units
from sparseffn.ops.autocast import to_autocast
from sparseffn.ops.backends import implementation
from sparseffn.ops.library import Kept, define, is_watched
from sparseffn.ops.plain import experts_plain


def _plain(x: Tensor, keys: Tensor, values: Tensor, gates: Tensor, indices: Tensor, *rest: Any) -> Tensor:
    """The composition for transforms, of what autocast makes of its arguments."""
    return experts_plain(*_prepared(x, keys, values, gates, indices, *rest))


# Rows sorted by expert [R, M], matrices [E, M, L], where each expert's rows begin [E + 1]: their products [R, L].
Product = Callable[[Tensor, Tensor, Tensor], Tensor]


def experts_sorted(multiply: Product, x: Tensor, keys: Tensor, values: Tensor, gates: Tensor, *rest: Any) -> Tensor:
    """`experts` by PyTorch's operations over rows sorted by expert, as `multiply` does their products."""
    x, keys, values, gates, indices, gate_keys, key_bias, gate_bias, value_bias, *options = _prepared(
        x, keys, values, gates, *rest
    )
    filled: tuple[Any, ...] = (*options, *_DEFAULTS[len(options) :])
    keep, keep_scale, activation, alpha, limit, inner_k = filled
    check_indices(indices, "an expert", keys.shape[0])
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


def _prepared(
    x: Tensor, keys: Tensor, values: Tensor, gates: Tensor, indices: Tensor, gate_keys: Tensor | None = None,
    key_bias: Tensor | None = None, gate_bias: Tensor | None = None, value_bias: Tensor | None = None,
    keep: Tensor | None = None, keep_scale: float = 1.0, activation: str = "relu", *numbers: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """The arguments, cast as autocast wants and checked."""
    named = (x, keys, values, gate_keys, key_bias, gate_bias, value_bias)
    given = iter(to_autocast(*(t for t in named if t is not None)))
    cast: list[Any] = [None if t is None else next(given) for t in named]
    x, keys, values, gate_keys, key_bias, gate_bias, value_bias = cast
    inner_k = numbers[2] if len(numbers) > 2 else None
    check_experts(x, keys, values, gates, indices, gate_keys, key_bias, gate_bias, value_bias, keep, activation, inner_k)
    return x, keys, values, gates, indices, *cast[3:], keep, keep_scale, activation, *numbers


# Of the schema's arguments from `keep` on.
_DEFAULTS = (None, 1.0, "relu", SWIGLU_ALPHA, SWIGLU_LIMIT, None)

_ARGUMENTS = (
    "Tensor x, Tensor keys, Tensor values, Tensor gates, Tensor indices, Tensor? gate_keys=None, Tensor? key_bias=None, "
    "Tensor? gate_bias=None, Tensor? value_bias=None, Tensor? keep=None, float keep_scale=1.0, str activation='relu', "
    f"float alpha={SWIGLU_ALPHA}, float limit={SWIGLU_LIMIT}, int? inner_k=None"
)


def _fake(x, keys, values, *rest):
    return x.new_empty(x.shape[0], values.shape[2])


def _fake_kept(x, keys, values, gates, indices, gate_keys=None, *rest):
    inner_k = rest[8] if len(rest) > 8 else None
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
    inner_k = rest[8] if len(rest) > 8 and rest[8] else n_units
    return 2 * x[0] * keys[1] * (n_units * (1 if gate_keys is None else 2) + inner_k)


_experts = define(
    "experts",
    _ARGUMENTS,
    "Tensor y",
    plain=_plain,
    eager=experts_eager,
    fake=_fake,
    flops=_flops,
    kept=Kept(
        returns="Tensor hidden, Tensor positions, Tensor order, Tensor offsets",
        fake=_fake_kept,
        backward=f"Tensor grad_y, {_ARGUMENTS.replace('=None', '').replace('=1.0', '').split(' str activation')[0]} "
        "str activation, float alpha, float limit, int? inner_k, Tensor hidden, Tensor positions, Tensor order, Tensor offsets",
        gradients=("x", "keys", "values", "gates", "gate_keys", "key_bias", "gate_bias", "value_bias"),
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
        gates: `[T, K]`, float32 (float64 for float64 x). A gate of exactly 0 selects nothing.
        indices: int64 `[T, K]`, 0 to E - 1.
        gate_keys: `[E, D, G]`.
        key_bias: `[E, G]`.
        gate_bias: `[E, G]`.
        value_bias: `[E, D]`.
        activation: relu, relu2 (its square), gelu (exact), gelu_tanh, silu, identity; clamped_swiglu, which needs gate keys:
            `(clamp(x gate_keys, -limit, limit) + 1) h sigmoid(alpha h)` with `h = min(x keys, limit)`, as gpt_oss has it.
        alpha: of clamped_swiglu.
        limit: of clamped_swiglu.
        dropout: rate at which hidden units are removed; the others are scaled by 1 / (1 - rate).
        inner_k: of a token's K G coefficients `gate x unit` only so many, the largest, take part; None: all.
        backend: see `ops.backends`.

    Returns:
        `[T, D]` in the dtype of `x`. NaN and infinity of a token reach its own row alone.

    Raises:
        UserError: ranks, widths, dtypes or devices do not fit together, `K` is 0, `inner_k` is not in 1..K G, an index is
            that of no expert (on a GPU such a selection adds nothing), or the activation is unknown.
    """
    keep, keep_scale = None, 1.0
    if dropout != 0.0:
        keep, keep_scale = _draw_keep(indices, keys, dropout)
    named = implementation("experts", x, backend)
    if named is not None:
        check_experts(x, keys, values, gates, indices, gate_keys, key_bias, gate_bias, value_bias, keep, activation, inner_k)
        check_indices(indices, "an expert", keys.shape[0])
    run = named or _experts
    try:
        # Ten arguments more take a microsecond to pass, a tenth of one token's experts.
        if gate_keys is key_bias is value_bias is keep is inner_k is None and activation == "relu" and gate_bias is None:
            return run(x, keys, values, gates, indices)
        options = (keep, keep_scale, activation, alpha, limit, inner_k)
        return run(x, keys, values, gates, indices, gate_keys, key_bias, gate_bias, value_bias, *options)
    except (RuntimeError, IndexError, KeyError, TypeError):
        check_experts(x, keys, values, gates, indices, gate_keys, key_bias, gate_bias, value_bias, keep, activation, inner_k)
        if not is_watched((x, indices)):
            check_indices(indices, "an expert", keys.shape[0])
        raise


def _draw_keep(indices: Tensor, keys: Tensor, dropout: float) -> tuple[Tensor, float]:
    """Which hidden units dropout leaves, `[T, K, G]`, and what scales them."""
    if not 0.0 <= dropout < 1.0:
        raise UserError(f"`dropout` must be at least 0 and below 1; got {dropout}; fix: a rate such as 0.1")
    shape = (*indices.shape, keys.shape[2])
    return torch.rand(shape, device=indices.device) >= dropout, 1.0 / (1.0 - dropout)


def check_experts(
    x: Tensor, keys: Tensor, values: Tensor, gates: Tensor, indices: Tensor, gate_keys: Tensor | None,
    key_bias: Tensor | None, gate_bias: Tensor | None, value_bias: Tensor | None, keep: Tensor | None, activation: str,
    inner_k: int | None,
) -> None:  # fmt: skip
    """That they fit together; raises as `experts` documents."""
    fits = x.dim() == 2 and keys.dim() == 3 and values.dim() == 3 and keys.shape[1] == x.shape[1]
    if not fits or values.shape[:2] != (keys.shape[0], keys.shape[2]):
        raise UserError(
            "`x`, `keys` and `values` must be [T, D], [E, D, G] and [E, G, D]; "
            f"got {tuple(x.shape)}, {tuple(keys.shape)} and {tuple(values.shape)}; fix: flatten leading dimensions first"
        )
    if indices.dim() != 2 or gates.shape != indices.shape or indices.shape[0] != x.shape[0] or indices.shape[1] == 0:
        raise UserError(
            f"`gates` and `indices` must both be [T, K] with T = {x.shape[0]} and K >= 1; "
            f"got {tuple(gates.shape)} and {tuple(indices.shape)}"
        )
    n_experts, size = keys.shape[0], keys.shape[2]
    shapes = {
        "gate_keys": (gate_keys, tuple(keys.shape)),
        "key_bias": (key_bias, (n_experts, size)),
        "gate_bias": (gate_bias, (n_experts, size)),
        "value_bias": (value_bias, (n_experts, values.shape[2])),
        "keep": (keep, (*indices.shape, size)),
    }
    for name, (given, shape) in shapes.items():
        if given is not None and tuple(given.shape) != shape:
            raise UserError(f"`{name}` must be {shape}; got {tuple(given.shape)}; fix: check its layout")
    floating = [x, keys, values, *(t for t in (gate_keys, key_bias, gate_bias, value_bias) if t is not None)]
    if len({t.dtype for t in floating}) > 1 or not x.is_floating_point() or indices.dtype != torch.int64:
        raise UserError(
            "`x`, the weights and the biases must share a floating dtype and `indices` be int64; "
            f"got {', '.join(str(t.dtype) for t in floating)} and {indices.dtype}; fix: cast them"
        )
    if gates.dtype != torch.promote_types(x.dtype, torch.float32):
        raise UserError(f"`gates` must be {torch.promote_types(x.dtype, torch.float32)}; got {gates.dtype}; fix: cast them")
    require_one_device(*floating, gates, indices)
    _check_options(activation, gate_keys, gate_bias, inner_k, indices.shape[1] * size)


def _check_options(
    activation: str, gate_keys: Tensor | None, gate_bias: Tensor | None, inner_k: int | None, n_units: int
) -> None:
    if activation not in ACTIVATIONS and activation != CLAMPED_SWIGLU:
        raise unknown_name("activation", activation, (*ACTIVATIONS, CLAMPED_SWIGLU))
    if gate_keys is None and (activation == CLAMPED_SWIGLU or gate_bias is not None):
        what = "gate_bias" if gate_bias is not None else "activation='clamped_swiglu'"
        raise UserError(f"`gate_keys` must be given with {what}; got none; fix: pass the second half of a gated block's keys")
    if inner_k is not None and not 1 <= inner_k <= n_units:
        raise UserError(f"`inner_k` must be between 1 and K G = {n_units}; got {inner_k}; fix: lower it, or None for all")
