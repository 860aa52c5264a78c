"""A mixture at initialisation beside the dense block: output, gradients and load, for given tokens and output gradients.

inputs = gaussian_inputs(d_model=128, n_tokens=8192, n_gradients=1024, seed=0)
dense = measure_block(DenseConfig(d_model=128, d_ff=2048, n_layers=4), inputs, seed=0)
start = measure_start(SigmaMoEConfig(...), dense, inputs, seed=0)

Pure measurements; `predictions` says what they should be.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparseffn.analysis.usage import DEAD_SHARE
from sparseffn.errors import UserError
from sparseffn.evaluation import token_losses
from sparseffn.ffn import FeedForward, FFNConfig
from sparseffn.ffn.mixture import Mixture, TopKMixtureConfig
from sparseffn.models import TransformerXL, TransformerXLConfig, keyed_generator

# Norms that differ by less are rounding, not a draw.
_EQUAL = 1e-5


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a block receives."""

    x_TD: Tensor
    """Tokens as a layer norm hands them out: mean 0 and norm `sqrt(d_model)` each."""
    grad_TD: Tensor
    """Gradient of a loss with respect to the block's output, for the first so many of the tokens."""

    def to(self, device: torch.device) -> Inputs:
        return Inputs(x_TD=self.x_TD.to(device), grad_TD=self.grad_TD.to(device))


@dataclass(frozen=True, kw_only=True)
class BlockScale:
    """Mean square of the output's entries, and squared norms of the loss's gradients; or a mixture's over the dense block's."""

    output: float
    keys: float
    values: float
    input: float


@dataclass(frozen=True, kw_only=True)
class Load:
    """How many tokens the experts serve."""

    variation: float
    """Standard deviation over mean."""
    largest_over_mean: float
    norm_correlation: float | None
    """Of load and selector row norm over experts; None where all norms are equal."""
    dead: float
    """Share of the experts with under 1% of the mean."""


@dataclass(frozen=True, kw_only=True)
class Start:
    ratios: BlockScale
    load: Load
    gate_square: float
    """Mean of `s^2` over selections."""


def gaussian_inputs(*, d_model: int, n_tokens: int, n_gradients: int, seed: int) -> Inputs:
    """Isotropic tokens behind a layer norm, and independent normal gradients of the first `n_gradients`."""
    _check(n_tokens, n_gradients)
    generator = keyed_generator(seed, "gaussian inputs")
    x_TD = F.layer_norm(torch.randn(n_tokens, d_model, generator=generator), (d_model,))
    return Inputs(x_TD=x_TD, grad_TD=torch.randn(n_gradients, d_model, generator=generator))


def text_inputs(model_config: TransformerXLConfig, tokens: Tensor, targets: Tensor, *, n_gradients: int, seed: int) -> Inputs:
    """What the last feedforward block of an untrained model receives on text, and the gradient of the mean cross-entropy.

    Args:
        tokens: int64 `[B, L]`.
        targets: the tokens after them.
        n_gradients: tokens whose gradient is wanted.
    """
    _check(tokens.numel(), n_gradients)
    model = TransformerXL(model_config)
    model.init_parameters(seed)
    seen: dict[str, Tensor] = {}

    def keep(module: torch.nn.Module, args: tuple[Tensor, ...], output: tuple[Tensor, object] | Tensor) -> None:
        seen["x"], seen["y"] = args[0], output[0] if isinstance(output, tuple) else output

    hook = model.ffn_layers()[-1][1].register_forward_hook(keep)
    try:
        loss = token_losses(model(tokens).logits, targets).mean()
    finally:
        hook.remove()
    (grad,) = torch.autograd.grad(loss, seen["y"])
    return Inputs(x_TD=seen["x"].detach().flatten(0, -2), grad_TD=grad.flatten(0, -2)[:n_gradients])


def _check(n_tokens: int, n_gradients: int) -> None:
    if not 1 <= n_gradients <= n_tokens:
        raise UserError(f"`n_gradients` must be in 1 .. n_tokens = {n_tokens}; got {n_gradients}; fix: use more tokens")


def _build(config: FFNConfig, seed: int, device: torch.device) -> FeedForward:
    """The layer with the parameters of a seed; schemes of one size share their random numbers and differ in scale."""
    layer = config.build()
    layer.reset_parameters(keyed_generator(seed, "block"))
    return layer.to(device)


def measure_block(config: FFNConfig, inputs: Inputs, *, seed: int) -> BlockScale:
    """Output and gradients of a dense block or a mixture."""
    return _scale(_build(config, seed, inputs.x_TD.device), inputs)


def measure_start(config: TopKMixtureConfig, dense: BlockScale, inputs: Inputs, *, seed: int) -> Start:
    """A mixture beside the dense block that was measured on the same inputs."""
    layer = _build(config, seed, inputs.x_TD.device)
    assert isinstance(layer, Mixture), "mixtures' configs build mixtures"
    own = dataclasses.asdict(_scale(layer, inputs))
    ratios = BlockScale(**{name: value / getattr(dense, name) for name, value in own.items()})
    load, weights_TK = _routed(layer, config, inputs)
    return Start(ratios=ratios, load=load, gate_square=float(weights_TK.square().mean()))


def start_load(config: TopKMixtureConfig, inputs: Inputs, *, seed: int) -> Load:
    """Of a mixture with the parameters of a seed, without a gradient: cheap enough for many seeds."""
    layer = _build(config, seed, inputs.x_TD.device)
    assert isinstance(layer, Mixture), "mixtures' configs build mixtures"
    return _routed(layer, config, inputs)[0]


@torch.no_grad()
def _routed(layer: Mixture, config: TopKMixtureConfig, inputs: Inputs) -> tuple[Load, Tensor]:
    """The experts' load, and the weights of the selections."""
    routing = layer.router(inputs.x_TD, None)
    counts = torch.bincount(routing.indices_TK.flatten(), minlength=config.n_experts)
    return measure_load(counts, layer.router.selector.norm(dim=1)), routing.weights_TK


def _scale(layer: FeedForward, inputs: Inputs) -> BlockScale:
    x_TD = inputs.x_TD[: inputs.grad_TD.shape[0]].clone().requires_grad_()
    y_TD = layer(x_TD)
    # `keys` and `values` of a dense block, `experts.keys` and `experts.values` of a mixture.
    parameters = {name.rpartition(".")[2]: parameter for name, parameter in layer.named_parameters()}
    gradients = torch.autograd.grad(y_TD, (parameters["keys"], parameters["values"], x_TD), inputs.grad_TD)
    keys, values, inner = (float(g.double().square().sum()) for g in gradients)
    output = float(y_TD.detach().double().square().mean())
    return BlockScale(output=output, keys=keys, values=values, input=inner)


def measure_load(counts: Tensor, norms: Tensor) -> Load:
    """From the tokens that each expert serves and the norms of the selector's rows, `[E]` both."""
    load, lengths = counts.double().cpu().numpy(), norms.double().cpu().numpy()
    mean = load.mean()
    differ = lengths.std() > _EQUAL * lengths.mean() and load.std() > 0
    return Load(
        variation=float(load.std() / mean),
        largest_over_mean=float(load.max() / mean),
        norm_correlation=float(np.corrcoef(load, lengths)[0, 1]) if differ else None,
        dead=float((load < DEAD_SHARE * mean).mean()),
    )
