"""Mixture of experts with a softmax over all experts, taken before top-K and not renormalised (arXiv 2310.10837, table 10).

    s = softmax(W3 x),  E_x = argtopk(s, K),  y = sum_{e in E_x} s[e] W2^e act(W1^e x)

Expert dropout acts after the softmax.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, final

import torch
from torch import Tensor

from sparseffn import ops
from sparseffn.ffn._config import FFNConfig
from sparseffn.ffn._mixture import LOGIT_BYTES, Mixture, TopKMixtureConfig, best_experts, scatter_scores
from sparseffn.ffn._options import option
from sparseffn.ffn._registry import register
from sparseffn.ffn._routers import Router, Routing, drop, select_topk


@register
@dataclass(frozen=True, kw_only=True, slots=True)
class SoftmaxMoEConfig(TopKMixtureConfig):
    """Mixture of experts with a softmax over all experts before top-K."""

    name: ClassVar[str] = "softmax-moe"
    paper: ClassVar[str] = "arXiv 2310.10837, table 10"
    takes: ClassVar[tuple[str, ...]] = (*TopKMixtureConfig.takes, "expert_dropout", "entropy_weight")

    entropy_weight: Annotated[float, option("Weight of the entropy balancing loss (gamma), eq. 21.", low=0.0)] = 1e-3

    def build(self) -> SoftmaxMoE:
        """The layer."""
        return SoftmaxMoE(self)

    def _router_bytes(self, itemsize: int) -> int:
        """Also the logits and the logarithm of their softmax's denominator."""
        return TopKMixtureConfig._router_bytes(self, itemsize) + (self.n_experts + 1) * LOGIT_BYTES

    @classmethod
    def identity_example(cls) -> SoftmaxMoEConfig:
        """Every expert, gates 1."""
        return cls(d_model=8, n_experts=1, expert_size=12, k=1)

    @classmethod
    def examples(cls) -> list[FFNConfig]:
        """Tiny configs."""
        return [
            cls(d_model=8, n_experts=5, expert_size=4, k=2, n_layers=2),
            cls(d_model=6, n_experts=4, expert_size=3, k=3, expert_dropout=0.5, activation="silu", selector_init="free"),
        ]


@final
class SoftmaxRouter(Router):
    """`s = softmax(W3 x)` over all experts, the K largest, not renormalised."""

    gate: ClassVar[ops.GateName | None] = "softmax"

    def __init__(self, config: TopKMixtureConfig) -> None:
        super().__init__(config.d_model, config.n_experts, config.expert_dropout)
        self.k = config.k

    def select(self, logits_TE: Tensor, x_TD: Tensor, keep_TE: Tensor | None, mask_T: Tensor | None) -> Routing:
        """Top-K of the logits, which softmax does not reorder; dropped experts keep their share of the softmax."""
        indices_TK, alive_TK = select_topk(logits_TE, self.k, keep_TE)
        # The selected entries of the softmax, without keeping all of it for backward.
        weights_TK = (ops.select_columns(logits_TE, indices_TK) - logits_TE.logsumexp(dim=1, keepdim=True)).exp()
        return Routing(logits_TE, indices_TK, drop(weights_TK, alive_TK))


@final
class SoftmaxMoE(Mixture):
    """`router.selector [E, d_model]`, `experts.keys [E, d_model, G]`, `experts.values [E, G, d_model]`."""

    config: SoftmaxMoEConfig

    def __init__(self, config: SoftmaxMoEConfig) -> None:
        super().__init__(config, SoftmaxRouter(config))

    def scores_reference(self, x_TD: Tensor) -> Tensor:
        """Softmax over all experts, then top-K, token by token."""
        return softmax_scores_reference(self, x_TD, self.config.k)


def softmax_scores_reference(layer: Mixture, x_TD: Tensor, k: int) -> Tensor:
    """s `[T, E]` of a softmax over all experts with the K best kept."""
    keep_TE = layer.router.draw_keep(x_TD)
    logits_TE = ops.router_logits(x_TD, layer.router.selector)
    rows = []
    for t, logits in enumerate(logits_TE):
        chosen = best_experts(logits, k, None if keep_TE is None else keep_TE[t])
        rows.append(scatter_scores(len(logits), chosen, logits.softmax(dim=0)[chosen]))
    return torch.stack(rows) if rows else logits_TE
