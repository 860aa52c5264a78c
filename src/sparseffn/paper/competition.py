"""What a model's selectors do at one moment of training: load, row norms, and whose gradient moves whose logit.

The gradient of a logit has a part of the expert's own, `c_j ds_j/dl_j` with `c_j = d loss / d s_j`, and a part of the others,
`sum_{i != j} c_i ds_i/dl_j`: none for a sigmoid, the denominator's for a softmax. The share of the latter in the sum of both
squares is the interference between experts.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sparseffn.analysis.usage import UsageCounter
from sparseffn.data import ContiguousStreams
from sparseffn.devices import to_device
from sparseffn.errors import UserError
from sparseffn.evaluation import evaluate, token_losses
from sparseffn.ffn.mixture import Mixture
from sparseffn.ffn.routers import Routing
from sparseffn.models import TransformerXL
from sparseffn.ops import GateName
from sparseffn.results.study_result import SelectorProbe


def probe(model: TransformerXL, tokens: np.ndarray, *, batch: int, context: int) -> SelectorProbe:
    """Look at a model whose feedforward blocks are mixtures.

    Args:
        model: nothing of it changes, gradients included.
        tokens: of a held-out text; all count for the load, the first `batch x context` for gradients.
        batch: streams that the tokens are cut into.
        context: tokens of a window.

    Raises:
        UserError: a block is not a mixture, or the tokens do not fill a window.
    """
    layers = [layer for _, layer in model.ffn_layers()]
    mixtures = [layer for layer in layers if isinstance(layer, Mixture)]
    if len(mixtures) < len(layers):
        raise UserError("`model` must have mixtures for feedforward blocks; got others; fix: probe a mixture of experts")
    usage = UsageCounter()
    evaluate(model, tokens, batch=batch, context=context, memory=context, observe=usage.observe)
    loads = [layer.load(number) for number, layer in enumerate(usage.layers.values())]
    routings, gradients = _routings(model, mixtures, tokens, batch, context)
    norms = [layer.router.selector.detach().norm(dim=1) for layer in mixtures]
    shares = []
    for routing, grad_TK, layer in zip(routings, gradients, mixtures, strict=True):
        assert layer.config.gate is not None, "studies probe methods whose weights follow from the logits alone"
        shares.append(gradient_parts(routing, grad_TK, layer.config.gate))
    return SelectorProbe(
        load_entropy=_mean([load.entropy for load in loads]),
        dead=_mean([load.n_dead / load.n_units for load in loads]),
        largest_over_mean=_mean([load.largest_over_mean for load in loads]),
        norm=_mean([float(n.mean()) for n in norms]),
        norm_spread=_mean([float(n.std(correction=0) / n.mean()) for n in norms]),
        gate_square=_mean([float(r.weights_TK.detach().square().mean()) for r in routings]),
        interference=_mean([cross / max(own + cross, 1e-300) for own, cross in shares]),
    )


def gradient_parts(routing: Routing, grad_TK: Tensor, gate: GateName) -> tuple[float, float]:
    """Sums of squares of the logits' gradients by the expert's own contribution, and by those of others.

    Args:
        routing: a router's decision.
        grad_TK: gradient of the loss with respect to its weights.
        gate: how weights follow from logits.
    """
    own_TE, cross_TE = split_gradient(routing, grad_TK, gate)
    return float(own_TE.double().square().sum()), float(cross_TE.double().square().sum())


def split_gradient(routing: Routing, grad_TK: Tensor, gate: GateName) -> tuple[Tensor, Tensor]:
    """The two parts, `[T, E]` each; their sum is the gradient of the logits."""
    logits_TE, indices_TK = routing.logits_TE.detach(), routing.indices_TK
    s_TK, c_TK = routing.weights_TK.detach(), grad_TK
    own_TE = torch.zeros_like(logits_TE).scatter(1, indices_TK, c_TK * s_TK * (1 - s_TK))
    if gate == "sigmoid":
        return own_TE, torch.zeros_like(own_TE)
    # Scores of all experts: after top-k those not selected have none, hence no gradient.
    chosen_TE = torch.zeros_like(logits_TE).scatter(1, indices_TK, s_TK)
    s_TE = logits_TE.softmax(dim=1) if gate == "softmax" else chosen_TE
    paid_TE = torch.zeros_like(logits_TE).scatter(1, indices_TK, c_TK * s_TK)
    return own_TE, -s_TE * (paid_TE.sum(dim=1, keepdim=True) - paid_TE)


def _routings(
    model: TransformerXL, mixtures: list[Mixture], tokens: np.ndarray, batch: int, context: int
) -> tuple[list[Routing], tuple[Tensor, ...]]:
    """Routing of one window in every layer, and the gradient of the mean cross-entropy with respect to its weights."""
    device = next(model.parameters()).device
    inputs, targets = (to_device(t, device) for t in ContiguousStreams(tokens, batch=batch, context=context).window(0))
    found: list[Routing] = []

    def keep(module: torch.nn.Module, args: object, output: Routing) -> None:
        found.append(output)

    hooks = [layer.router.register_forward_hook(keep) for layer in mixtures]
    was_training = model.training
    model.eval()
    try:
        loss = token_losses(model(inputs).logits, targets).mean()
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return found, torch.autograd.grad(loss, [routing.weights_TK for routing in found])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
