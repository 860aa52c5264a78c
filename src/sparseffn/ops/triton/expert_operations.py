"""`experts` on Triton kernels, with what its backward keeps; arguments as in the schema of ops/experts.py.

Forward: three launches sort the selections by expert, one multiplies by the keys and makes the units, one multiplies by the
values, one adds up a token's rows. Backward reads the same order. An inner top-K is a launch more in both: a
token's units, and what is kept of them, then lie side by side, in the order of the selections. Shapes: see ops/README.md.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from sparseffn.ops.activations import KEEPS_OUTPUT, SWIGLU_ALPHA, SWIGLU_LIMIT
from sparseffn.ops.experts import check_experts
from sparseffn.ops.library import gradient_like
from sparseffn.ops.triton import choice, outer, products
from sparseffn.ops.triton.launch import (
    BIAS_COLUMNS,
    BIAS_ROWS,
    FUSION,
    Rows,
    check_tensors,
    device_of,
    row_blocks,
    run_outer,
    run_product,
    sort_rows,
    start,
    sum_tokens,
    with_lines,
)
from sparseffn.ops.triton.tuning import cdiv

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
_GRADIENTS = ("x", "keys", "values", "gates", "gate_keys", "key_bias", "gate_bias", "value_bias")


@dataclass(frozen=True)
class Problem:
    """The arguments of `experts`, checked; what is no weight is contiguous, x and its like line by line."""

    x: Tensor
    keys: Tensor
    values: Tensor
    gates: Tensor
    indices: Tensor
    gate_keys: Tensor | None = None
    key_bias: Tensor | None = None
    gate_bias: Tensor | None = None
    value_bias: Tensor | None = None
    keep: Tensor | None = None
    keep_scale: float = 1.0
    activation: str = "relu"
    alpha: float = SWIGLU_ALPHA
    limit: float = SWIGLU_LIMIT
    inner_k: int | None = None

    @classmethod
    def of(cls, *arguments: Any) -> Problem:
        """
        Raises:
            UserError: as `ops.experts` documents.
        """
        check_experts(*arguments)
        given = cls(*arguments)
        check_tensors(x=given.x)

        def flat(t: Tensor | None) -> Any:
            return None if t is None else t.contiguous()

        return replace(
            given, x=with_lines(given.x), gates=flat(given.gates), indices=flat(given.indices), keep=flat(given.keep),
            key_bias=flat(given.key_bias), gate_bias=flat(given.gate_bias), value_bias=flat(given.value_bias),
        )  # fmt: skip

    @property
    def gated(self) -> bool:
        return self.gate_keys is not None

    @property
    def size(self) -> int:
        """Units of an expert, G."""
        return self.keys.shape[2]

    @property
    def n_parts(self) -> int:
        """Products of a unit."""
        return 1 + self.gated

    def units(self) -> dict[str, Any]:
        """Constants of kernels that make units."""
        scale = {"KEEP_SCALE": self.keep_scale}
        # A token's units are ranked together.
        order = {"UNSORTED": self.inner_k is not None}
        return {"ACTIVATION": self.activation, "ALPHA": self.alpha, "LIMIT": self.limit, **scale, **order}

    @property
    def survivors(self) -> int:
        """Units of a token that an inner top-K leaves."""
        assert self.inner_k is not None, "without an inner top-K all units survive"
        return self.inner_k

    def survivor_sizes(self) -> dict[str, int]:
        """Constants of kernels of the inner top-K."""
        n_units = self.indices.shape[1] * self.size
        sizes = {"SIZE": self.size, "N": n_units, "K": self.survivors, "PARTS": self.n_parts}
        return {**sizes, **row_blocks(n_units)}

    def key_strides(self, *, back: bool = False) -> dict[str, int]:
        """Constants of kernels that multiply by the keys, or back from their columns to their rows."""
        rows, columns = (2, 1) if back else (1, 2)
        found = {}
        for name, matrices in (("KEYS", self.keys), ("GATES", self.keys if self.gate_keys is None else self.gate_keys)):
            strides = matrices.stride()
            found |= {f"{name}_EXPERT": strides[0], f"{name}_IN": strides[rows], f"{name}_OUT": strides[columns]}
        return found

    def key_tensors(self) -> tuple[Tensor, ...]:
        return (self.keys,) if self.gate_keys is None else (self.keys, self.gate_keys)


def experts(*arguments: Any) -> Tensor:
    """y alone: in evaluation nothing is kept."""
    p = Problem.of(*arguments)
    with device_of(p.x):
        return _forward(p, sort_rows(p.indices, p.keys.shape[0]), keep_hidden=False)[0]


def experts_kept(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The same, and what its backward needs: hidden units, survivors of an inner top-K, order and offsets of the rows."""
    p = Problem.of(*arguments)
    with device_of(p.x):
        rows = sort_rows(p.indices, p.keys.shape[0])
        y, hidden, positions = _forward(p, rows, keep_hidden=True)
    return y, hidden, positions, rows.order, rows.offsets


