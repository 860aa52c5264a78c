"""No speed without correctness: a candidate is held against the paper's formula in float64 at the size that is timed.

The candidate runs all tokens at the timed shape, dtype and backend, forward and backward. Its output, the gradient of its input
and that of every parameter are compared with the truth: the formula with dense products over all pairs, on all tokens as long
as that takes seconds, or where there is none (a method registered from outside) the layer's slow reference on a few tokens.
Where only some tokens are compared, the gradient sent back is zero at all others, so that parameter gradients are comparable.
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
from sparseffn.ffn.dense import Dense
from sparseffn.ffn.mixture import Mixture
from sparseffn.ffn.pkm import PKM
from sparseffn.ffn.topk import TopK
from sparseffn.ops.activations import ACTIVATIONS

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
    if setting.dtype == torch.float32 and config.activation == "relu" and has_formula(exact):
        near = near_kink(exact, x[tokens].double())
        # A single token is compared all the same: with nothing sent back, gradients would not be checked at all.
        grad[tokens[near & ~near.all()]] = 0.0
    values = _by_formula(exact, x.double(), grad.double(), tokens)
    ranks_pairs = isinstance(exact, TopK | PKM) or not has_formula(exact) or _survivors(exact) is not None
    ranked_in_half = setting.dtype != torch.float32 and ranks_pairs
    tolerance = _RANKED_IN_HALF if ranked_in_half else TOLERANCES[setting.dtype]
    return Truth(x=x, grad=grad, tokens=tokens, values=values, tolerance=tolerance)


def near_kink(layer: FeedForward, x_TD: Tensor) -> Tensor:
    """Which tokens have a unit whose score is so near ReLU's kink that float32 may rightly take the other slope.

    At 4,096 tokens of 4,110 units some always do. Their outputs are compared, gradients are not sent through them.
    """
    with torch.no_grad():
        return torch.cat([_is_near_kink(layer, rows) for rows in x_TD.split(_CHUNK)])


def _is_near_kink(layer: FeedForward, x_TD: Tensor) -> Tensor:
    scores = pair_scores(layer, x_TD)
    near = scores.abs() < _CLEAR_SCORE
    if isinstance(layer, PKM) and layer.config.k is not None:
        # Of many thousands of pairs some always are; those that no head reads do not matter.
        least = scores.topk(layer.config.k).values[..., -1:]
        near &= scores > least - 2 * _CLEAR_SCORE
    return near.flatten(1).any(dim=1)


def pair_scores(layer: FeedForward, x_TD: Tensor) -> Tensor:
    """The score of every pair before the activation, `[T, d_ff]`; of product keys `[T, H, n_a n_b]`."""
    if isinstance(layer, PKM):
        halves = zip(x_TD.chunk(2, dim=1), (layer.keys_a, layer.keys_b), strict=True)
        u_a, u_b = (torch.einsum("td,knd->tkn", x, keys) for x, keys in halves)
        return (u_b[..., :, None] + u_a[..., None, :]).flatten(2)
    keys, bias = layer.keys_matrix(), layer.key_bias_vector()
    assert keys is not None, "blocks with a formula name their keys"
    return x_TD @ keys.t() if bias is None else x_TD @ keys.t() + bias


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
    return isinstance(layer, Mixture | Dense | TopK | PKM)


def _survivors(layer: FeedForward) -> int | None:
    """Units that a top-K inside the experts leaves of each token's; None: there is no such top-K."""
    return layer.config.survivors if isinstance(layer, Mixture) else None


def formula(layer: FeedForward, x_TD: Tensor) -> Tensor:
    """Equation 5 for the dense block, 6 and 7, 8, equation 12 over all experts for mixtures, else the reference."""
    if not has_formula(layer):
        return layer.reference(x_TD)
    if isinstance(layer, PKM):
        return _pkm_formula(layer, x_TD)
    act = ACTIVATIONS[layer.config.activation]
    if isinstance(layer, TopK):
        u_TF = act(pair_scores(layer, x_TD))
        return (u_TF * _best(_ranks(layer, x_TD), layer.config.k)) @ layer.values + layer.bias
    if isinstance(layer, Mixture):
        alpha_TF, selected_TF = _units(layer, x_TD)
        survivors = _survivors(layer)
        if survivors is not None:
            alpha_TF = alpha_TF * _best(alpha_TF.detach().masked_fill(~selected_TF, -torch.inf), survivors)
        return alpha_TF @ layer.values_matrix()
    assert isinstance(layer, Dense), "the only other layer with a formula"
    return act(x_TD @ layer.keys.t() + layer.key_bias) @ layer.values + layer.bias


