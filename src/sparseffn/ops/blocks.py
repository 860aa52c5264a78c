"""Two blocks that choose among key-value pairs, each in one operation:

    topk_rows         y = sum over the K largest u[i]: u[i] values[i],  u = drop(act(keys x))     equations 6 and 7
    product_key_rows  y = sum over heads and their K best sums u: act(u[i]) values[i]             equation 8

of arXiv 2310.10837. Scores of all pairs are never written: a block of tokens is scored, and its survivors found, in the cache.
Shapes: see ops/README.md.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseffn.errors import UserError, unknown_name
from sparseffn.ops._checks import require_one_device, require_one_dtype, require_shapes, require_tensors
from sparseffn.ops.activations import ACTIVATIONS, SWIGLU_ALPHA, SWIGLU_LIMIT, check_activation, draw_keep, hidden_units
from sparseffn.ops.backends import call
from sparseffn.ops.columns import topk
from sparseffn.ops.library import Kept, define, flops_of_pairs
from sparseffn.ops.plain import upcast
from sparseffn.ops.rows import product_key_topk, weighted_rows


def check_topk_rows(
    x: Tensor, keys: Tensor, values: Tensor, k: int, gate_keys: Tensor | None = None, key_bias: Tensor | None = None,
    gate_bias: Tensor | None = None, value_bias: Tensor | None = None, keep: Tensor | None = None, keep_scale: float = 1.0,
    activation: str = "relu", alpha: float = SWIGLU_ALPHA, limit: float = SWIGLU_LIMIT, *rest: Any,
) -> None:  # fmt: skip
    """That they fit together; raises as `topk_rows` documents."""
    if x.dim() != 2 or keys.dim() != 2 or keys.shape[1] != x.shape[1] or values.shape != keys.shape:
        raise UserError(
            "`x`, `keys` and `values` must be [T, D], [F, D] and [F, D]; "
            f"got {tuple(x.shape)}, {tuple(keys.shape)} and {tuple(values.shape)}; fix: flatten leading dimensions first"
        )
    n_units, width = keys.shape
    require_shapes(
        gate_keys=(gate_keys, (n_units, width)),
        key_bias=(key_bias, (n_units,)),
        gate_bias=(gate_bias, (n_units,)),
        value_bias=(value_bias, (width,)),
        keep=(keep, (x.shape[0], n_units)),
    )
    floating = (x, keys, values, gate_keys, key_bias, gate_bias, value_bias)
    require_one_dtype("`x`, the weights and the biases", *floating)
    require_one_device(*floating, keep)
    if not 1 <= k <= n_units:
        raise UserError(f"`k` must be between 1 and the number of units {n_units}; got {k}; fix: lower k")
    check_activation(activation, gate_keys, gate_bias, limit)


@upcast
def topk_rows_plain(
    x: Tensor, keys: Tensor, values: Tensor, k: int, gate_keys: Tensor | None = None, key_bias: Tensor | None = None,
    gate_bias: Tensor | None = None, value_bias: Tensor | None = None, keep: Tensor | None = None, keep_scale: float = 1.0,
    activation: str = "relu", alpha: float = SWIGLU_ALPHA, limit: float = SWIGLU_LIMIT, by_norm: bool = False,
    by_magnitude: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`topk_rows` by other operations; of the units only the survivors are kept for backward."""
    scores_TF = F.linear(x, keys, key_bias)
    gate_scores_TF = None if gate_keys is None else F.linear(x, gate_keys, gate_bias)
    with torch.no_grad():
        u_TF = hidden_units(activation, scores_TF, gate_scores_TF, alpha=alpha, limit=limit)
        rank_TF = u_TF if keep is None else torch.where(keep, u_TF * keep_scale, 0.0)
        if by_magnitude:
            rank_TF = rank_TF.abs()
        if by_norm:
            rank_TF = rank_TF * values.norm(dim=1)
        indices_TK = topk(rank_TF, k, ordered=False)
    gates_TK = None if gate_scores_TF is None else gate_scores_TF.gather(1, indices_TK)
    u_TK = hidden_units(activation, scores_TF.gather(1, indices_TK), gates_TK, alpha=alpha, limit=limit)
    if keep is not None:
        u_TK = torch.where(keep.gather(1, indices_TK), u_TK * keep_scale, 0.0)
    y_TD = weighted_rows(values, indices_TK, u_TK)
    return y_TD if value_bias is None else y_TD + value_bias, indices_TK, u_TK


_TENSORS = (
    "Tensor x, Tensor keys, Tensor values, int k, Tensor? gate_keys{0}, Tensor? key_bias{0}, Tensor? gate_bias{0}, "
    "Tensor? value_bias{0}, Tensor? keep{0}, "
)


