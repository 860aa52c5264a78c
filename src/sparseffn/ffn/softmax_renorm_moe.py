r"""Mixture of experts with a softmax over the K selected logits, "after top-k" (arXiv 2310.10837, equations 23-25).

$$ \mathcal{E}_x = \mathrm{argtopk}(W_3 x, K) $$
$$ s = \mathrm{softmax}(W_3 x \text{ restricted to } \mathcal{E}_x) $$
$$ y = \sum_{e \in \mathcal{E}_x} s[e] \, W_2^e \, \mathrm{act}(W_1^e x) $$

The released code takes the entropy term over the K slots instead of the N_E experts, which balances nothing; that form is
`slot_entropy_weight`. For K = 1 the gate is the constant 1 and the selector learns nothing, so K >= 2.

When to use it:
    To compute what most published mixtures compute (Mixtral and its kin route this way), or where the gates of a token must add
    up to 1.

When not:
    With K = 1, which is refused. With many experts look at their load (`sparseffn analyze`): the paper sees this router
    collapse onto few of them, which our small runs do not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, final

from sparseffn import ops
from sparseffn.ffn.block_config import FFNConfig, require
from sparseffn.ffn.feedforward import configured_by
from sparseffn.ffn.methods import register
from sparseffn.ffn.mixture import Mixture, TopKMixtureConfig
from sparseffn.ffn.options import option
from sparseffn.ffn.routers import TopKRouter, renormalised_scores

REFUSES_ONE = "at least 2, as a gate renormalised over one expert is the constant 1 and its selector never learns"


@register
@dataclass(frozen=True, kw_only=True, slots=True)
class SoftmaxRenormMoEConfig(TopKMixtureConfig):
    """Mixture of experts with a softmax over the K selected logits."""

    name: ClassVar[str] = "softmax-renorm-moe"
    paper: ClassVar[str] = "arXiv 2310.10837, table 10"
    gate: ClassVar[ops.GateName] = "renormalised"
    trains_as_it_evaluates: ClassVar[bool] = True
    preset_fields: ClassVar[tuple[str, ...]] = (*TopKMixtureConfig.preset_fields, "expert_dropout", "entropy_weight")

    entropy_weight: Annotated[float, option("Weight of the entropy balancing loss (gamma), eq. 21.", low=0.0)] = 1e-3
    slot_entropy_weight: Annotated[
        float, option("Weight of the released form of that loss, over the K slots; it balances nothing.", low=0.0)
    ] = 0.0

    def validate(self) -> None:
        TopKMixtureConfig.validate(self)
        require(self.k >= 2, "k", REFUSES_ONE, self.k, "raise k or use sigma-moe or softmax-moe")

    def build(self) -> SoftmaxRenormMoE:
        return SoftmaxRenormMoE(self)

    def balancing(self) -> dict[str, float]:
        return {**TopKMixtureConfig.balancing(self), "slot_entropy": self.slot_entropy_weight}

    @classmethod
    def examples(cls) -> list[FFNConfig]:
        return [
            cls(d_model=8, n_experts=5, expert_size=4, k=2, n_layers=2),
            cls(d_model=6, n_experts=4, expert_size=3, k=3, expert_dropout=0.5, slot_entropy_weight=0.01, gated=True),
        ]


@final
class RenormRouter(TopKRouter):
    """The K largest logits, and a softmax over them without dropped ones: `normtopk(softmax(h))` (equations 23-25)."""

    in_one_operation = "always"
    score = staticmethod(renormalised_scores)


@final
class SoftmaxRenormMoE(Mixture):
    """A mixture with a `RenormRouter`; parameters as in `Mixture`."""

    config: SoftmaxRenormMoEConfig

    @configured_by(SoftmaxRenormMoEConfig)
    def __init__(self, config: SoftmaxRenormMoEConfig) -> None:
        super().__init__(config, RenormRouter(config))
