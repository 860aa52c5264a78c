"""Checks that whatever PyTorch does to a function gives the right number: derivatives of derivatives, forward mode, batches of
functions and of gradients, recomputation.

Truth is a loop over eager calls, or central differences of them. Each runs in evaluation, and in training where the method
draws no random numbers there, on tokens whose selection does not hang on rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.autograd.functional import hvp
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

from sparseffn.contract.harness import Broken, contract, differ, make_layer, require, seeded, tokens, without_random_numbers
from sparseffn.ffn import FeedForward, FFNConfig

# Central differences of float64 by this step are right to some 1e-9 of unit scale.
_STEP = 1e-6
_TOLERANCE = 1e-6
# Far more than the step moves a score.
_MARGIN = 1e-3

_N_TOKENS = 4
_N_BATCH = 3

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class _Function:
    """A layer as a function of x and its parameters, in one mode."""

    layer: FeedForward
    mode: str
    x: Tensor
    """`[T, d_model]`, tokens whose selection is clear."""

    def __call__(self, x: Tensor, *parameters: Tensor) -> Tensor:
        """The output."""
        return self._call(x, parameters, {})

    def _call(self, x: Tensor, parameters: Inputs, options: dict[str, bool]) -> Any:
        names = (name for name, _ in self.layer.named_parameters())
        given = dict(zip(names, parameters, strict=True)) if parameters else {}
        return functional_call(self.layer, given, (x,), options)

    def loss(self, x: Tensor, *parameters: Tensor) -> Tensor:
        """With the balancing loss."""
        y, stats = self._call(x, parameters, {"return_stats": True})
        return y.square().sum() + stats.balance_loss

    def loss_alone(self, *inputs: Tensor) -> Tensor:
        return self(*inputs).square().sum()

    def loss_of(self, parameters: Inputs, x: Tensor) -> Tensor:
        return self.loss(x, *parameters)

    @property
    def inputs(self) -> Inputs:
        return self.x.detach(), *(parameter.detach() for parameter in self.layer.parameters())

    def tokens(self, seed: int) -> Tensor:
        return tokens(self.layer.config, len(self.x), seed=seed)

    def directions(self) -> Inputs:
        generator = torch.Generator().manual_seed(5)
        return tuple(torch.randn(i.shape, generator=generator, dtype=i.dtype) for i in self.inputs)

    def gradients(self, inputs: Inputs) -> Inputs:
        """Of the loss, eagerly."""
        leaves = tuple(tensor.detach().requires_grad_() for tensor in inputs)
        return _gradients(self.loss(*leaves), leaves)

    def moved(self, direction: Inputs, step: float) -> Inputs:
        return tuple(i + step * d for i, d in zip(self.inputs, direction, strict=True))

    def expect(self, what: str, compute: Callable[[], Tensor | Inputs], wanted: Tensor | Inputs) -> None:
        """What it computes are the wanted tensors, but for rounding and the error of differences."""
        try:
            got = compute()
        except RuntimeError as error:
            raise Broken(f"{what} raises {error} in {self.mode}") from error
        pairs = zip(*((value,) if isinstance(value, Tensor) else value for value in (got, wanted)), strict=True)
        for i, (a, b) in enumerate(pairs):
            scale = max(1.0, float(b.detach().abs().max())) if b.numel() else 1.0
            gap = differ(a, b) / scale
            require(gap <= _TOLERANCE, f"{what} is off by {gap:.2g} (result {i}) in {self.mode}")


def _gradients(loss: Tensor, leaves: Inputs, *, again: bool = False) -> Inputs:
    """Zeros for what the loss does not depend on: evaluation may leave a parameter alone."""
    return torch.autograd.grad(loss, leaves, create_graph=again, allow_unused=True, materialize_grads=True)


def _functions(config: FFNConfig) -> Iterator[_Function]:
    config = without_random_numbers(config)
    for training in (False, True):
        layer = make_layer(config, training=training)
        x = _clear_tokens(layer)
        if training and differ(seeded(lambda: layer(x), 1), seeded(lambda: layer(x), 2)) > 0:
            continue
        yield _Function(layer, "training" if training else "evaluation", x)


@torch.no_grad()
def _clear_tokens(layer: FeedForward) -> Tensor:
    """A few tokens with room between what is selected and what is not, and with no score at a kink."""
    x = tokens(layer.config, 200)
    clear = torch.ones(len(x), dtype=torch.bool)
    for ranking in layer.rankings(x):
        best = ranking.scores.sort(dim=-1, descending=True).values
        if ranking.k < best.shape[-1]:
            gap = best[..., ranking.k - 1] - best[..., ranking.k]
            clear &= (gap > _MARGIN).flatten(1).all(dim=1) if gap.dim() > 1 else gap > _MARGIN
    if layer.formula_flops() is not None:
        clear &= ~layer.near_kink(x, _MARGIN)
    require(int(clear.sum()) >= _N_TOKENS, "of 200 tokens hardly any has a clear selection")
    return x[clear][:_N_TOKENS]


# Lambdas below are called before the next function comes.
# ruff: noqa: B023


@contract
def second_derivatives(config: FFNConfig) -> None:
    """`hvp`, gradients of gradients, forward over reverse and `hessian` are the differences of gradients."""
    for f in _functions(config):
        v = f.directions()
        ahead, behind = (f.gradients(f.moved(v, step)) for step in (_STEP, -_STEP))
        wanted = tuple((a - b) / (2 * _STEP) for a, b in zip(ahead, behind, strict=True))
        gradient = grad(f.loss, argnums=tuple(range(len(v))))
        f.expect("autograd.functional.hvp", lambda: hvp(f.loss, f.inputs, v)[1], wanted)
        f.expect("the gradient of a gradient", lambda: _gradient_of_gradient(f, v), wanted)
        f.expect("torch.func.jvp of torch.func.grad", lambda: jvp(gradient, f.inputs, v)[1], wanted)
        ahead, behind = (f.gradients((f.x + step * v[0], *f.inputs[1:]))[0] for step in (_STEP, -_STEP))
        by_x = (ahead - behind) / (2 * _STEP)
        f.expect("torch.func.hessian", lambda: torch.einsum("tdse,se->td", hessian(f.loss)(f.x), v[0]), by_x)


def _gradient_of_gradient(f: _Function, v: Inputs) -> Inputs:
    leaves = tuple(tensor.requires_grad_() for tensor in f.inputs)
    along = sum((g * d).sum() for g, d in zip(_gradients(f.loss(*leaves), leaves, again=True), v, strict=True))
    assert isinstance(along, Tensor), "a layer has inputs"
    return _gradients(along, leaves)


@contract
def forward_mode(config: FFNConfig) -> None:
    """Tangents, by dual numbers and by `torch.func`, are differences of outputs; `jacfwd`, `jacrev` are rows of gradients."""
    for f in _functions(config):
        v = f.directions()
        wanted = (f(*f.moved(v, _STEP)) - f(*f.moved(v, -_STEP))).detach() / (2 * _STEP)
        f.expect("torch.func.jvp", lambda: jvp(f, f.inputs, v)[1], wanted)
        f.expect("the tangent of dual numbers", lambda: _tangent(f, v), wanted)
        rows = _jacobian(f)
        f.expect("torch.func.jacfwd", lambda: jacfwd(f)(f.x), rows)
        f.expect("torch.func.jacrev", lambda: jacrev(f)(f.x), rows)


def _tangent(f: _Function, v: Inputs) -> Tensor:
    with forward_ad.dual_level():
        duals = (forward_ad.make_dual(i, d) for i, d in zip(f.inputs, v, strict=True))
        tangent = forward_ad.unpack_dual(f(*duals)).tangent
    if tangent is None:
        raise Broken(f"dual numbers lose their tangent in {f.mode}")
    return tangent


def _jacobian(f: _Function) -> Tensor:
    """Of the output by x, row by row."""
    x = f.x.clone().requires_grad_()
    y = f(x)
    rows = [torch.autograd.grad(entry, x, retain_graph=True)[0] for entry in y.flatten()]
    return torch.stack(rows).view(*y.shape, *x.shape)


@contract
def functional(config: FFNConfig) -> None:
    """`torch.func.grad` and `vjp` are eager gradients, `vmap` is a loop: over inputs, parameters, gradients of both."""
    for f in _functions(config):
        everything, wanted = tuple(range(len(f.inputs))), f.gradients(f.inputs)
        one = torch.ones((), dtype=f.x.dtype)
        f.expect("torch.func.grad", lambda: grad(f.loss, argnums=everything)(*f.inputs), wanted)
        f.expect("torch.func.vjp", lambda: vjp(f.loss, *f.inputs)[1](one), wanted)
        _check_batches(f)
        _check_batched_gradients(f)


def _check_batches(f: _Function) -> None:
    parameters = f.inputs[1:]
    batch = torch.stack([f.x, *(f.x + _MARGIN / 100 * f.tokens(seed) for seed in range(1, _N_BATCH))])
    f.expect("torch.func.vmap", lambda: vmap(f)(batch), torch.stack([f(x) for x in batch]))
    models = tuple(torch.stack((p, p * (1 + _STEP))) for p in parameters)
    each = torch.stack([f(f.x, *(p[i] for p in models)) for i in range(2)])
    f.expect("vmap over parameters", lambda: vmap(f, (None, *(0 for _ in models)))(f.x, *models), each)

    def gradients() -> Inputs:
        by_parameters, by_x = vmap(grad(f.loss_of, argnums=(0, 1)), (None, 0))(parameters, batch)
        return by_x, *by_parameters

    rows = zip(*(f.gradients((x, *parameters)) for x in batch), strict=True)
    f.expect("vmap of grad", gradients, tuple(torch.stack(row) for row in rows))


def _check_batched_gradients(f: _Function) -> None:
    leaves = tuple(tensor.requires_grad_() for tensor in f.inputs)
    weights = torch.stack([f.tokens(seed) for seed in range(_N_BATCH)])
    y = f(*leaves)
    found = [torch.autograd.grad(y, leaves, weight, retain_graph=True, allow_unused=True) for weight in weights]
    used = tuple(leaf for leaf, row in zip(leaves, found[0], strict=True) if row is not None)
    wanted = tuple(torch.stack(rows) for rows in zip(*found, strict=True) if rows[0] is not None)

    def batched() -> Inputs:
        return torch.autograd.grad(y, used, weights, is_grads_batched=True)

    f.expect("is_grads_batched", batched, wanted)


@contract
def recomputation(config: FFNConfig) -> None:
    """Activation checkpointing of both kinds gives the gradients of the plain step."""
    for f in _functions(config):
        leaves = tuple(tensor.requires_grad_() for tensor in f.inputs)
        wanted = _gradients(f.loss_alone(*leaves), leaves)
        for reentrant in (False, True):
            what = f"checkpoint(use_reentrant={reentrant})"
            f.expect(what, lambda: _recomputed(f, reentrant=reentrant), wanted)


def _recomputed(f: _Function, *, reentrant: bool) -> Inputs:
    leaves = tuple(tensor.requires_grad_() for tensor in f.inputs)
    # Statistics inside re-entrant checkpointing are refused.
    loss = checkpoint(f.loss_alone, *leaves, use_reentrant=reentrant)
    assert isinstance(loss, Tensor), "a loss is a tensor"
    loss.backward()
    return tuple(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves)