def _units(layer: Mixture, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Score times activation of every pair, `[T, d_ff]`, and which pairs are of selected experts."""
    u_TF = ACTIVATIONS[layer.config.activation](pair_scores(layer, x_TD))
    scores_TF = layer.router.reference(x_TD).repeat_interleave(layer.config.expert_size, dim=1)
    return scores_TF * u_TF, scores_TF != 0


def _pkm_formula(layer: PKM, x_TD: Tensor) -> Tensor:
    """Equation 8 over all pairs of sub-keys."""
    u_THN = pair_scores(layer, x_TD)
    if layer.config.k is None:
        return layer.activate(u_THN.sum(dim=1)) @ layer.values
    best_THN = _best(u_THN.detach(), layer.config.k)
    if layer.config.activation == "softmax":
        return u_THN.masked_fill(best_THN == 0, -torch.inf).softmax(dim=2).sum(dim=1) @ layer.values
    return (layer.activate(u_THN) * best_THN).sum(dim=1) @ layer.values


def _ranks(layer: TopK | PKM, x_TD: Tensor) -> Tensor:
    """What a method that selects pairs ranks them by; no gradient goes through it."""
    with torch.no_grad():
        scores = pair_scores(layer, x_TD)
        if isinstance(layer, PKM):
            return scores
        u_TF = ACTIVATIONS[layer.config.activation](scores)
        return u_TF * layer.values.norm(dim=1) if layer.config.use_norm else u_TF


def _best(ranks: Tensor, k: int) -> Tensor:
    """1 at the K largest of the last dimension, 0 elsewhere."""
    return torch.zeros_like(ranks).scatter(-1, ranks.topk(k).indices, 1.0)


def compared_tokens(layer: FeedForward, n_tokens: int) -> Tensor:
    """Indices of the tokens to compare: all if the truth takes seconds, else evenly spaced ones with the first and the last."""
    # Products of every head are over all pairs.
    n_heads = layer.config.n_heads if isinstance(layer, PKM) else 1
    each = 3 * 4 * layer.config.d_model * layer.config.n_channels * n_heads
    most = max(1, int(_MOST_FLOPS / each)) if has_formula(layer) else _REFERENCE_TOKENS
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
    """Tokens whose last selected unit and first that is not stand too close."""
    if isinstance(layer, Mixture):
        logits_TE = x_TD @ layer.router.selector.detach().t()
        unclear_T = _stand_close(logits_TE, layer.config.n_selected, _CLEAR_GAP)
        survivors = _survivors(layer)
        if survivors is None:
            return unclear_T
        with torch.no_grad():
            alpha_TF, selected_TF = _units(layer, x_TD)
        return unclear_T | _stand_close(alpha_TF[selected_TF].view(len(x_TD), -1), survivors, _CLEAR_PAIR_GAP)
    if isinstance(layer, TopK | PKM) and layer.config.k is not None:
        return _stand_close(_ranks(layer, x_TD), layer.config.k, _CLEAR_PAIR_GAP)
    return torch.zeros(len(x_TD), dtype=torch.bool, device=x_TD.device)


def _stand_close(ranks: Tensor, k: int, gap: float) -> Tensor:
    """Tokens whose K-th largest rank and the next one differ by no more than a share of the ranks' spread."""
    if k == ranks.shape[-1]:
        return torch.zeros(len(ranks), dtype=torch.bool, device=ranks.device)
    ranks = ranks.sort(dim=-1, descending=True).values
    last, next_one, spread = ranks[..., k - 1], ranks[..., k], ranks[..., 0] - ranks[..., -1]
    # ReLU's zeros are many and alike: none of them adds anything.
    is_zero = (last == 0) & (next_one == 0)
    return ((last - next_one <= gap * spread) & ~is_zero).view(len(ranks), -1).any(dim=1)


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
