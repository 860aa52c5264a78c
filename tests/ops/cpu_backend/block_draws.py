"""Drawn Top-K blocks and product-key memories, held against their equations over the units that the kernels chose.

In float64 the choice is that of a stable sort and results agree to rounding. In other dtypes the choice is as good, and a
result errs at most twice as much as PyTorch's products in that dtype, but for some roundings, in which these may be lucky:
those of a few terms, and in float32 of a sum of n terms one and a half times their square root. PyTorch's own float32 products
of 265 to 319 terms err 2 to 6 times as much in one order as in another.

A rounding is an epsilon of the result, or what the result changes by where each input is changed by an epsilon of itself, up or
down: where large terms cancel this is more, whatever the order of their sum.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from expert_cases import DTYPES, UNITS
from torch import Tensor

from sparseffn.ops.activations import ACTIVATIONS, hidden_units

F64 = torch.float64
ROUNDINGS, ROUNDINGS_OF_SUMS = 6, 1.5
TRIALS = 3
# Of the largest score: scores are computed in float32 or wider.
SCORE_ERROR, SCORE_ERROR_F64 = 1e-4, 1e-12
PER_TOKEN = ("y", "coefficients", "x")
Inputs = dict[str, Tensor]


def numbers(*shape: int, terms: int = 1) -> Tensor:
    """Values whose sums of so many products have unit scale."""
    return torch.randn(*shape, dtype=F64) / terms**0.5


def sizes(draw: random.Random) -> tuple[int, torch.dtype]:
    """Tokens, none and one among them; and float64 half of the time."""
    return draw.choice([0, 1, 2, 7, 64, draw.randint(1, 400)]), draw.choice([F64, F64, *DTYPES[1:]])


def hold(
    inputs: Inputs, dtype: torch.dtype, call: Callable[..., Sequence[Tensor]], truth: Callable[..., Sequence[Tensor]]
) -> Tensor:
    """Outputs and gradients, through both outputs, are near the equation's; the indices that the kernel chose."""
    rounded = {name: t.to(dtype) for name, t in inputs.items()}

    drawn, eps = torch.Generator().manual_seed(0), torch.finfo(dtype).eps

    def changed(t: Tensor) -> Tensor:
        return t * (1 + eps * (1 - 2 * torch.randint(2, t.shape, generator=drawn)))

    def results(
        function: Callable[..., Sequence[Tensor]], of: torch.dtype, change: Callable[[Tensor], Tensor] = Tensor.detach
    ) -> tuple[Tensor | None, list[Tensor]]:
        leaves = {name: change(t.to(of)).requires_grad_() for name, t in rounded.items()}
        y, coefficients, *indices = function(**leaves)
        # In no order: from -1 to 1, a sum over tokens would grow to its middle, and then be taken away again.
        directions = torch.Generator().manual_seed(1)
        sent = [torch.randn(t.shape, dtype=F64, generator=directions).to(dtype).to(of) for t in (y, coefficients)]
        grads = torch.autograd.grad([y, coefficients], tuple(leaves.values()), [*map(change, sent)], materialize_grads=True)
        return next(iter(indices), None), [y.detach(), coefficients.detach(), *grads]

    indices, got = results(call, dtype)
    assert indices is not None
    # Of a sum over tokens (and heads, which may all read one value), units or columns.
    heads = len(rounded["keys_a"]) if "keys_a" in rounded else 1
    most_terms = max(heads * len(rounded["x"]), *(max(t.shape) for t in rounded.values()))
    roundings = max(ROUNDINGS, ROUNDINGS_OF_SUMS * most_terms**0.5) if dtype == torch.float32 else ROUNDINGS

    def equation(**given: Tensor) -> Sequence[Tensor]:
        return truth(indices, **given)

    (_, plain), (_, wanted) = results(equation, dtype), results(equation, F64)
    trials = [results(equation, F64, changed)[1] for _ in range(TRIALS if dtype != F64 else 0)]
    for name, ours, theirs, true, *others in zip(("y", "coefficients", *inputs), got, plain, wanted, *trials, strict=True):
        if true.numel() == 0:
            continue
        # A parameter's gradient is a sum over tokens, whose terms may cancel.
        scale = true.abs().max().clamp_min(1 if name in PER_TOKEN else len(rounded["x"]) ** 0.5)
        error = (ours.double() - true).abs().max()
        rounding = max([eps * scale, *((other - true).abs().max() for other in others)])
        limit = 2 * (theirs.double() - true).abs().max() + roundings * rounding
        if dtype == F64:
            limit = 1e-12 * scale
        assert bool(error <= limit), f"{name}: error {error:.3g}, at most {limit:.3g} is allowed"
    return indices


def check_choice(ranks: Tensor, indices: Tensor, dtype: torch.dtype) -> None:
    """The largest of each row, each once; in float64 ties go to the lowest index."""
    k = indices.shape[-1]
    ordered = indices.sort(dim=-1).values
    assert bool((ordered.diff(dim=-1) > 0).all()), "a unit is chosen twice"
    best = ranks.sort(dim=-1, descending=True, stable=True)
    if dtype == F64:
        same = (ordered == best.indices[..., :k].sort(dim=-1).values).all(dim=-1)
        # A GELU that saturates is -0.0 here, and in the kernel's arithmetic perhaps 1e-20 below it: no tie.
        saturated = ((ranks == 0) & ranks.signbit()).any(dim=-1)
        assert bool((same | saturated).all()), "the choice is not a stable sort's"
    if ranks.numel():
        allowed = SCORE_ERROR_F64 if dtype == F64 else SCORE_ERROR
        worst, least = ranks.gather(-1, indices).min(dim=-1).values, best.values[..., k - 1]
        assert bool((worst >= least - allowed * ranks.abs().max()).all()), "a larger unit is left out"


