"""Inputs for `ops.experts`, plain or gated, biased, in any layout; its output and gradients by kernels, PyTorch, reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparseffn.ops import reference
from sparseffn.ops.activations import ACTIVATIONS
from sparseffn.ops.experts import experts_eager
from sparseffn.ops.spec import check_against_truth

# What has a gradient, in the order of the operation's arguments but for `indices`.
NAMES = ("x", "keys", "values", "gates", "gate_keys", "key_bias", "gate_bias", "value_bias")
# Activations, each plain and gated.
UNITS = [(name, gated) for name in ACTIVATIONS for gated in (False, True)] + [("clamped_swiglu", True)]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Keys, gate keys and values of a layout, from dense [E, D, G] and [E, G, D].
Layout = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def _turned(weights: Tensor) -> Tensor:
    """The same as a view of [E, out, in]."""
    return weights.mT.contiguous().mT


def _halves(keys: Tensor, gate_keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    both = torch.cat([keys, gate_keys], dim=-1)
    return *both.chunk(2, dim=-1), values


def _turned_halves(keys: Tensor, gate_keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    both = torch.cat([keys.mT, gate_keys.mT], dim=1)
    return both[:, : keys.shape[2]].mT, both[:, keys.shape[2] :].mT, _turned(values)


def _interleaved(keys: Tensor, gate_keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    both = torch.stack([keys, gate_keys], dim=-1).flatten(-2)
    return both[..., ::2], both[..., 1::2], values


def _turned_interleaved(keys: Tensor, gate_keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    both = torch.stack([keys.mT, gate_keys.mT], dim=2).flatten(1, 2)
    return both[:, ::2].mT, both[:, 1::2].mT, _turned(values)


def _spread(*weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Neither rows nor columns are lines; what lies between is NaN."""

    def every_third(dense: Tensor) -> Tensor:
        wide = dense.new_full((*dense.shape, 3), torch.nan)
        wide[..., 1] = dense
        return wide[..., 1]

    keys, gate_keys, values = map(every_third, weights)
    return keys, gate_keys, values