def _forward(p: Problem, rows: Rows, *, keep_hidden: bool) -> tuple[Tensor, Tensor, Tensor]:
    positions = p.indices.new_empty(0, dtype=torch.int32)
    hidden, a = _up(p, rows, keep_hidden=keep_hidden)
    if p.inner_k is not None:
        hidden, a, positions = _largest(p, hidden, a)
    out = _down(p, rows, a)
    return sum_tokens(out, p.x.shape[0]), p.x.new_empty(0) if hidden is None else hidden, positions


def _up(p: Problem, rows: Rows, *, keep_hidden: bool) -> tuple[Tensor | None, Tensor]:
    """What backward keeps `[R, G]` or `[R, 2 G]`, and the units `[R, G]`, which may be the same tensor."""
    (n_width, size), n_rows = p.keys.shape[1:], rows.n_rows
    same = not p.gated and p.keep is None and p.inner_k is None and p.activation in KEEPS_OUTPUT
    a = p.x.new_empty(n_rows, size, dtype=p.x.dtype if p.inner_k is None else torch.float32)
    hidden = None if not keep_hidden else a if same else p.x.new_empty(n_rows, p.n_parts * size)
    sizes = {"N_IN": n_width, "N_OUT": size, "K": p.indices.shape[1], "X_ROW": p.x.stride(0)}

    def launch(n_programs: int, options: dict[str, Any]) -> None:
        inputs = (p.x, p.keys, p.gate_keys, p.key_bias, p.gate_bias, p.keep, *rows)
        outputs = (None if same else hidden, a, n_rows)
        constants = {**sizes, **p.key_strides(), **p.units(), **options}
        start(products.experts_up_fwd_kernel, n_programs, *inputs, *outputs, **constants)

    run_product("experts_up", rows, (n_width, size), (p.x, *p.key_tensors()), launch, family="gated" if p.gated else "product")
    return hidden, a


def _down(p: Problem, rows: Rows, a: Tensor) -> Tensor:
    """`[T K, D]`: what each selection adds to its token."""
    (size, n_width), out = p.values.shape[1:], p.x.new_empty(rows.n_rows, p.values.shape[2])
    strides = dict(zip(("VALUES_EXPERT", "VALUES_IN", "VALUES_OUT"), p.values.stride(), strict=True))

    def launch(n_programs: int, options: dict[str, Any]) -> None:
        arguments = (a, p.values, p.value_bias, p.gates, *rows, out, rows.n_rows)
        sizes = {"N_IN": size, "N_OUT": n_width, "ROW": size, "GATHERED": p.inner_k is not None}
        start(products.experts_down_fwd_kernel, n_programs, *arguments, **sizes, **strides, **options)

    family = "product" if p.value_bias is None else "hidden"
    run_product("experts_down", rows, (size, n_width), (a, p.values), launch, family=family)
    return out


