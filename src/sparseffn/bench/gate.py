"""No speed without correctness: a candidate is held against the paper's formula in float64 at the size that is timed.

The candidate runs all tokens at the timed shape, dtype and backend, forward and backward. Its output, the gradient of its input
and that of every parameter are compared with the truth. For mixtures and the dense block the truth is the formula with dense
products over all pairs, on all tokens as long as that takes seconds; for other methods it is the layer's slow reference. Where
only some tokens are compared, the gradient sent back is zero at all others, so that parameter gradients are comparable.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparseffn.bench.backends import use_backend
from sparseffn.bench.candidates import Candidate, Setting, build_layer, draw_tokens
from sparseffn.errors import UserError
from sparseffn.ffn import FeedForward, FFNConfig
from sparseffn.ffn._activations import ACTIVATIONS
from sparseffn.ffn._mixture import Mixture
from sparseffn.ffn.dense import Dense
from sparseffn.ffn.sigma_moe import SigmaMoEConfig

# Largest deviation over the truth's largest value, and root mean square over the truth's. Measured on the shapes of the paper's
# models, PyTorch's products and peers, 2026-11: at most 3e-6 in float32 and 1.5e-2 in bfloat16 for the first.
TOLERANCES = {torch.float32: (3e-5, 1e-5), torch.bfloat16: (4e-2, 1.5e-2)}
# The same where a method ranks scores of half precision: near ties then fall otherwise than in float64, in every
# implementation, and a pair selected in one alone is a deviation of 1. Seen of the slow reference itself: 0.44 and 0.12.
_RANKED_IN_HALF = (1.5, 0.25)

# Float64 work of the formula, forward and backward: some seconds on two cores.
_MOST_FLOPS = 2.5e11
# The reference goes through tokens and pairs in Python.
_REFERENCE_TOKENS = 8
# Tokens of one piece of the formula, whose hidden units are all in memory.
_CHUNK = 512
# Smallest gap between the last selected logit and the first that is not, over the logits' spread: below it float32 may choose
# another expert than float64, rightly.
_CLEAR_GAP = 1e-4
_SPARE_TOKENS = 256
# Distance from 0 of a unit's score, of unit scale, at which float32 certainly takes the right slope of ReLU: several times the
# error of a sum of a thousand products.
_CLEAR_SCORE = 1e-5


@dataclass(frozen=True, kw_only=True)
class Truth:
    """Inputs, and what must come out."""

    x: Tensor
    """`[T, d_model]` in the timed dtype."""
    grad: Tensor
    """Gradient sent into the output; zero where tokens are not compared."""
    tokens: Tensor
    """Indices of the tokens that are compared."""
    values: Mapping[str, Tensor]
    """Output and gradients in float64: `output`, `gradient of x`, and `gradient of` each parameter."""
    tolerance: tuple[float, float]
    """Largest deviation and root mean square that a candidate may show, both relative."""


def find_truth(config: FFNConfig, setting: Setting, *, seed: int = 0) -> Truth:
    """Draw tokens and compute the truth for layer `seed` of a config."""
    exact = build_layer(config, setting, seed).double().eval()
    x = clear_tokens(exact, setting, seed=seed)
    tokens = compared_tokens(exact, setting.n_tokens).to(setting.device)
    grad = torch.zeros_like(x)
    grad[tokens] = draw_tokens(config, setting, seed=seed + 2)[tokens]
    if setting.dtype == torch.float32 and config.activation == "relu" and has_formula(exact):
        near = near_kink(exact, x[tokens].double())
        # A single token is compared all the same: with nothing sent back, gradients would not be checked at all.
        grad[tokens[near & ~near.all()]] = 0.0
    values = _by_formula(exact, x.double(), grad.double(), tokens)
    ranked_in_half = setting.dtype != torch.float32 and not has_formula(exact)
    tolerance = _RANKED_IN_HALF if ranked_in_half else TOLERANCES[setting.dtype]
    return Truth(x=x, grad=grad, tokens=tokens, values=values, tolerance=tolerance)


def near_kink(layer: FeedForward, x_TD: Tensor) -> Tensor:
    """Which tokens have a unit whose score is so near ReLU's kink that float32 may rightly take the other slope.

    At 4,096 tokens of 4,110 units some always do. Their outputs are compared, gradients are not sent through them.
    """
    keys, bias = layer.keys_matrix(), layer.key_bias_vector()
    assert keys is not None, "blocks with a formula name their keys"
    near = []
    with torch.no_grad():
        for rows in x_TD.split(_CHUNK):
            scores_TF = rows @ keys.t() if bias is None else rows @ keys.t() + bias
            near.append((scores_TF.abs() < _CLEAR_SCORE).any(dim=1))
    return torch.cat(near)


def _by_formula(layer: FeedForward, x: Tensor, grad: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """Output and gradients of the compared tokens, piece by piece."""
    leaf = x[tokens].requires_grad_()
    outputs = []
    for rows, sent in zip(leaf.split(_CHUNK), grad[tokens].split(_CHUNK), strict=True):
        y = formula(layer, rows)
        y.backward(sent)
        outputs.append(y.detach())
    grad_x = torch.zeros_like(x)
    grad_x[tokens] = _gradient(leaf)
    values = {"output": torch.cat(outputs), "gradient of x": grad_x}
    return values | {f"gradient of {n}": _gradient(p) for n, p in layer.named_parameters()}


def has_formula(layer: FeedForward) -> bool:
    """Whether dense products give the layer's output."""
    if isinstance(layer.config, SigmaMoEConfig) and layer.config.inner_k is not None:
        return False
    return isinstance(layer, Mixture | Dense)


