"""Time of one layer against the dense block, interleaved in one run: forward, and forward + backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sparseffn.bench.timing import interleaved, medians
from sparseffn.errors import UserError
from sparseffn.ffn import FeedForward, FFNConfig

# Largest deviation of the layer from its reference, over the reference's largest value, in float32.
_TOLERANCE = 1e-4
# Tokens on which a layer is held against its reference, which is a Python loop.
_CHECKED_TOKENS = 4


@dataclass(frozen=True, kw_only=True)
class LayerTime:
    """Median seconds of one layer."""

    forward_s: float
    """Evaluation forward, `inference_mode`."""
    training_s: float
    """Training forward and backward, gradients freed between calls."""


def time_layers(
    configs: Mapping[str, FFNConfig], *, n_tokens: int = 1024, rounds: int = 7, seed: int = 0
) -> dict[str, LayerTime]:
    """Median times of each layer on the same random tokens, float32, layers in turn.

    Args:
        configs: label to block.
        n_tokens: tokens of a call.
        rounds: timed calls of each.
        seed: of parameters and tokens.

    Raises:
        UserError: a layer disagrees with its reference; no speed is told of a layer that is not correct.
    """
    layers = {}
    for label, config in configs.items():
        layer = config.build()
        layer.reset_parameters(torch.Generator().manual_seed(seed))
        check_layer(label, layer)
        layers[label] = layer
    tokens = {
        label: torch.randn(n_tokens, layer.config.d_model, generator=torch.Generator().manual_seed(seed))
        for label, layer in layers.items()
    }
    forward = medians(interleaved({k: _forward(m, tokens[k]) for k, m in layers.items()}, rounds=rounds))
    training = medians(interleaved({k: _training(m, tokens[k]) for k, m in layers.items()}, rounds=rounds))
    return {label: LayerTime(forward_s=forward[label], training_s=training[label]) for label in layers}


def check_layer(label: str, layer: FeedForward) -> None:
    """Hold a layer against its reference on a few tokens.

    Raises:
        UserError: they differ by more than float32 rounding allows.
    """
    x = torch.randn(_CHECKED_TOKENS, layer.config.d_model, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got, wanted = layer.eval()(x), layer.reference(x)
    error = float((got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12))
    if not error <= _TOLERANCE:
        raise UserError(
            f"{label} must agree with its reference to be timed; got a relative error of {error:.2g}; fix the layer"
        )


def _forward(layer: FeedForward, x: Tensor) -> Callable[[], object]:
    def call() -> object:
        layer.eval()
        with torch.inference_mode():
            return layer(x)

    return call


def _training(layer: FeedForward, x: Tensor) -> Callable[[], object]:
    leaf = x.clone().requires_grad_()
    # A gradient as a model would send it; that of a sum is one number repeated.
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))

    def call() -> object:
        layer.train()
        layer(leaf).backward(grad)
        layer.zero_grad(set_to_none=True)
        leaf.grad = None
        return None

    return call
