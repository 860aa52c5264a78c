r"""Mixture of experts with a softmax over all experts, taken before top-K and not renormalised (arXiv 2310.10837, table 10).

$$ s = \mathrm{softmax}(W_3 x), \quad \mathcal{E}_x = \mathrm{argtopk}(s, K) $$
$$ y = \sum_{e \in \mathcal{E}_x} s[e] \, W_2^e \, \mathrm{act}(W_1^e x) $$

Expert dropout acts after the softmax.

When to use it:
    To measure what competition between experts costs: it differs from `sigma-moe` in the scores alone. To load or continue
    models whose routers are of this form.

When not:
    For a new model: the scores of the K selected experts shrink as the number of experts grows, and with them the output.
    `sigma-moe` does without.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, final

from sparseffn import ops
from sparseffn.ffn.block_config import FFNConfig
from sparseffn.ffn.feedforward import configured_by
from sparseffn.ffn.methods import register
from sparseffn.ffn.mixture import LOGIT_BYTES, Mixture, TopKMixtureConfig
from sparseffn.ffn.options import option
from sparseffn.ffn.routers import TopKRouter, softmax_scores


@register
@dataclass(frozen=True, kw_only=True, slots=True)
class SoftmaxMoEConfig(TopKMixtureConfig):
    """Mixture of experts with a softmax over all experts before top-K."""

    name: ClassVar[str] = "softmax-moe"
    paper: ClassVar[str] = "arXiv 2310.10837, table 10"
    gate: ClassVar[ops.GateName] = "softmax"
    trains_as_it_evaluates: ClassVar[bool] = True
    preset_fields: ClassVar[tuple[str, ...]] = (*TopKMixtureConfig.preset_fields, "expert_dropout", "entropy_weight")

    entropy_weight: Annotated[float, option("Weight of the entropy balancing loss (gamma), eq. 21.", low=0.0)] = 1e-3

    def build(self) -> SoftmaxMoE:
        return SoftmaxMoE(self)

    def _router_bytes(self) -> int:
        """Also the whole softmax."""
        return TopKMixtureConfig._router_bytes(self) + self.n_experts * LOGIT_BYTES

    @classmethod
    def identity_example(cls) -> SoftmaxMoEConfig:
        return cls(d_model=8, n_experts=1, expert_size=12, k=1)

    @classmethod
    def examples(cls) -> list[FFNConfig]:
        return [
            cls(d_model=8, n_experts=5, expert_size=4, k=2, n_layers=2),
            cls(
                d_model=6,
                n_experts=4,
                expert_size=3,
                k=3,
                expert_dropout=0.5,
                activation="silu",
                selector_init="free",
                gated=True,
            ),
        ]


class SoftmaxRouter(TopKRouter):
    """`s = softmax(W3 x)` over all experts, dropped ones among them; the K largest, not renormalised."""

    in_one_operation = "always"
    score = staticmethod(softmax_scores)


@final
class SoftmaxMoE(Mixture):
    """A mixture with a `SoftmaxRouter`; parameters as in `Mixture`."""

    config: SoftmaxMoEConfig

    @configured_by(SoftmaxMoEConfig)
    def __init__(self, config: SoftmaxMoEConfig) -> None:
        super().__init__(config, SoftmaxRouter(config))