def formula(layer: FeedForward, x_TD: Tensor) -> Tensor:
    """Equation 5 for the dense block, equation 12 over all experts for mixtures, else the reference."""
    if not has_formula(layer):
        return layer.reference(x_TD)
    act = ACTIVATIONS[layer.config.activation]
    if isinstance(layer, Mixture):
        scores_TF = layer.scores_reference(x_TD).repeat_interleave(layer.config.expert_size, dim=1)
        return (scores_TF * act(x_TD @ layer.keys_matrix().t())) @ layer.values_matrix()
    assert isinstance(layer, Dense), "the only other layer with a formula"
    return act(x_TD @ layer.keys.t() + layer.key_bias) @ layer.values + layer.bias


def compared_tokens(layer: FeedForward, n_tokens: int) -> Tensor:
    """Indices of the tokens to compare: all if the truth takes seconds, else evenly spaced ones with the first and the last."""
    each = 3 * 4 * layer.config.d_model * layer.config.n_channels
    most = max(1, int(_MOST_FLOPS / each)) if has_formula(layer) else _REFERENCE_TOKENS
    if most >= n_tokens:
        return torch.arange(n_tokens)
    return torch.linspace(0, n_tokens - 1, most, dtype=torch.float64).round().long().unique()


def clear_tokens(layer: FeedForward, setting: Setting, *, seed: int) -> Tensor:
    """Random tokens whose choice of experts does not hang on rounding, as far as spare ones replace those where it does."""
    drawn = dataclasses.replace(setting, n_tokens=setting.n_tokens + _SPARE_TOKENS)
    x = draw_tokens(layer.config, drawn, seed=seed + 1)
    if not isinstance(layer, Mixture) or layer.config.n_selected == layer.config.n_experts:
        return x[: setting.n_tokens].clone()
    k = layer.config.n_selected
    logits = (x.double() @ layer.router.selector.detach().t()).sort(dim=1, descending=True).values
    unclear = (logits[:, k - 1] - logits[:, k]) <= _CLEAR_GAP * (logits[:, 0] - logits[:, -1])
    return x[unclear.long().argsort(stable=True)[: setting.n_tokens]]


def check(candidate: Candidate, layer: FeedForward, module: nn.Module, truth: Truth) -> dict[str, float]:
    """Hold a candidate against the truth.

    Args:
        candidate: who it is.
        layer: owns the parameters, drawn like the truth's.
        module: what is called; the layer itself or a peer's module over it.
        truth: from `find_truth`.

    Returns:
        Largest deviation of the output and of each gradient, over the truth's largest value.

    Raises:
        UserError: something differs by more than rounding; no speed is told of it.
    """
    use_backend(candidate.backend)
    found = _measured(layer, module, truth)
    most, most_rms = truth.tolerance
    errors = {}
    for name, wanted in truth.values.items():
        error, rms = deviation(found[name], wanted)
        # Not `>`: a NaN must fail.
        if not (error <= most and rms <= most_rms):
            raise UserError(
                f"{candidate.label} must agree with float64 to be timed; got a deviation of {error:.2g} (root mean square "
                f"{rms:.2g}) in the {name}, {len(truth.x)} tokens, {str(truth.x.dtype).removeprefix('torch.')}, backend "
                f"{candidate.backend}, where {most:g} ({most_rms:g}) are allowed; fix: the kernel, or leave it out"
            )
        errors[name] = error
    return errors


def deviation(found: Tensor, wanted: Tensor) -> tuple[float, float]:
    """Largest difference over the largest value, and the same of root mean squares."""
    difference = found.double() - wanted
    tiny = torch.finfo(torch.float32).tiny
    largest = float(difference.abs().max() / wanted.abs().max().clamp_min(tiny))
    return largest, float(difference.square().mean().sqrt() / wanted.square().mean().sqrt().clamp_min(tiny))


def _measured(layer: FeedForward, module: nn.Module, truth: Truth) -> dict[str, Tensor]:
    """Output and gradients of one call on all tokens; the output of the timed forward mode must be the same."""
    module.eval()
    x = truth.x.clone().requires_grad_()
    with torch.inference_mode():
        inferred = module(truth.x)
    y = module(x)
    y.backward(truth.grad)
    values = {"output": y.detach()[truth.tokens], "gradient of x": _gradient(x)}
    values |= {f"gradient of {name}": _gradient(p) for name, p in layer.named_parameters()}
    # Gradients may take another path through the kernels than inference; the output further from the truth is what counts.
    outputs = (values["output"], inferred[truth.tokens])
    values["output"] = max(outputs, key=lambda y: math.inf if y.isnan().any() else deviation(y, truth.values["output"])[0])
    for parameter in layer.parameters():
        parameter.grad = None
    return values


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach().clone()
