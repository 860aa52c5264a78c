"""Inputs for `ops.expert_mlp`, and its output and gradients by a backend."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparseffn import ops
from sparseffn.ops.backends import direct_kernel, kernel

INPUTS = ("x", "keys", "values", "gates")


@dataclass(frozen=True)
class Case:
    """Sizes and routing of one computation."""

    n_tokens: int
    d_model: int
    n_experts: int
    size: int
    k: int
    routing: str = "random"
    """random, hot (every token takes the first experts) or few (half of the experts are empty)."""

    def indices(self) -> Tensor:
        """int64 `[T, K]`."""
        scores = torch.rand(self.n_tokens, self.n_experts)
        if self.routing == "few":
            scores[:, ::2] += 2.0
        if self.routing == "hot":
            scores -= torch.arange(self.n_experts)
        return scores.topk(self.k, dim=1).indices

    def inputs(self, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
        """x, keys, values and gates of unit-scale results, x not contiguous; and the direction of the gradient."""
        x = torch.randn(self.d_model, self.n_tokens).t()
        keys = torch.randn(self.n_experts, self.d_model, self.size) / self.d_model**0.5
        values = torch.randn(self.n_experts, self.size, self.d_model) / (self.k * self.size) ** 0.5
        gates = torch.rand(self.n_tokens, self.k)
        wide = torch.promote_types(dtype, torch.float32)
        tensors = [x.to(dtype), keys.to(dtype), values.to(dtype), gates.to(wide)]
        return tensors, torch.randn(self.n_tokens, self.d_model).to(dtype)


def results(
    backend: str,
    inputs: list[Tensor],
    indices: Tensor,
    direction: Tensor,
    *,
    activation: str = "relu",
    keep: Tensor | None = None,
    inner_k: int | None = None,
) -> list[Tensor]:
    """Output and gradients of x, keys, values and gates; by `reference` in float64."""
    scale = 1.0 if keep is None else 2.0
    if backend == "reference":
        leaves = [t.detach().double().requires_grad_() for t in inputs]
        run = direct_kernel("expert_mlp", "reference")
        assert run is not None, "the reference differentiates itself"
        y = run(*leaves, indices, keep, scale, activation, inner_k)
        return [y.detach(), *torch.autograd.grad(y, leaves, direction.double())]
    x = inputs[0]
    if inner_k is not None:
        forward, backward = (kernel(f"expert_mlp_inner{end}", x, backend) for end in ("", "_backward"))
        y, *kept = forward(*inputs, indices, keep, scale, activation, inner_k)
        return [y, *backward(direction, *inputs, *kept, scale, activation)]
    forward, backward = (kernel(f"expert_mlp{end}", x, backend) for end in ("", "_backward"))
    y, *kept = forward(*inputs, indices, keep, scale, activation, save=True)
    return [y, *backward(direction, *inputs, *kept, keep, scale, activation)]


CASES = {
    "one-token": Case(1, 8, 4, 5, 2),
    "decoding": Case(3, 100, 16, 32, 4),
    "odd": Case(63, 33, 5, 7, 3),
    "all-experts": Case(20, 16, 6, 16, 6),
    "one-expert": Case(100, 24, 1, 40, 1),
    "k-is-one": Case(100, 64, 8, 32, 1),
    "hot": Case(250, 20, 6, 12, 2, "hot"),
    "empty-experts": Case(130, 36, 12, 18, 3, "few"),
    "no-tokens": Case(0, 8, 3, 4, 2),
    "wide": Case(70, 140, 4, 130, 2),
}
# A thread's share of an expert and a gradient's rows exceed one chunk here.
LARGE = {"chunks": Case(1300, 40, 2, 72, 1), "hot-chunks": Case(700, 36, 3, 20, 1, "hot")}

__all__ = ["CASES", "INPUTS", "LARGE", "Case", "ops", "results"]
