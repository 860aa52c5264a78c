r"""S-BASE (Clark 2022, arXiv 2202.01169): top-K of Sinkhorn-balanced scores in training, of the raw ones in evaluation.

$$ \mathcal{E}_x = \mathrm{argtopk}(\mathrm{sinkhorn}(W_3 x), K) \text{ in training} $$
$$ \mathcal{E}_x = \mathrm{argtopk}(W_3 x, K) \text{ in evaluation} $$
$$ s = \sigma(W_3 x) $$
$$ y = \sum_{e \in \mathcal{E}_x} s[e] \, W_2^e \, \mathrm{act}(W_1^e x) $$

Sinkhorn runs over the whole batch and is not differentiated. `sinkhorn="released"` is the paper's released code: its signs make
it balance hardly at all, and it looks at each sequence of `(batch, length, d_model)` by itself; tokens in a matrix are one
sequence.

When to use it:
    Where loads in training must be nearly even without a balancing loss, with several experts a token, and without solving an
    assignment.

When not:
    Where what a token gets must not depend on its batch, or where evaluation must be as even as training: the balance is gone
    there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, final

from torch import Tensor

from sparseffn import ops
from sparseffn.ffn.base import BATCH_ROUTING
from sparseffn.ffn.block_config import FFNConfig
from sparseffn.ffn.feedforward import configured_by
from sparseffn.ffn.methods import register
from sparseffn.ffn.mixture import LOGIT_BYTES, Mixture, TopKMixtureConfig
from sparseffn.ffn.options import option
from sparseffn.ffn.routers import Batch, Routing, TopKRouter, all_if_none, scores_by_token, sigmoid_scores


@register
@dataclass(frozen=True, kw_only=True, slots=True)
class SBASEConfig(TopKMixtureConfig):
    """S-BASE: top-K of Sinkhorn-balanced scores in training, sigmoid weights, entropy balancing."""

    name: ClassVar[str] = "s-base"
    paper: ClassVar[str] = "Clark 2022, arXiv 2202.01169"
    gate: ClassVar[ops.GateName] = "sigmoid"
    preset_fields: ClassVar[tuple[str, ...]] = (*TopKMixtureConfig.preset_fields, "entropy_weight")
    xfail: ClassVar[dict[str, str]] = {"training_independence": BATCH_ROUTING}

    entropy_weight: Annotated[float, option("Weight of the entropy balancing loss (gamma), eq. 21.", low=0.0)] = 1e-3
    sinkhorn: Annotated[
        Literal["correct", "released"], option("As published, or as released: other signs, each sequence by itself.")
    ] = "correct"

    def build(self) -> SBASE:
        return SBASE(self)

    @property
    def selects_over_batch(self) -> bool:
        """As released each sequence is balanced by itself."""
        return self.sinkhorn == "correct"

    @property
    def revision(self) -> int:
        """2: the released form balances each sequence by itself; version 0.1 took the whole batch."""
        return 2 if self.sinkhorn == "released" else 1

    def _router_bytes(self) -> int:
        """Also the balanced logits that it ranks by."""
        return TopKMixtureConfig._router_bytes(self) + self.n_experts * LOGIT_BYTES

    @classmethod
    def identity_example(cls) -> SBASEConfig:
        return cls(d_model=8, n_experts=4, expert_size=3, k=4)

    @classmethod
    def examples(cls) -> list[FFNConfig]:
        return [
            cls(d_model=8, n_experts=5, expert_size=4, k=2, n_layers=2),
            cls(
                d_model=6,
                n_experts=4,
                expert_size=3,
                k=3,
                sinkhorn="released",
                expert_dropout=0.25,
                activation="silu",
                gated=True,
            ),
        ]


@final
class SinkhornRouter(TopKRouter):
    """Sigmoid scores; in training the selection sees balanced logits."""

    in_one_operation = "evaluation"
    score = staticmethod(sigmoid_scores)

    def __init__(self, config: SBASEConfig) -> None:
        super().__init__(config)
        self.released = config.sinkhorn == "released"

    def select(self, logits_TE: Tensor, batch: Batch) -> Routing:
        """Balanced selection in training; the weights are of the raw logits always."""
        return self.choose(logits_TE, batch, ranks=self.balance(logits_TE.detach(), batch) if self.training else None)

    def balance(self, logits_TE: Tensor, batch: Batch, backend: str = "auto") -> Tensor:
        """Sinkhorn over the whole batch, or as released over each sequence by itself."""
        if not self.released:
            return self.balance_all(logits_TE, batch.mask_T, backend)
        if batch.length is None:
            return ops.sinkhorn(logits_TE, batch.mask_T, released=True, backend=backend)
        # Of length 0 there are no tokens, in any number of sequences.
        by_length = (-1, max(1, batch.length))
        mask_BL = None if batch.mask_T is None else batch.mask_T.unflatten(0, by_length)
        return ops.sinkhorn(logits_TE.unflatten(0, by_length), mask_BL, released=True, backend=backend).flatten(0, 1)

    def balance_all(self, logits_TE: Tensor, mask_T: Tensor | None, backend: str) -> Tensor:
        """Sinkhorn over the whole batch, of which other processes may hold a part: each does the rounds for all."""
        group = self.training_group
        if group is None:
            return ops.sinkhorn(logits_TE, mask_T, backend=backend)
        rows, mask_T = group.rows(len(logits_TE), logits_TE.device), all_if_none(mask_T, logits_TE)
        return rows.own(ops.sinkhorn(rows.gather(logits_TE), rows.gather(mask_T), backend=backend))

    def scores_reference(self, logits_TE: Tensor, batch: Batch) -> Tensor:
        """Sinkhorn by its reference in training, then top-K and sigmoid."""
        ranks_TE = self.balance(logits_TE.detach(), batch, "reference") if self.training else logits_TE
        return scores_by_token(logits_TE, ranks_TE, batch, self.k, self.score)


@final
class SBASE(Mixture):
    """See `Mixture`; released, it balances each sequence by itself."""

    knows_sequences: ClassVar[bool] = True
    config: SBASEConfig

    @configured_by(SBASEConfig)
    def __init__(self, config: SBASEConfig) -> None:
        super().__init__(config, SinkhornRouter(config))