def _fake_topk(x, keys, values, k, *rest):
    return x.new_empty(x.shape), x.new_empty(x.shape[0], k, dtype=torch.int64), x.new_empty(x.shape[0], k)


def _fake_topk_kept(
    x, keys, values, k, gate_keys=None, key_bias=None, gate_bias=None, value_bias=None, keep=None, keep_scale=1.0,
    activation="relu", *rest,
):  # fmt: skip
    # ReLU's output shows its slope, and the identity has none unless dropout's zeros may be mistaken for its own.
    shown = gate_keys is None and (activation == "relu" or (activation == "identity" and keep is None))
    slopes = x.new_empty(0) if shown else x.new_empty(x.shape[0], k if gate_keys is None else 2 * k)
    return *_fake_topk(x, keys, values, k), slopes


def _topk_flops(x, keys, values, k, gate_keys=None, *rest):
    return 2 * x[0] * x[1] * (keys[0] * (1 if gate_keys is None else 2) + k)


_topk_rows = define(
    "topk_rows",
    _TENSORS.format("=None")
    + "float keep_scale=1.0, str activation='relu', "
    + f"float alpha={SWIGLU_ALPHA}, float limit={SWIGLU_LIMIT}, bool by_norm=False, bool by_magnitude=False",
    "Tensor y, Tensor indices, Tensor coefficients",
    check=check_topk_rows,
    cast=("x", "keys", "values", "gate_keys", "key_bias", "gate_bias", "value_bias"),
    plain=topk_rows_plain,
    fake=_fake_topk,
    flops=_topk_flops,
    kept=Kept(
        returns="Tensor slopes",
        fake=_fake_topk_kept,
        backward=f"Tensor? grad_y, Tensor? grad_coefficients, {_TENSORS.format('')}float keep_scale, str activation, "
        "float alpha, float limit, bool by_norm, bool by_magnitude, Tensor indices, Tensor coefficients, Tensor slopes, "
        "bool[]? needed=None",
        gradients=("x", "keys", "values", "gate_keys", "key_bias", "gate_bias", "value_bias"),
        flops_of_backward=flops_of_pairs,
    ),
)