def _experts_last(*weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    keys, gate_keys, values = (w.permute(1, 2, 0).contiguous().permute(2, 0, 1) for w in weights)
    return keys, gate_keys, values


LAYOUTS: dict[str, Layout] = {
    "in-out": lambda *weights: weights,
    "out-in": lambda keys, gate_keys, values: (_turned(keys), _turned(gate_keys), _turned(values)),
    "keys-out-in": lambda keys, gate_keys, values: (_turned(keys), _turned(gate_keys), values),
    "values-out-in": lambda keys, gate_keys, values: (keys, gate_keys, _turned(values)),
    "halves": _halves,
    "out-in-halves": _turned_halves,
    "interleaved": _interleaved,
    "out-in-interleaved": _turned_interleaved,
    "spread": _spread,
    "experts-last": _experts_last,
}


def _apart(lines: Tensor) -> Tensor:
    """The same [E, lines, numbers] with 8,192 numbers from line to line, of which those between are NaN."""
    wide = lines.new_full((*lines.shape[:2], 8192), torch.nan)
    wide[..., : lines.shape[2]] = lines
    return wide[..., : lines.shape[2]]


def _interleaved_apart(keys: Tensor, gate_keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    both = _apart(torch.stack([keys, gate_keys], dim=-1).flatten(-2))
    return both[..., ::2], both[..., 1::2], _apart(values)


# Lines that push each other out of the cache.
APART: dict[str, Layout] = {
    "in-out": lambda keys, gate_keys, values: (_apart(keys), _apart(gate_keys), _apart(values)),
    "out-in": lambda keys, gate_keys, values: (_apart(keys.mT).mT, _apart(gate_keys.mT).mT, _apart(values.mT).mT),
    "interleaved": _interleaved_apart,
}


@dataclass(frozen=True)
class Options:
    """What the experts are beside their sizes."""

    layout: str = "in-out"
    activation: str = "relu"
    gated: bool = False
    biased: bool = False
    dropout: bool = False
    inner_k: int | None = None
    apart: bool = False


@dataclass(frozen=True)
class Problem:
    """Inputs of one call."""

    inputs: dict[str, Tensor]
    """Of NAMES, those that are there."""
    indices: Tensor
    direction: Tensor
    """Of the gradient."""
    keep: Tensor | None
    options: Options

    def call(self, run: Callable[..., Tensor], given: dict[str, Tensor]) -> Tensor:
        """`run`, with the signature of the operation, of these inputs."""
        x, keys, values, gates, *rest = (given.get(name) for name in NAMES)
        o, scale = self.options, 1.0 if self.keep is None else 2.0
        # In half precision hardly a unit is clamped: rounding moves units over the edge, which changes whole gradients.
        limit = 0.8 if torch.finfo(self.direction.dtype).bits >= 32 else 7.0
        return run(x, keys, values, gates, self.indices, *rest, self.keep, scale, o.activation, 1.3, limit, o.inner_k)

    def results(self, backend: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Outputs with and without gradients to follow, and these, by `cpu`, `torch` or `reference`, in a dtype."""
        run = RUN[backend]
        given = {n: t.detach() for n, t in self.inputs.items()}
        if dtype is not None:
            wide = torch.promote_types(dtype, torch.float32)
            given = {n: t.to(wide if n == "gates" else dtype) for n, t in given.items()}
        leaves = {n: t.requires_grad_() for n, t in given.items()}
        y = self.call(run, leaves)
        grads = torch.autograd.grad(y, list(leaves.values()), self.direction.to(y.dtype), materialize_grads=True)
        y = y.detach()
        found = {"": y, **dict(zip(leaves, grads, strict=True))}
        if backend == "cpu":
            with torch.no_grad():
                found["evaluated"] = self.call(run, leaves)
        else:
            found["evaluated"] = y
        return found


# All with the signature of the operation.
RUN: dict[str, Callable[..., Any]] = {
    "cpu": torch.ops.sparseffn.experts,
    "torch": experts_eager,
    "reference": reference.experts,
}


@dataclass(frozen=True)
class Case:
    """Sizes and routing of one computation."""

    n_tokens: int
    d_model: int
    n_experts: int
    size: int
    k: int
    routing: str = "random"
    """random, hot (every token takes the first experts), few (half are empty) or twice (one expert in all slots)."""

    def indices(self) -> Tensor:
        """int64 `[T, K]`."""
        scores = torch.rand(self.n_tokens, self.n_experts)
        if self.routing == "few":
            scores[:, ::2] += 2.0
        if self.routing == "hot":
            scores -= torch.arange(self.n_experts)
        chosen = scores.topk(self.k, dim=1).indices
        return chosen[:, :1].expand_as(chosen) if self.routing == "twice" else chosen

    def draw(self, options: Options, dtype: torch.dtype) -> Problem:
        """Inputs of unit-scale results; x, gates and the gradient are not contiguous."""
        t, d, e, g, k = self.n_tokens, self.d_model, self.n_experts, self.size, self.k
        o, wide = options, torch.promote_types(dtype, torch.float32)
        keys, gate_keys = (torch.randn(e, d, g) / d**0.5 for _ in range(2))
        values = torch.randn(e, g, d) / (k * g) ** 0.5
        keys, gate_keys, values = (APART if o.apart else LAYOUTS)[o.layout](*(w.to(dtype) for w in (keys, gate_keys, values)))
        biases = [torch.randn(shape).to(dtype) / 2 for shape in ((e, g), (e, g), (e, d))]
        inputs = {"x": torch.randn(d, t).t().to(dtype), "keys": keys, "values": values, "gates": torch.rand(k, t).t().to(wide)}
        if o.gated:
            inputs["gate_keys"] = gate_keys
        if o.biased:
            inputs["key_bias"] = biases[0]
            inputs |= {"gate_bias": biases[1]} if o.gated else {}
            inputs["value_bias"] = biases[2]
        keep = torch.rand(t, k, g) >= 0.5 if o.dropout else None
        return Problem(inputs, self.indices(), torch.randn(d, t).t().to(dtype), keep, options)


CASES = {
    "one-token": Case(1, 8, 4, 5, 2),
    "decoding": Case(3, 100, 16, 32, 4),
    "odd": Case(63, 33, 5, 7, 3),
    "few-odd": Case(11, 33, 5, 17, 2),
    "few-but-of-one": Case(60, 36, 8, 20, 2, "hot"),
    "all-experts": Case(20, 16, 6, 16, 6),
    "one-expert": Case(100, 24, 1, 40, 1),
    "k-is-one": Case(100, 64, 8, 32, 1),
    "hot": Case(250, 20, 6, 12, 2, "hot"),
    "empty-experts": Case(130, 36, 12, 18, 3, "few"),
    "one-expert-twice": Case(9, 20, 4, 11, 2, "twice"),
    "no-tokens": Case(0, 8, 3, 4, 2),
    "wide": Case(70, 140, 4, 130, 2),
}
# A thread's share of an expert and a gradient's rows exceed one chunk here.
LARGE = {
    "chunks": Case(1300, 40, 2, 72, 1),
    "hot-chunks": Case(700, 36, 3, 20, 1, "hot"),
    "many-rows": Case(701, 205, 4, 137, 3, "hot"),
    # Weights are read in pieces for several panels, the last of which are smaller.
    "deep": Case(301, 405, 3, 261, 2, "hot"),
    # Where columns are lines: of keys at lines of the cache, of values not, so that dot products take the former alone; then
    # both are, and rows so many that neither is taken.
    "keys-by-dots": Case(60, 64, 2, 20, 1),
    "by-panels": Case(200, 64, 2, 48, 1),
    # For lines that are apart, of which panels are copied.
    "apart": Case(40, 64, 2, 288, 1),
    # Gradients so large that they are written past the caches.
    "streamed": Case(200, 64, 16, 288, 1),
}


ENTRIES = 200
"""Gates, and so gradients of gates, that a comparison is made of at least, if `MOST_DRAWS` draws have as many.

The limit on the largest error is twice what plain PyTorch's is, which has luck where few are compared: of 60 gradients and
61 seeds ours were above it for two, though the root mean square of their errors was 0.8 of plain PyTorch's. The largest of
200 errors wanders far less."""
MOST_DRAWS = 16


def verify(case: Case, dtype: torch.dtype, options: Options | None = None) -> None:
    """Outputs and gradients of the kernels: to rounding in float64, else as near the truth as ops/spec.py demands.

    A case of few tokens is drawn several times, and its results are compared together.
    """
    n_draws = 1 if dtype == torch.float64 else max(1, min(MOST_DRAWS, ENTRIES // max(1, case.n_tokens * case.k)))
    results: list[tuple[dict[str, Tensor], ...]] = []
    for _ in range(n_draws):
        problem = case.draw(options or Options(), dtype)
        plain = problem.results("torch") if dtype != torch.float64 else {}
        results.append((problem.results("cpu"), problem.results("reference", torch.float64), plain))
    got, truth, plain = (
        {name: torch.stack([d[name] for d in drawn]) for name in drawn[0]} for drawn in zip(*results, strict=True)
    )
    assert got.keys() == truth.keys()
    for name, wanted in truth.items():
        if dtype == torch.float64:
            torch.testing.assert_close(got[name], wanted, atol=1e-12, rtol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
        else:
            key = "experts" if name in ("", "evaluated") else f"experts.{name}"
            check_against_truth(key, got[name], plain[name], wanted, dtype)


__all__ = ["APART", "CASES", "DTYPES", "LARGE", "LAYOUTS", "NAMES", "UNITS", "Case", "Options", "Problem", "verify"]
