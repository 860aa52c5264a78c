r"""A mixture of experts of your own in one file: scores by ReLU, so that a token uses K experts at most, and fewer if it can.

$$ s = \mathrm{ReLU}(W_3 x), \quad \mathcal{E}_x = \mathrm{argtopk}(s, K) $$
$$ y = \sum_{e \in \mathcal{E}_x} s[e] \, W_2^e \, \mathrm{act}(W_1^e x) $$

When to use it:
    To see how many experts a token asks for by itself (after ReMoE, arXiv 2412.14711, which has no K).
"""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from sparseffn.contract import check_method
from sparseffn.ffn import FFNConfig, configured_by, register
from sparseffn.ffn.mixture import Mixture, TopKMixtureConfig
from sparseffn.ffn.routers import Batch, Routing, TopKRouter, drop, select_topk


@register
@dataclass(frozen=True, kw_only=True, slots=True)
class ReLUMoEConfig(TopKMixtureConfig):
    """Mixture of experts with ReLU scores."""

    name: ClassVar[str] = "relu-moe"
    paper: ClassVar[str] = "after Wang 2024, arXiv 2412.14711"

    def build(self) -> "ReLUMoE":
        return ReLUMoE(self)

    @classmethod
    def examples(cls) -> list[FFNConfig]:
        plain = cls(d_model=8, n_experts=5, expert_size=4, k=2, n_layers=2, entropy_weight=0.01)
        return [plain, cls(d_model=6, n_experts=4, expert_size=3, k=3, expert_dropout=0.5, gated=True, activation="silu")]


@final
class ReLURouter(TopKRouter):
    @staticmethod
    def score(logits: Tensor, chosen: list[int]) -> Tensor:
        """Of one token's chosen experts: what the slow reference computes."""
        return torch.relu(logits[chosen])

    def select(self, logits_TE: Tensor, batch: Batch) -> Routing:
        indices_TK, alive_TK = select_topk(logits_TE, self.k, batch.keep_TE)
        return Routing(logits_TE, indices_TK, drop(torch.relu(logits_TE.gather(1, indices_TK)), alive_TK))


@final
class ReLUMoE(Mixture):
    @configured_by(ReLUMoEConfig)
    def __init__(self, config: ReLUMoEConfig) -> None:
        super().__init__(config, ReLURouter(config))


if __name__ == "__main__":
    print("holds:", *check_method("relu-moe"))
