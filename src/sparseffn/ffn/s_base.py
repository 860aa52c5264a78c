"""S-BASE (Clark 2022, arXiv 2202.01169): top-K of Sinkhorn-balanced scores in training, of the raw ones in evaluation.

    training: E_x = argtopk(sinkhorn(W3 x), K) over the whole batch, not differentiated; evaluation: argtopk(W3 x, K)
    s = sigmoid(W3 x),  y = sum_{e in E_x} s[e] W2^e act(W1^e x)

`sinkhorn="released"` is the paper's released code, whose signs make it balance hardly at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, final

import torch
from torch import Tensor

from sparseffn import ops
from sparseffn.ffn._config import FFNConfig
from sparseffn.ffn._mixture import Mixture, TopKMixtureConfig, best_experts, scatter_scores
from sparseffn.ffn._options import option
from sparseffn.ffn._registry import register
from sparseffn.ffn._routers import Router, Routing, drop, select_topk
from sparseffn.ffn.base import BATCH_ROUTING


@register
@dataclass(frozen=True, kw_only=True, slots=True)
class SBASEConfig(TopKMixtureConfig):
    """S-BASE: top-K of Sinkhorn-balanced scores in training, sigmoid weights, entropy balancing."""

    name: ClassVar[str] = "s-base"
    paper: ClassVar[str] = "Clark 2022, arXiv 2202.01169"
    takes: ClassVar[tuple[str, ...]] = (*TopKMixtureConfig.takes, "entropy_weight")
    xfail: ClassVar[dict[str, str]] = {"training_independence": BATCH_ROUTING}

    entropy_weight: Annotated[float, option("Weight of the entropy balancing loss (gamma), eq. 21.", low=0.0)] = 1e-3
    sinkhorn: Annotated[
        Literal["correct", "released"], option("The iteration as published, or with the released code's signs.")
    ] = "correct"

    def build(self) -> SBASE:
        """The layer."""
        return SBASE(self)

    @classmethod
    def identity_example(cls) -> SBASEConfig:
        """Every expert, gates 1."""
        return cls(d_model=8, n_experts=4, expert_size=3, k=4)

    @classmethod
    def examples(cls) -> list[FFNConfig]:
        """Tiny configs."""
        return [
            cls(d_model=8, n_experts=5, expert_size=4, k=2, n_layers=2),
            cls(d_model=6, n_experts=4, expert_size=3, k=3, sinkhorn="released", expert_dropout=0.25, activation="silu"),
        ]


@final
class SinkhornRouter(Router):
    """Sigmoid scores; in training the selection sees balanced logits."""

    gate: ClassVar[ops.GateName | None] = "sigmoid"

    def __init__(self, config: SBASEConfig) -> None:
        super().__init__(config.d_model, config.n_experts, config.expert_dropout)
        self.k, self.released = config.k, config.sinkhorn == "released"

    def select(self, logits_TE: Tensor, x_TD: Tensor, keep_TE: Tensor | None, mask_T: Tensor | None) -> Routing:
        """Balanced selection in training; the weights are of the raw logits always."""
        ranked_TE = logits_TE.detach()
        if self.training:
            ranked_TE = ops.sinkhorn(ranked_TE, mask_T, released=self.released)
        indices_TK, alive_TK = select_topk(ranked_TE, self.k, keep_TE)
        return Routing(logits_TE, indices_TK, drop(ops.select_columns(logits_TE, indices_TK).sigmoid(), alive_TK))


@final
class SBASE(Mixture):
    """`router.selector [E, d_model]`, `experts.keys [E, d_model, G]`, `experts.values [E, G, d_model]`."""

    config: SBASEConfig

    def __init__(self, config: SBASEConfig) -> None:
        super().__init__(config, SinkhornRouter(config))

    def scores_reference(self, x_TD: Tensor) -> Tensor:
        """Sinkhorn by its reference in training, then top-K and sigmoid, token by token."""
        keep_TE = self.router.draw_keep(x_TD)
        logits_TE = ops.router_logits(x_TD, self.router.selector)
        ranked_TE = logits_TE.detach()
        if self.training:
            ranked_TE = ops.sinkhorn(ranked_TE, released=self.config.sinkhorn == "released", backend="reference")
        rows = []
        for t, (logits, ranked) in enumerate(zip(logits_TE, ranked_TE, strict=True)):
            chosen = best_experts(ranked, self.config.k, None if keep_TE is None else keep_TE[t])
            rows.append(scatter_scores(len(logits), chosen, torch.sigmoid(logits[chosen])))
        return torch.stack(rows) if rows else logits_TE