def topk_rows(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    k: int,
    gate_keys: Tensor | None = None,
    key_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
    value_bias: Tensor | None = None,
    activation: str = "relu",
    alpha: float = SWIGLU_ALPHA,
    limit: float = SWIGLU_LIMIT,
    dropout: float = 0.0,
    by_norm: bool = False,
    by_magnitude: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """`y[t] = sum over the k largest u[i]: u[i] values[i]`, plus `value_bias`, with `u = drop(act(keys x + key_bias))`.

    Args:
        x: `[T, D]`; under autocast it, the weights and the biases are cast as `nn.Linear` casts.
        keys: `[F, D]`.
        values: `[F, D]`.
        k: units that survive, 1 to F; ties go to the lowest index.
        gate_keys: `[F, D]`; u is then also multiplied by `gate_keys x + gate_bias`.
        key_bias: `[F]`.
        gate_bias: `[F]`.
        value_bias: `[D]`.
        activation: as `ops.experts` has them.
        alpha: of clamped_swiglu.
        limit: of clamped_swiglu, above 0.
        dropout: rate at which units are removed before they are ranked; the others are scaled by 1 / (1 - rate).
        by_norm: rank by u times the norm of its value.
        by_magnitude: rank by `|u|`.
        backend: see `ops.backends`.

    Returns:
        y `[T, D]`, the survivors' indices, int64 `[T, K]` in any order, and their u `[T, K]`. NaN and infinity of a token
        reach its own row alone.

    Raises:
        UserError: ranks, widths, dtypes or devices do not fit together, `k` is out of range, the activation is unknown, or its
            `limit` is not above 0.
    """
    keep, keep_scale = None, 1.0
    if dropout != 0.0:
        require_tensors(x=x, keys=keys)
        keep, keep_scale = draw_keep((*x.shape[:1], *keys.shape[:1]), dropout, x.device)
    options = (keep, keep_scale, activation, alpha, limit, by_norm, by_magnitude)
    return call(_topk_rows, (x, keys, values, k, gate_keys, key_bias, gate_bias, value_bias, *options), backend)


def check_product_key_rows(x: Tensor, keys_a: Tensor, keys_b: Tensor, values: Tensor, k: int, activation: str) -> None:
    """That they fit together; raises as `product_key_rows` documents."""
    fits = x.dim() == 2 and keys_a.dim() == 3 and keys_b.dim() == 3 and values.dim() == 2
    if fits:
        (n_heads, n_a, half), width = keys_a.shape, x.shape[1]
        fits = 2 * half == width and (keys_b.shape[0], keys_b.shape[2]) == (n_heads, half)
        fits = fits and tuple(values.shape) == (n_a * keys_b.shape[1], width)
    if not fits:
        raise UserError(
            "`x`, `keys_a`, `keys_b` and `values` must be [T, D], [H, A, D / 2], [H, B, D / 2] and [A B, D]; got "
            f"{tuple(x.shape)}, {tuple(keys_a.shape)}, {tuple(keys_b.shape)} and {tuple(values.shape)}; fix: check the layouts"
        )
    require_one_dtype("`x`, the sub-keys and `values`", x, keys_a, keys_b, values)
    require_one_device(x, keys_a, keys_b, values)
    if not 1 <= k <= values.shape[0]:
        raise UserError(f"`k` must be between 1 and the number of values {values.shape[0]}; got {k}; fix: lower k")
    if activation != "softmax" and activation not in ACTIVATIONS:
        raise unknown_name("activation", activation, (*ACTIVATIONS, "softmax"))


@upcast
def product_key_rows_plain(
    x: Tensor, keys_a: Tensor, keys_b: Tensor, values: Tensor, k: int, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """`product_key_rows` by other operations."""
    x_a, x_b = x.chunk(2, dim=1)
    n_heads = keys_a.shape[0]
    u_a = F.linear(x_a, keys_a.flatten(0, 1)).unflatten(1, (n_heads, -1))
    u_b = F.linear(x_b, keys_b.flatten(0, 1)).unflatten(1, (n_heads, -1))
    best_THK, indices_THK = product_key_topk(u_a, u_b, k)
    alpha_THK = best_THK.softmax(dim=-1) if activation == "softmax" else ACTIVATIONS[activation](best_THK)
    indices, alpha = indices_THK.flatten(1), alpha_THK.flatten(1)
    return weighted_rows(values, indices, alpha), indices, alpha


def _fake_reads(x, keys_a, keys_b, values, k, activation):
    reads = (x.shape[0], keys_a.shape[0] * k)
    return x.new_empty(x.shape), x.new_empty(reads, dtype=torch.int64), x.new_empty(reads)


def _fake_reads_kept(x, keys_a, keys_b, values, k, activation):
    y, indices, alpha = _fake_reads(x, keys_a, keys_b, values, k, activation)
    return y, indices, alpha, x.new_empty(0) if activation in ("relu", "identity", "softmax") else torch.empty_like(alpha)


def _reads_flops(x, keys_a, keys_b, values, k, activation):
    return 2 * x[0] * keys_a[0] * ((keys_a[1] + keys_b[1]) * keys_a[2] + k * x[1])


_READS = "Tensor x, Tensor keys_a, Tensor keys_b, Tensor values, int k, str activation"

_product_key_rows = define(
    "product_key_rows",
    _READS,
    "Tensor y, Tensor indices, Tensor coefficients",
    check=check_product_key_rows,
    cast=("x", "keys_a", "keys_b", "values"),
    plain=product_key_rows_plain,
    fake=_fake_reads,
    flops=_reads_flops,
    kept=Kept(
        returns="Tensor slopes",
        fake=_fake_reads_kept,
        backward=f"Tensor? grad_y, Tensor? grad_coefficients, {_READS}, Tensor indices, Tensor coefficients, Tensor slopes, "
        "bool[]? needed=None",
        gradients=("x", "keys_a", "keys_b", "values"),
        flops_of_backward=flops_of_pairs,
    ),
)


def product_key_rows(
    x: Tensor, keys_a: Tensor, keys_b: Tensor, values: Tensor, *, k: int, activation: str = "relu", backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Reads of a product-key memory: each head's k largest `u[i] = (keys_b x_b)[i // A] + (keys_a x_a)[i mod A]`.

    Args:
        x: `[T, D]` with D even; under autocast it and the weights are cast as `nn.Linear` casts.
        keys_a: `[H, A, D / 2]`, sub-keys of the first half.
        keys_b: `[H, B, D / 2]`.
        values: `[A B, D]`, which all heads share.
        k: values that a head reads, 1 to A B.
        activation: of the chosen u, or softmax over those of a head.
        backend: see `ops.backends`.

    Returns:
        y `[T, D]`, the sum over heads and their reads of `act(u[i]) values[i]`; the reads, int64 `[T, H K]`, each head's in any
        order; and their coefficients `[T, H K]`.

    Raises:
        UserError: ranks, widths, dtypes or devices do not fit together, `k` is out of range, or the activation is unknown.
    """
    return call(_product_key_rows, (x, keys_a, keys_b, values, k, activation), backend)
