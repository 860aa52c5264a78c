"""Other libraries' mixtures of experts over a layer's own parameters: x in, y out, the very same function.

Hugging Face's experts have three implementations: `eager`, the loop that its models carry, and `batched_mm` and `grouped_mm`
of `transformers.integrations.moe`. Its layout with `is_transposed=True, has_gate=False` is ours, so no weight is copied.
scattermoe (arXiv 2403.08245) runs on CUDA only. The router is written with `torch.topk`, the least that a peer's user needs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseffn.bench.candidates import Candidate, Setting
from sparseffn.ffn import FeedForward, FFNConfig
from sparseffn.ffn.mixture import Mixture, MixtureConfig

HF_IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")

# `batched_mm` copies the matrices of every token's experts; beyond this it is tens of times slower than the others
# (measured at 268 MB: 239 ms against 10 ms, 2 CPU cores, 2026-11), and the copies soon exceed the memory.
MOST_GATHERED_BYTES = 2**30


@final
class PeerMixture(nn.Module):
    """Sigmoid router in plain PyTorch, then a peer's experts: `y = sum over the K best of s[e] W2^e relu(W1^e x)`."""

    def __init__(self, layer: FeedForward, experts: Callable[[Mixture], nn.Module]) -> None:
        super().__init__()
        assert isinstance(layer, Mixture), "peers compute mixtures"
        self.k = layer.config.n_selected
        self.selector = layer.router.selector
        self.experts = experts(layer)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        logits, indices = torch.topk(F.linear(x.to(wide), self.selector.to(wide)), self.k)
        return self.experts(x, indices, logits.sigmoid())


def has_peers(config: FFNConfig) -> bool:
    """Whether `PeerMixture` computes the method in training and evaluation: top-K and a sigmoid gate (sigma-MoE)."""
    return isinstance(config, MixtureConfig) and config.gate == "sigmoid" and config.trains_as_it_evaluates


def peers_of(config: MixtureConfig, setting: Setting) -> tuple[list[Candidate], dict[str, str]]:
    """The peers that can compute this layer here, and by label why others cannot."""
    if config.activation != "relu" or config.survivors is not None:
        return [], {"peers": "they are set up for ReLU experts without inner_k"}
    wraps = {f"hf {name}": _hf_wrap(name) for name in HF_IMPLEMENTATIONS}
    reasons = {f"hf {name}": _hf_reason(name, config, setting) for name in HF_IMPLEMENTATIONS}
    if setting.device.type == "cuda":
        wraps["scattermoe"] = _scattermoe_wrap
        reasons["scattermoe"] = None if _installed("scattermoe") else "scattermoe is not installed"
    absent = {label: reason for label, reason in reasons.items() if reason is not None}
    return [Candidate(label=label, config=config, wrap=wrap) for label, wrap in wraps.items() if label not in absent], absent


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _hf_reason(implementation: str, config: MixtureConfig, setting: Setting) -> str | None:
    """Why an implementation is left out, or None."""
    if not _installed("transformers"):
        return "transformers is not installed; pip install 'sparseffn[hf]'"
    gathered = 2 * setting.n_tokens * config.active_channels * config.d_model * setting.dtype.itemsize
    if implementation == "batched_mm" and gathered > MOST_GATHERED_BYTES:
        return f"at {setting.n_tokens} tokens it would copy {gathered / 2**30:.1f} GiB of expert matrices a call"
    return None


def _hf_wrap(implementation: str) -> Callable[[FeedForward], nn.Module]:
    def wrap(layer: FeedForward) -> nn.Module:
        settings = SimpleNamespace(_experts_implementation=implementation)
        return PeerMixture(layer, lambda mixture: _hf_experts_class()(settings, mixture))

    return wrap


@cache
def _hf_experts_class() -> Callable[[Any, Mixture], nn.Module]:
    """The experts module as a model of transformers would write it; importing takes seconds, hence only when it is used."""
    from transformers.integrations.moe import use_experts_implementation

    class Experts(nn.Module):
        def __init__(self, config: Any, mixture: Mixture) -> None:
            super().__init__()
            self.num_experts = mixture.config.n_experts
            self.up_proj = mixture.experts.keys
            self.down_proj = mixture.experts.values
            self.act_fn = nn.ReLU()

        def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            """The loop of transformers' own models (nemotron_h), in the transposed layout."""
            final = torch.zeros_like(hidden_states, dtype=top_k_weights.dtype)
            with torch.no_grad():
                mask = F.one_hot(top_k_index, num_classes=self.num_experts).permute(2, 1, 0)
                hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero().squeeze(-1)
            for expert in hit.tolist():
                position, token = torch.where(mask[expert])
                hidden = self.act_fn(hidden_states[token] @ self.up_proj[expert]) @ self.down_proj[expert]
                hidden = hidden * top_k_weights[token, position, None]
                final.index_add_(0, token, hidden.to(final.dtype))
            return final.to(hidden_states.dtype)

    return use_experts_implementation(Experts, is_transposed=True, has_gate=False)


def _scattermoe_wrap(layer: FeedForward) -> nn.Module:
    return PeerMixture(layer, _scattermoe_experts)


def _scattermoe_experts(mixture: Mixture) -> nn.Module:
    """scattermoe's MLP; its matrices are `[E, out, in]` parameters, so that ours are seen through a transposition."""
    from scattermoe.mlp import MLP  # pyright: ignore[reportMissingImports]

    c = mixture.config
    experts = MLP(c.d_model, c.expert_size, c.n_experts, c.n_selected, activation=nn.ReLU())
    for name, weight in (("experts", mixture.experts.keys), ("output_experts", mixture.experts.values)):
        product = getattr(experts, name)
        del product.weight
        # A plain view: its gradient reaches the parameter itself.
        product.weight = weight.transpose(1, 2)
    return experts
