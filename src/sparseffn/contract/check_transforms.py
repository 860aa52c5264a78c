"""Checks that whatever PyTorch does to a function gives the right number: derivatives of derivatives, forward mode, batches of
functions and of gradients, recomputation.

Truth is a loop over eager calls, or central differences of them. Each runs in evaluation, and in training where the method
draws no random numbers there, on tokens whose selection does not hang on rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.autograd.functional import hvp
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

from sparseffn.contract.harness import contract, differ, make_layer, require, seeded, tokens, without_random_numbers
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
        if not parameters:
            return self.layer(x)
        names = (name for name, _ in self.layer.named_parameters())
        return functional_call(self.layer, dict(zip(names, parameters, strict=True)), (x,))

    def loss(self, *inputs: Tensor) -> Tensor:
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

    def expect(self, what: str, got: Tensor | Inputs, wanted: Tensor | Inputs) -> None:
        """Both are the same tensors, but for rounding and the error of differences."""
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
        if training and differ(seeded(lambda: layer(x), 1), seeded(lambda: layer(x), 2)) > 0:  # noqa: B023
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


@contract
def second_derivatives(config: FFNConfig) -> None:
    """`hvp`, gradients of gradients, forward over reverse and `hessian` are the differences of gradients."""
    for f in _functions(config):
        v = f.directions()
        ahead, behind = (f.gradients(f.moved(v, step)) for step in (_STEP, -_STEP))
        wanted = tuple((a - b) / (2 * _STEP) for a, b in zip(ahead, behind, strict=True))
        f.expect("autograd.functional.hvp", hvp(f.loss, f.inputs, v)[1], wanted)
        leaves = tuple(tensor.requires_grad_() for tensor in f.inputs)
        along = sum((g * d).sum() for g, d in zip(_gradients(f.loss(*leaves), leaves, again=True), v, strict=True))
        assert isinstance(along, Tensor), "a layer has inputs"
        f.expect("the gradient of a gradient", _gradients(along, leaves), wanted)
        gradient = grad(f.loss, argnums=tuple(range(len(v))))
        f.expect("torch.func.jvp of torch.func.grad", jvp(gradient, f.inputs, v)[1], wanted)
        rest = f.inputs[1:]
        ahead, behind = (f.gradients((f.x + step * v[0], *rest))[0] for step in (_STEP, -_STEP))
        got = torch.einsum("tdse,se->td", hessian(f.loss)(f.x), v[0])
        f.expect("torch.func.hessian", got, (ahead - behind) / (2 * _STEP))


@contract
def forward_mode(config: FFNConfig) -> None:
    """Tangents, by dual numbers and by `torch.func`, are differences of outputs; `jacfwd`, `jacrev` are rows of gradients."""
    for f in _functions(config):
        v = f.directions()
        wanted = (f(*f.moved(v, _STEP)) - f(*f.moved(v, -_STEP))).detach() / (2 * _STEP)
        f.expect("torch.func.jvp", jvp(f, f.inputs, v)[1], wanted)
        with forward_ad.dual_level():
            duals = (forward_ad.make_dual(i, d) for i, d in zip(f.inputs, v, strict=True))
            tangent = forward_ad.unpack_dual(f(*duals)).tangent
        require(tangent is not None, f"dual numbers lose their tangent in {f.mode}")
        assert tangent is not None
        f.expect("the tangent of dual numbers", tangent, wanted)
        rows = _jacobian(f)
        f.expect("torch.func.jacfwd", jacfwd(f)(f.x), rows)
        f.expect("torch.func.jacrev", jacrev(f)(f.x), rows)


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
        n, wanted, parameters = len(f.inputs), f.gradients(f.inputs), f.inputs[1:]
        f.expect("torch.func.grad", grad(f.loss, argnums=tuple(range(n)))(*f.inputs), wanted)
        f.expect("torch.func.vjp", vjp(f.loss, *f.inputs)[1](torch.ones((), dtype=f.x.dtype)), wanted)
        batch = torch.stack([f.x, *(f.x + _MARGIN / 100 * f.tokens(seed) for seed in range(1, _N_BATCH))])
        f.expect("torch.func.vmap", vmap(f)(batch), torch.stack([f(x) for x in batch]))
        models = tuple(torch.stack((p, p * 1.01)) for p in parameters)
        each = [f(f.x, *(p[i] for p in models)) for i in range(2)]
        f.expect("vmap over parameters", vmap(f, (None, *(0 for _ in models)))(f.x, *models), torch.stack(each))
        each = [f.gradients((x, *parameters)) for x in batch]
        got = vmap(grad(f.loss_of, argnums=(0, 1)), (None, 0))(parameters, batch)
        by_input = [torch.stack(gradients) for gradients in zip(*each, strict=True)]
        f.expect("vmap of grad by x", got[1], by_input[0])
        f.expect("vmap of grad by the parameters", got[0], tuple(by_input[1:]))
        _check_batched_gradients(f)


def _check_batched_gradients(f: _Function) -> None:
    leaves = tuple(tensor.requires_grad_() for tensor in f.inputs)
    y = f(*leaves)
    weights = torch.stack([f.tokens(seed) for seed in range(_N_BATCH)])

    def gradients(weight: Tensor, *, batched: bool) -> list[Tensor | None]:
        return list(torch.autograd.grad(y, leaves, weight, is_grads_batched=batched, retain_graph=True, allow_unused=True))

    each = [gradients(weight, batched=False) for weight in weights]
    for got, *rows in zip(gradients(weights, batched=True), *each, strict=True):
        used = [row for row in rows if row is not None]
        require((got is None) == (not used), "is_grads_batched finds another tensor unused")
        if got is not None:
            f.expect("is_grads_batched", got, torch.stack(used))


@contract
def recomputation(config: FFNConfig) -> None:
    """Activation checkpointing of both kinds gives the gradients of the plain step."""
    for f in _functions(config):
        wanted = f.gradients(f.inputs)
        for reentrant in (False, True):
            leaves = tuple(tensor.requires_grad_() for tensor in f.inputs)
            loss = checkpoint(f.loss, *leaves, use_reentrant=reentrant)
            assert isinstance(loss, Tensor), "a loss is a tensor"
            loss.backward()
            got = tuple(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves)
            f.expect(f"checkpoint(use_reentrant={reentrant})", got, wanted)
