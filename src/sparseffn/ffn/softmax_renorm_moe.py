"""Mixture of experts with a softmax over the K selected logits, "after top-k" (arXiv 2310.10837, equations 23-25).

    E_x = argtopk(W3 x, K),  s = softmax(W3 x restricted to E_x),  y = sum_{e in E_x} s[e] W2^e act(W1^e x)

The released code takes the entropy term over the K slots instead of the N_E experts, which balances nothing; that form is
`slot_entropy_weight`. For K = 1 the gate is the constant 1 and the selector learns nothing, so K >= 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, final

import torch
from torch import Tensor

from sparseffn import ops
from sparseffn.ffn._config import FFNConfig, require
from sparseffn.ffn._mixture import Mixture, TopKMixtureConfig, best_experts, scatter_scores
from sparseffn.ffn._options import option
from sparseffn.ffn._registry import register
from sparseffn.ffn._routers import Router, Routing, renormalise, select_topk

REFUSES_ONE = "at least 2, as a gate renormalised over one expert is the constant 1 and its selector never learns"


@register
@dataclass(frozen=True, kw_only=True, slots=True)
class SoftmaxRenormMoEConfig(TopKMixtureConfig):
    """Mixture of experts with a softmax over the K selected logits."""

    name: ClassVar[str] = "softmax-renorm-moe"
    paper: ClassVar[str] = "arXiv 2310.10837, table 10"
    takes: ClassVar[tuple[str, ...]] = (*TopKMixtureConfig.takes, "expert_dropout", "entropy_weight")

    entropy_weight: Annotated[float, option("Weight of the entropy balancing loss (gamma), eq. 21.", low=0.0)] = 1e-3
    slot_entropy_weight: Annotated[
        float, option("Weight of the released form of that loss, over the K slots; it balances nothing.", low=0.0)
    ] = 0.0

    def validate(self) -> None:
        """K experts must exist, and more than one."""
        TopKMixtureConfig.validate(self)
        require(self.k >= 2, "k", REFUSES_ONE, self.k, "raise k or use sigma-moe or softmax-moe")

    def build(self) -> SoftmaxRenormMoE:
        """The layer."""
        return SoftmaxRenormMoE(self)

    def balancing(self) -> dict[str, float]:
        """The shared losses and the released one."""
        return {**TopKMixtureConfig.balancing(self), "slot_entropy": self.slot_entropy_weight}

    @classmethod
    def examples(cls) -> list[FFNConfig]:
        """Tiny configs."""
        return [
            cls(d_model=8, n_experts=5, expert_size=4, k=2, n_layers=2),
            cls(d_model=6, n_experts=4, expert_size=3, k=3, expert_dropout=0.5, slot_entropy_weight=0.01),
        ]


@final
class RenormRouter(Router):
    """The K largest logits, and a softmax over them."""

    gate: ClassVar[ops.GateName | None] = "renormalised"
    trains_as_it_evaluates: ClassVar[bool] = True

    def __init__(self, config: SoftmaxRenormMoEConfig) -> None:
        super().__init__(config.d_model, config.n_experts, config.expert_dropout)
        self.k = config.k

    def select(self, logits_TE: Tensor, x_TD: Tensor, keep_TE: Tensor | None, mask_T: Tensor | None) -> Routing:
        """Dropped experts are masked before the softmax."""
        indices_TK, alive_TK = select_topk(logits_TE, self.k, keep_TE)
        return Routing(logits_TE, indices_TK, renormalise(ops.select_columns(logits_TE, indices_TK), alive_TK))


@final
class SoftmaxRenormMoE(Mixture):
    """`router.selector [E, d_model]`, `experts.keys [E, d_model, G]`, `experts.values [E, G, d_model]`."""

    config: SoftmaxRenormMoEConfig

    def __init__(self, config: SoftmaxRenormMoEConfig) -> None:
        super().__init__(config, RenormRouter(config))

    def scores_reference(self, x_TD: Tensor) -> Tensor:
        """`normtopk(softmax(h))` (equations 23-25), token by token."""
        return renorm_scores_reference(
            ops.router_logits(x_TD, self.router.selector), self.config.k, self.router.draw_keep(x_TD)
        )


def renorm_scores_reference(logits_TE: Tensor, k: int, keep_TE: Tensor | None) -> Tensor:
    """s `[T, E]`: softmax, zero outside the K best, divided by the sum."""
    rows = []
    for t, logits in enumerate(logits_TE):
        chosen = best_experts(logits, k, None if keep_TE is None else keep_TE[t])
        s = logits.softmax(dim=0)[chosen]
        rows.append(scatter_scores(len(logits), chosen, s / s.sum()))
    return torch.stack(rows) if rows else logits_TE