def experts_backward(grad_y: Tensor, *rest: Any) -> Gradients:
    """Gradients of x, keys, values, gates, gate keys and the three biases; empty for what is not there, or not needed."""
    n = len(fields(Problem))
    arguments, (hidden, positions, order, offsets, *asked) = rest[:n], rest[n:]
    needed = dict(zip(_GRADIENTS, next(iter(asked), None) or [True] * len(_GRADIENTS), strict=True))
    p, rows = Problem.of(*arguments), Rows(order.contiguous(), offsets.contiguous())
    grad, hidden = with_lines(grad_y), hidden.contiguous()
    with device_of(p.x):
        if p.inner_k is not None:
            p, hidden = _spread(p, hidden, positions)
        grad_hidden, alpha, grad_gates = _backward_hidden(p, rows, grad, hidden)
        none = p.x.new_empty
        grad_x = sum_tokens(_backward_x(p, rows, grad_hidden), p.x.shape[0]) if needed["x"] else none(0)
        grad_keys, grad_gate_keys = none(0), none(0)
        if needed["keys"] or (p.gated and needed["gate_keys"]):
            grad_keys, grad_gate_keys = _backward_keys(p, rows, grad_hidden)
        grad_values = _backward_values(p, rows, alpha, grad) if needed["values"] else none(0)
        biases = {name: getattr(p, name) if needed[name] else None for name in ("key_bias", "gate_bias", "value_bias")}
        found = (
            grad_x,
            grad_keys,
            grad_values,
            grad_gates,
            grad_gate_keys,
            *_backward_biases(p, rows, grad_hidden, grad, **biases),
        )
    # One kernel makes the gradients of keys and gate keys, one those of gates and hidden units.
    return tuple(g if wanted else none(0) for g, wanted in zip(found, needed.values(), strict=True))  # pyright: ignore[reportReturnType]


