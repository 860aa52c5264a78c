r"""Switch Transformer's mixture (Fedus 2022, arXiv 2101.03961), equations 15-17 of arXiv 2310.10837.

$$ s = \mathrm{softmax}(W_3 x), \quad \mathcal{E}_x = \mathrm{argtopk}(s, 1) $$
$$ y = \sum_{e \in \mathcal{E}_x} s[e] \, W_2^e \, \mathrm{act}(W_1^e x) $$
$$ L = 0.01 \, N_E \, f \cdot p $$

With `capacity_factor` $\mu$ an expert takes at most $\mu K T / N_E$ tokens in training, in order of their position in the
flattened batch; a token that finds no place gets output 0 and is counted in `RoutingStats.dropped`.

When to use it:
    Where one large expert a token suits the machine: a capacity bounds what an expert takes, and with it the memory and the
    communication of a step.

When not:
    For the best loss at equal parameters and compute: several small experts a token do better in the paper and in our runs.
    With a capacity, what a token gets in training depends on its neighbours in the batch.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Annotated, ClassVar, final

import torch
from torch import Tensor

from sparseffn import ops
from sparseffn.ffn.block_config import BlockShape, FFNConfig
from sparseffn.ffn.feedforward import configured_by
from sparseffn.ffn.methods import register
from sparseffn.ffn.mixture import LOGIT_BYTES, Mixture, TopKMixtureConfig
from sparseffn.ffn.options import option
from sparseffn.ffn.routers import Batch, Routing
from sparseffn.ffn.softmax_moe import SoftmaxRouter


@register
@dataclass(frozen=True, kw_only=True, slots=True)
class SwitchConfig(TopKMixtureConfig):
    """Switch Transformer: the one best expert, softmax score, f . p balancing, optional capacity."""

    name: ClassVar[str] = "switch"
    paper: ClassVar[str] = "Fedus 2022, arXiv 2101.03961"
    gate: ClassVar[ops.GateName] = "softmax"
    trains_as_it_evaluates: ClassVar[bool] = True
    preset_fields: ClassVar[tuple[str, ...]] = (*TopKMixtureConfig.preset_fields, "dropout")
    xfail: ClassVar[dict[str, str]] = {
        "training_independence": "with a capacity factor, places in training go to the tokens that come first in the batch"
    }

    k: Annotated[int, option("Experts a token uses; Switch uses 1.", low=1)] = 1
    switch_weight: Annotated[float, option("Weight of Switch's balancing loss, eq. 17.", low=0.0)] = 0.01
    capacity_factor: Annotated[
        float | None, option("Places an expert has in training, in units of K T / N_E; none: no limit.", low=0.0)
    ] = None

    def build(self) -> Switch:
        return Switch(self)

    def _router_bytes(self) -> int:
        """Also the whole softmax; with a capacity a mask of the selections that found no place, and their gates once more."""
        places = 0 if self.capacity_factor is None else self.k * (1 + LOGIT_BYTES)
        return TopKMixtureConfig._router_bytes(self) + self.n_experts * LOGIT_BYTES + places

    @classmethod
    def from_shape(cls, shape: BlockShape) -> SwitchConfig:
        return super(SwitchConfig, cls).from_shape(shape.with_one_expert())

    @classmethod
    def identity_example(cls) -> SwitchConfig:
        return cls(d_model=8, n_experts=1, expert_size=12)

    @classmethod
    def examples(cls) -> list[FFNConfig]:
        return [
            cls(d_model=8, n_experts=5, expert_size=8, n_layers=2, init="switch", selector_init="free"),
            cls(d_model=6, n_experts=3, expert_size=6, dropout=0.25, activation="relu2", gated=True),
            cls(d_model=6, n_experts=3, expert_size=4, k=2, capacity_factor=0.75),
        ]


@final
class CapacityRouter(SoftmaxRouter):
    """Softmax routing with a limit on how many tokens an expert takes in training."""

    def __init__(self, config: SwitchConfig, capacity_factor: float) -> None:
        super().__init__(config)
        self.capacity_factor = capacity_factor

    def forward(self, x_TD: Tensor, mask_T: Tensor | None, length: int | None = None) -> Routing:
        """Select as without a limit, then take away what finds no place."""
        routing = super().forward(x_TD, mask_T, length)
        if not self.training:
            return routing
        lost_TK = ops.over_capacity(
            routing.indices_TK,
            routing.weights_TK,
            n_experts=self.selector.shape[0],
            factor=self.capacity_factor,
            mask=mask_T,
            group=self.training_group,
        )
        return routing._replace(weights_TK=routing.weights_TK.masked_fill(lost_TK, 0.0), dropped=lost_TK.sum())

    def scores_reference(self, logits_TE: Tensor, batch: Batch) -> Tensor:
        """Softmax over all experts, the K best, and in training places handed out one by one."""
        scores_TE = super().scores_reference(logits_TE, batch)
        if not self.training:
            return scores_TE
        capacity = self.capacity_factor * self.k * scores_TE.shape[0] / scores_TE.shape[1]
        taken: Counter[int] = Counter()
        placed_TE = torch.zeros_like(scores_TE)
        for t, row in enumerate(scores_TE):
            for e in torch.nonzero(row).flatten().tolist():
                taken[e] += 1
                placed_TE[t, e] = float(taken[e] <= capacity)
        return scores_TE * placed_TE


@final
class Switch(Mixture):
    """A mixture with a `SoftmaxRouter`, or with a capacity a `CapacityRouter`; parameters as in `Mixture`."""

    config: SwitchConfig

    @configured_by(SwitchConfig)
    def __init__(self, config: SwitchConfig) -> None:
        factor = config.capacity_factor
        super().__init__(config, SoftmaxRouter(config) if factor is None else CapacityRouter(config, factor))