def topk_block(draw: random.Random) -> None:
    """Top-K activation: all units and one, gated, biased, with dropout, ranked by magnitude and by norm, any layout."""
    n_tokens, dtype = sizes(draw)
    n_units, width = draw.choice([1, 3, 33, draw.randint(1, 400)]), draw.choice([1, 16, 33, draw.randint(1, 200)])
    k, (activation, gated) = draw.choice([1, n_units, draw.randint(1, n_units)]), draw.choice(UNITS)
    inputs = {"x": numbers(n_tokens, width), "keys": numbers(n_units, width, terms=width)}
    inputs["values"] = numbers(n_units, width, terms=k)
    if gated:
        inputs["gate_keys"] = numbers(n_units, width, terms=width)
    for name, n in (("key_bias", n_units), ("value_bias", width), *([("gate_bias", n_units)] if gated else [])):
        if draw.random() < 0.5:
            inputs[name] = numbers(n)
    if draw.random() < 0.3:
        inputs |= {name: inputs[name].t().contiguous().t() for name in ("x", "keys", "values")}
    keep, scale = (torch.rand(n_tokens, n_units) >= 0.3, 1.5) if draw.random() < 0.3 else (None, 1.0)
    by_norm, by_magnitude = draw.random() < 0.3, draw.random() < 0.3
    tensors = ("x", "keys", "values", None, "gate_keys", "key_bias", "gate_bias", "value_bias")

    def call(**given: Tensor) -> Sequence[Tensor]:
        arguments = [k if name is None else given.get(name) for name in tensors]
        options = (keep, scale, activation, 1.3, 0.8, by_norm, by_magnitude)
        y, indices, coefficients = torch.ops.sparseffn.topk_rows(*arguments, *options)
        return y, coefficients, indices

    def units(x: Tensor, keys: Tensor, **given: Tensor) -> Tensor:
        up = F.linear(x, given["gate_keys"], given.get("gate_bias")) if gated else None
        u = hidden_units(activation, F.linear(x, keys, given.get("key_bias")), up, alpha=1.3, limit=0.8)
        return u if keep is None else torch.where(keep, u * scale, 0.0)

    def truth(indices: Tensor, **given: Tensor) -> Sequence[Tensor]:
        u = units(**given)
        y = torch.where(torch.zeros_like(u, dtype=torch.bool).scatter(1, indices, True), u, 0.0) @ given["values"]
        return y + given.get("value_bias", 0.0), u.gather(1, indices)

    indices = hold(inputs, dtype, call, truth)
    ranks = units(**{name: t.to(dtype).double() for name, t in inputs.items()})
    ranks = ranks.abs() if by_magnitude else ranks
    check_choice(ranks * inputs["values"].to(dtype).double().norm(dim=1) if by_norm else ranks, indices, dtype)


def product_key_block(draw: random.Random) -> None:
    """Product-key reads: heads, sub-keys of both halves, activations and a softmax, one read and all."""
    n_tokens, dtype = sizes(draw)
    half, n_heads = draw.choice([1, 8, draw.randint(1, 80)]), draw.randint(1, 4)
    n_a, n_b = draw.randint(1, 24), draw.randint(1, 24)
    k = draw.choice([1, min(n_a * n_b, 150), draw.randint(1, min(n_a * n_b, 150))])
    activation = draw.choice([*ACTIVATIONS, "softmax"])
    inputs = {"x": numbers(n_tokens, 2 * half), "values": numbers(n_a * n_b, 2 * half, terms=n_heads * k)}
    inputs |= {name: numbers(n_heads, n, half, terms=half) for name, n in (("keys_a", n_a), ("keys_b", n_b))}

    def call(**given: Tensor) -> Sequence[Tensor]:
        arguments = (given["x"], given["keys_a"], given["keys_b"], given["values"], k, activation)
        y, indices, coefficients = torch.ops.sparseffn.product_key_rows(*arguments)
        return y, coefficients, indices

    def sums(x: Tensor, keys_a: Tensor, keys_b: Tensor) -> Tensor:
        u_a, u_b = (
            torch.einsum("bd,hnd->bhn", part, keys) for part, keys in zip(x.chunk(2, dim=1), (keys_a, keys_b), strict=True)
        )
        return (u_b[..., :, None] + u_a[..., None, :]).flatten(2)

    def truth(indices: Tensor, values: Tensor, **given: Tensor) -> Sequence[Tensor]:
        best = sums(**given).gather(2, indices.view(-1, n_heads, k))
        alpha = (best.softmax(dim=-1) if activation == "softmax" else ACTIVATIONS[activation](best)).flatten(1)
        every = alpha.new_zeros(len(alpha), len(values)).scatter_add(1, indices, alpha)
        return every @ values, alpha

    indices = hold(inputs, dtype, call, truth)
    rounded = {name: t.to(dtype).double() for name, t in inputs.items() if name != "values"}
    chosen, ranks = indices.view(-1, n_heads, k), sums(**rounded)
    if dtype == F64:
        # Which of equal sums is taken is the kernel's choice.
        torch.testing.assert_close(
            ranks.gather(2, chosen).sort(dim=-1).values, ranks.topk(k).values.flip(-1), atol=1e-12, rtol=0
        )
    check_choice(ranks, chosen, torch.float32 if dtype == F64 else dtype)