def _backward_hidden(p: Problem, rows: Rows, grad: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of both products `[R, G]` or `[R, 2 G]`, gate times unit `[R, G]`, and the gates' gradient `[T, K]`."""
    (size, n_width), n_rows = p.values.shape[1:], rows.n_rows
    grad_hidden, alpha = torch.empty_like(hidden), p.x.new_empty(n_rows, size)
    strides = dict(zip(("VALUES_EXPERT", "VALUES_OUT", "VALUES_IN"), p.values.stride(), strict=True))
    sizes = {"N_IN": n_width, "N_OUT": size, "K": p.indices.shape[1], "GRAD_ROW": grad.stride(0), "GATED": p.gated}

    def launch(n_programs: int, options: dict[str, Any]) -> Tensor:
        dots = p.gates.new_empty(cdiv(size, options["BLOCK_N"]), *p.gates.shape)
        inputs = (grad, p.values, p.value_bias, hidden, p.gates, p.keep, *rows)
        constants = {**sizes, **strides, **p.units(), **options}
        outputs = (grad_hidden, alpha, dots, n_rows)
        start(products.experts_bwd_hidden_kernel, n_programs, *inputs, *outputs, **constants)
        return dots

    dots = run_product("experts_bwd_hidden", rows, (n_width, size), (grad, p.values), launch, family="hidden")
    return grad_hidden, alpha, dots[0] if dots.shape[0] == 1 else dots.sum(dim=0)


def _backward_x(p: Problem, rows: Rows, grad_hidden: Tensor) -> Tensor:
    """`[T K, D]`: what each selection adds to the gradient of x."""
    (n_width, size), out = p.keys.shape[1:], p.x.new_empty(rows.n_rows, p.x.shape[1])

    def launch(n_programs: int, options: dict[str, Any]) -> None:
        arguments = (grad_hidden, p.keys, p.gate_keys, *rows, out, rows.n_rows)
        constants = {"N_IN": size, "N_OUT": n_width, **p.key_strides(back=True), **options}
        start(products.experts_bwd_x_kernel, n_programs, *arguments, **constants)

    run_product("experts_bwd_x", rows, (size, n_width), (grad_hidden, *p.key_tensors()), launch)
    return out


def _backward_keys(p: Problem, rows: Rows, grad_hidden: Tensor) -> tuple[Tensor, Tensor]:
    out = tuple(gradient_like(keys) for keys in p.key_tensors())
    (_, n_width, size), k = p.keys.shape, p.indices.shape[1]
    strides = {}
    for name, grad in (("KEYS", out[0]), ("GATES", out[-1])):
        strides |= dict(zip((f"{name}_EXPERT", f"{name}_ROW", f"{name}_COLUMN"), grad.stride(), strict=True))
    sizes = {"M": n_width, "N": size, "K": k, "X_ROW": p.x.stride(0), **strides}

    def launch(n_programs: int, targets: tuple[Tensor, ...], n_parts: int, options: dict[str, Any]) -> None:
        pointers = (p.x, grad_hidden, *rows, targets[0], targets[1] if p.gated else None, n_parts)
        start(outer.experts_bwd_keys_kernel, n_programs, *pointers, n_factors=p.n_parts, **sizes, **options)

    run_outer("experts_bwd_keys", rows, out, (p.x, grad_hidden), launch)
    return out[0], out[1] if p.gated else p.x.new_empty(0)


def _backward_values(p: Problem, rows: Rows, alpha: Tensor, grad: Tensor) -> Tensor:
    out, (_, size, n_width) = gradient_like(p.values), p.values.shape
    strides = dict(zip(("VALUES_EXPERT", "VALUES_ROW", "VALUES_COLUMN"), out.stride(), strict=True))
    sizes = {"M": size, "N": n_width, "K": p.indices.shape[1], "GRAD_ROW": grad.stride(0), **strides}

    def launch(n_programs: int, targets: tuple[Tensor, ...], n_parts: int, options: dict[str, Any]) -> None:
        start(outer.experts_bwd_values_kernel, n_programs, alpha, grad, *rows, *targets, n_parts, **sizes, **options)

    run_outer("experts_bwd_values", rows, (out,), (alpha, grad), launch)
    return out


def _backward_biases(
    p: Problem, rows: Rows, grad_hidden: Tensor, grad: Tensor, *,
    key_bias: Tensor | None, gate_bias: Tensor | None, value_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    none, k = p.x.new_empty(0), p.indices.shape[1]
    key, gate, value = (None if b is None else torch.empty_like(b) for b in (key_bias, gate_bias, value_bias))

    def launch(sums: Tensor, gates: Tensor | None, n_width: int, out: tuple[Tensor | None, Tensor | None], n: int) -> None:
        sizes = {"N": n_width, "K": k, "ROW": sums.stride(0), "BLOCK_K": BIAS_ROWS, "BLOCK_N": BIAS_COLUMNS, **FUSION}
        n_programs = rows.n_experts * cdiv(n_width, BIAS_COLUMNS)
        start(outer.experts_bwd_bias_kernel, n_programs, sums, gates, *rows, *out, n_factors=n, **sizes)

    if key is not None or gate is not None:
        launch(grad_hidden, None, p.size, (key, gate), p.n_parts)
    if value is not None:
        launch(grad, p.gates, p.values.shape[2], (value, None), 1)
    return tuple(none if b is None else b for b in (key, gate, value))  # pyright: ignore[reportReturnType]


def _largest(p: Problem, hidden: Tensor | None, a: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
    """Of a token's K G coefficients the `inner_k` largest: what is kept of these, the units without the others, and where
    they are. Rows come and go in the order of the selections.
    """
    units, n_tokens, sizes = torch.empty_like(a, dtype=p.x.dtype), p.indices.shape[0], p.survivor_sizes()
    positions = p.indices.new_empty(0 if hidden is None else n_tokens, p.survivors, dtype=torch.int32)
    kept = None if hidden is None else hidden.new_empty(n_tokens, p.n_parts * p.survivors)
    arguments = (a, p.gates, p.keep, hidden, units, positions, kept, n_tokens)
    start(choice.survivors_kernel, cdiv(n_tokens, sizes["BLOCK_R"]), *arguments, **sizes)
    return kept, units, positions


def _spread(p: Problem, survivors: Tensor, positions: Tensor) -> tuple[Problem, Tensor]:
    """Survivors of an inner top-K as a mask of units that are kept, and their hidden numbers among zeros, by selection."""
    (n_tokens, k), sizes = p.indices.shape, p.survivor_sizes()
    hidden = survivors.new_empty(n_tokens * k, p.n_parts * p.size)
    keep = positions.new_empty(n_tokens, k, p.size, dtype=torch.bool)
    arguments = (positions.contiguous(), survivors, hidden, keep, n_tokens)
    n_programs = cdiv(n_tokens, sizes["BLOCK_R"]) * cdiv(k * p.size, sizes["BLOCK_N"])
    start(choice.spread_kernel, n_programs, *arguments, BITS=p.survivors.bit_length(), **sizes)
    return replace(p, keep=keep), hidden
