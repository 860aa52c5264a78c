r"""BASE layers (Lewis 2021, arXiv 2103.16716), equations 18 and 19 of arXiv 2310.10837.

$$ s = \sigma(W_3 x) $$
$$ y = s[e] \, W_2^e \, \mathrm{act}(W_1^e x) $$

In training the experts $e$ are the assignment of tokens to experts of largest total score with equal loads; in evaluation $e$
is the best expert of each token.

When to use it:
    Where all experts must take equally many tokens in training, exactly and without a balancing loss to tune.

When not:
    Where training and evaluation must route alike, or where steps must be fast: the assignment is solved on the CPU for each
    layer and batch, a token's expert depends on the others in the batch, and evaluation balances nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from sparseffn import ops
from sparseffn.ffn.block_config import BlockShape, FFNConfig
from sparseffn.ffn.feedforward import configured_by
from sparseffn.ffn.methods import register
from sparseffn.ffn.mixture import Mixture, MixtureConfig
from sparseffn.ffn.routers import Batch, Router, Routing, all_if_none, scores_by_token, sigmoid_scores

BATCH_ROUTING = "training assigns tokens to experts over the whole batch; evaluation is independent of it"


@register
@dataclass(frozen=True, kw_only=True, slots=True)
class BASEConfig(MixtureConfig):
    """BASE: one expert a token, in training by balanced linear assignment over the batch."""

    name: ClassVar[str] = "base"
    paper: ClassVar[str] = "Lewis 2021, arXiv 2103.16716"
    gate: ClassVar[ops.GateName] = "sigmoid"
    xfail: ClassVar[dict[str, str]] = {"training_independence": BATCH_ROUTING}

    def build(self) -> BASE:
        return BASE(self)

    @property
    def n_selected(self) -> int:
        return 1

    @classmethod
    def from_shape(cls, shape: BlockShape) -> BASEConfig:
        return super(BASEConfig, cls).from_shape(shape.with_one_expert())

    @property
    def selects_over_batch(self) -> bool:
        return True

    @classmethod
    def identity_example(cls) -> BASEConfig:
        return cls(d_model=8, n_experts=1, expert_size=12)

    @classmethod
    def examples(cls) -> list[FFNConfig]:
        return [
            cls(d_model=8, n_experts=5, expert_size=6, n_layers=2),
            cls(d_model=6, n_experts=3, expert_size=4, dropout=0.25, init="standard", activation="gelu", gated=True),
        ]


def assigned(logits_TE: Tensor, mask_T: Tensor | None) -> Tensor:
    """The expert of each token by balanced assignment, `[T, 1]`; padding takes no place and gets its best expert."""
    if mask_T is None:
        return ops.balanced_assignment(logits_TE)[:, None]
    indices_TK = ops.topk(logits_TE, 1)
    indices_TK[mask_T] = ops.balanced_assignment(logits_TE[mask_T])[:, None]
    return indices_TK


@final
class AssignmentRouter(Router):
    """Sigmoid of the one assigned expert's logit."""

    k = 1
    in_one_operation = "evaluation"

    def select(self, logits_TE: Tensor, batch: Batch) -> Routing:
        """Balanced assignment in training, the best expert in evaluation."""
        indices_TK = self.assign(logits_TE, batch.mask_T) if self.training else ops.topk(logits_TE, 1)
        return Routing(logits_TE, indices_TK, logits_TE.gather(1, indices_TK).sigmoid())

    def assign(self, logits_TE: Tensor, mask_T: Tensor | None) -> Tensor:
        """Balanced assignment of the whole batch, of which other processes may hold a part: each solves it for all."""
        if self.batch_group is not None:
            rows, mask_T = self.batch_group.rows(len(logits_TE), logits_TE.device), all_if_none(mask_T, logits_TE)
            return rows.own(assigned(rows.gather(logits_TE.detach()), rows.gather(mask_T)))
        return assigned(logits_TE, mask_T)

    def scores_reference(self, logits_TE: Tensor, batch: Batch) -> Tensor:
        """Equations 18 and 19; the assignment itself is held against an exact solver in the tests of `ops`."""
        chosen_T = self.assign(logits_TE, None)[:, 0] if self.training else logits_TE.argmax(dim=1)
        ranks_TE = torch.zeros_like(logits_TE).scatter(1, chosen_T[:, None], 1.0)
        return scores_by_token(logits_TE, ranks_TE, batch, 1, sigmoid_scores)


@final
class BASE(Mixture):
    """A mixture with an `AssignmentRouter`; parameters as in `Mixture`."""

    config: BASEConfig

    @configured_by(BASEConfig)
    def __init__(self, config: BASEConfig) -> None:
        super().__init__(config, AssignmentRouter(config.d_model, config.n_experts, gate=config.gate))
