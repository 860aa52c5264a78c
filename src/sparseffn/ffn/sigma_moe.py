r"""sigma-MoE, section 5 of arXiv 2310.10837: sigmoid scores without competition, top-K, entropy balancing, expert dropout.

$$ s = \sigma(W_3 x), \quad \mathcal{E}_x = \mathrm{argtopk}(s, K) $$
$$ y = \sum_{e \in \mathcal{E}_x} s[e] \, W_2^e \, \mathrm{act}(W_1^e x) $$

`inner_k` goes one step further than the paper: of the K G coefficients $s[e] \, u^e[g]$ of a token only the largest take part,
which is the framework's own rule, applied inside the selected experts.

When to use it:
    As the first mixture to try: it is the one that the paper finds as good as the dense block of equal parameters, at K / N_E
    of its compute. Several small experts a token (K = 4, G = 128) rather than one large one.

When not:
    Where every expert must take equally many tokens, as with one device an expert: the entropy loss balances the mean load, and
    nothing bounds it. Take `base`, `s-base` or `switch` with a capacity factor there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, final

from sparseffn import ops
from sparseffn.ffn.block_config import INDEX_BYTES, FFNConfig, require
from sparseffn.ffn.feedforward import configured_by
from sparseffn.ffn.methods import register
from sparseffn.ffn.mixture import Mixture, TopKMixtureConfig
from sparseffn.ffn.options import option
from sparseffn.ffn.routers import TopKRouter, sigmoid_scores

POSITION_BYTES = 4


@register
@dataclass(frozen=True, kw_only=True, slots=True)
class SigmaMoEConfig(TopKMixtureConfig):
    """Mixture of experts with sigmoid scores, shared initialisation, entropy balancing and expert dropout."""

    name: ClassVar[str] = "sigma-moe"
    paper: ClassVar[str] = "Csordás 2023, arXiv 2310.10837"
    gate: ClassVar[ops.GateName] = "sigmoid"
    trains_as_it_evaluates: ClassVar[bool] = True
    preset_fields: ClassVar[tuple[str, ...]] = (*TopKMixtureConfig.preset_fields, "expert_dropout", "entropy_weight")

    entropy_weight: Annotated[float, option("Weight of the entropy balancing loss (gamma), eq. 21.", low=0.0)] = 1e-3
    inner_k: Annotated[int | None, option("Units that survive among the selected experts' K G; none: all of them.", low=1)] = (
        None
    )

    def validate(self) -> None:
        TopKMixtureConfig.validate(self)
        if self.inner_k is not None:
            most = f"at most k x expert_size = {self.active_channels}"
            require(self.inner_k <= self.active_channels, "inner_k", most, self.inner_k, "lower inner_k")

    @property
    def survivors(self) -> int | None:
        return self.inner_k

    def build(self) -> SigmaMoE:
        return SigmaMoE(self)

    def active_params(self) -> int:
        """Selector, keys and gate keys of K experts, values of the surviving units."""
        survivors = self.active_channels if self.inner_k is None else self.inner_k
        return self._router_params() + ((self.n_products - 1) * self.active_channels + survivors) * self.d_model

    def forward_flops(self, *, training: bool = False) -> int:
        """Two for each active parameter."""
        return 2 * self.active_params()

    def saved_bytes(self, n_tokens: int, itemsize: int = 4) -> int:
        """As any mixture; with inner_k only the survivors' units are kept."""
        if self.inner_k is None:
            return TopKMixtureConfig.saved_bytes(self, n_tokens, itemsize)
        # A survivor is what the activation keeps of it, gated both products, and its position; dropout's mask is of all units.
        survivors = self.inner_k * (self._kept_products * itemsize + POSITION_BYTES)
        dropped = self.active_channels if self.dropout > 0 else 0
        per_token = self.k * INDEX_BYTES + self._router_bytes() + survivors + dropped
        return n_tokens * per_token + self._batch_bytes()

    @classmethod
    def identity_example(cls) -> SigmaMoEConfig:
        return cls(d_model=8, n_experts=4, expert_size=3, k=4)

    @classmethod
    def examples(cls) -> list[FFNConfig]:
        return [
            cls(d_model=8, n_experts=5, expert_size=4, k=2, n_layers=2),
            cls(
                d_model=6, n_experts=4, expert_size=3, k=4, init="standard", selector_init="free", activation="gelu", gated=True
            ),
            cls(
                d_model=8,
                n_experts=4,
                expert_size=4,
                k=3,
                expert_dropout=0.5,
                dropout=0.25,
                entropy_weight=0.0,
                activation="clamped_swiglu",
                gated=True,
            ),
            cls(
                d_model=8,
                n_experts=4,
                expert_size=4,
                k=2,
                inner_k=3,
                dropout=0.25,
                init="switch",
                cv_weight=0.1,
                switch_weight=0.01,
            ),
        ]


@final
class SigmoidRouter(TopKRouter):
    """`s = sigmoid(W3 x)`, the K largest (equations 11 and 22)."""

    in_one_operation = "always"
    score = staticmethod(sigmoid_scores)


@final
class SigmaMoE(Mixture):
    """A mixture with a `SigmoidRouter`; parameters as in `Mixture`."""

    config: SigmaMoEConfig

    @configured_by(SigmaMoEConfig)
    def __init__(self, config: SigmaMoEConfig) -> None:
        super().__init__(config, SigmoidRouter(config))
