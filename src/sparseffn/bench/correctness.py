"""No speed without correctness: a candidate is compared with the paper's formula in float64 at the size that is timed.

The candidate runs all tokens at the timed shape, dtype and backend, forward and backward. Its output, the gradient of its input
and that of every parameter are compared with the truth: the method's formula (`FeedForward.formula_TD`), on all tokens as long
as that takes seconds, or where a method has none its slow reference on a few tokens. Where only some tokens are compared, the
gradient sent back is zero at all others, so that parameter gradients are comparable.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparseffn.bench.candidates import Candidate, Setting, build_layer, draw_tokens, use_backend
from sparseffn.errors import UserError
from sparseffn.ffn import FeedForward, FFNConfig
from sparseffn.ffn.feedforward import Ranking

# Largest deviation over the truth's largest value, and root mean square over the truth's. Measured on the shapes of the paper's
# models, PyTorch's products and peers, 2026-11: at most 3e-6 in float32 and 1.5e-2 in bfloat16 for the first.
# float16 has three bits more than bfloat16, and loses some of them in small numbers: a quarter, not an eighth.
TOLERANCES = {torch.float32: (3e-5, 1e-5), torch.bfloat16: (4e-2, 1.5e-2), torch.float16: (1e-2, 3.8e-3)}
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
# The same where K of thousands of pairs are ranked, whose scores stand close: ten times the error of such a sum of products.
_CLEAR_PAIR_GAP = 3e-6
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
    has_formula = exact.formula_flops() is not None
    if setting.dtype == torch.float32 and config.activation == "relu" and has_formula:
        near = near_kink(exact, x[tokens].double())
        # A single token is compared all the same: with nothing sent back, gradients would not be checked at all.
        grad[tokens[near & ~near.all()]] = 0.0
    values = _by_formula(exact, x.double(), grad.double(), tokens)
    ranks_pairs = not has_formula or any(ranking.of_pairs for ranking in exact.rankings(x[:1].double()))
    ranked_in_half = setting.dtype != torch.float32 and ranks_pairs
    tolerance = _RANKED_IN_HALF if ranked_in_half else TOLERANCES[setting.dtype]
    return Truth(x=x, grad=grad, tokens=tokens, values=values, tolerance=tolerance)


def near_kink(layer: FeedForward, x_TD: Tensor) -> Tensor:
    """Which tokens have a unit whose score is so near ReLU's kink that float32 may rightly take the other slope.

    At 4,096 tokens of 4,110 units some always do. Their outputs are compared, gradients are not sent through them.
    """
    with torch.no_grad():
        return torch.cat([layer.near_kink(rows, _CLEAR_SCORE) for rows in x_TD.split(_CHUNK)])


def _by_formula(layer: FeedForward, x: Tensor, grad: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """Output and gradients of the compared tokens, piece by piece."""
    leaf = x[tokens].requires_grad_()
    outputs = []
    for rows, sent in zip(leaf.split(_CHUNK), grad[tokens].split(_CHUNK), strict=True):
        y = layer.formula_TD(rows)
        y.backward(sent)
        outputs.append(y.detach())
    grad_x = torch.zeros_like(x)
    grad_x[tokens] = _gradient(leaf)
    values = {"output": torch.cat(outputs), "gradient of x": grad_x}
    return values | {f"gradient of {n}": _gradient(p) for n, p in layer.named_parameters()}


def compared_tokens(layer: FeedForward, n_tokens: int) -> Tensor:
    """Indices of the tokens to compare: all if the truth takes seconds, else evenly spaced ones with the first and the last."""
    flops = layer.formula_flops()
    # Backward costs twice as much as forward.
    most = _REFERENCE_TOKENS if flops is None else max(1, int(_MOST_FLOPS / (3 * flops)))
    if most >= n_tokens:
        return torch.arange(n_tokens)
    return torch.linspace(0, n_tokens - 1, most, dtype=torch.float64).round().long().unique()


def clear_tokens(layer: FeedForward, setting: Setting, *, seed: int) -> Tensor:
    """Random tokens whose choice of experts does not hang on rounding, as far as spare ones replace those where it does."""
    drawn = dataclasses.replace(setting, n_tokens=setting.n_tokens + _SPARE_TOKENS)
    x = draw_tokens(layer.config, drawn, seed=seed + 1)
    unclear = torch.cat([_unclear(layer, rows.double()) for rows in x.split(_CHUNK)])
    return x[unclear.long().argsort(stable=True)[: setting.n_tokens]]


def _unclear(layer: FeedForward, x_TD: Tensor) -> Tensor:
    """Tokens for which the last that is selected and the first that is not stand too close."""
    unclear_T = torch.zeros(len(x_TD), dtype=torch.bool, device=x_TD.device)
    for ranking in layer.rankings(x_TD):
        unclear_T |= _stand_close(ranking)
    return unclear_T


def _stand_close(ranking: Ranking) -> Tensor:
    """Tokens whose K-th largest rank and the next one differ by no more than a share of the ranks' spread."""
    k, scores = ranking.k, ranking.scores
    if k == scores.shape[-1]:
        return torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    gap = _CLEAR_PAIR_GAP if ranking.of_pairs else _CLEAR_GAP
    scores = scores.sort(dim=-1, descending=True).values
    last, next_one, spread = scores[..., k - 1], scores[..., k], scores[..., 0] - scores[..., -1]
    # ReLU's zeros are many and alike: none of them adds anything.
    is_zero = (last == 0) & (next_one == 0)
    return ((last - next_one <= gap * spread) & ~is_zero).view(len(scores), -1).any(dim=1)


def check(candidate: Candidate, layer: FeedForward, module: nn.Module, truth: Truth) -> dict[str, float]:
    """Compare a candidate with the truth.

    Args:
        candidate: its label and backend.
        layer: owns the parameters, drawn like the truth's.
        module: what is called; the layer itself or a peer's module over it.
        truth: from `find_truth`.

    Returns:
        Largest deviation of the output and of each gradient, over the truth's largest value.

    Raises:
        UserError: something differs by more than rounding; no speed is reported for it.
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
