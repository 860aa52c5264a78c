r"""Sparsely gated mixture of experts (Shazeer 2017, arXiv 1701.06538), equations 13 and 14 of arXiv 2310.10837.

$$ h = W_3 x + \mathcal{N}(0, 1) \, \mathrm{softplus}(W_4 x) \text{ in training} $$
$$ h = W_3 x \text{ in evaluation} $$
$$ s = \mathrm{normtopk}(\mathrm{softmax}(h)) $$
$$ y = \sum_{e \in \mathcal{E}_x} s[e] \, W_2^e \, \mathrm{act}(W_1^e x) $$
$$ L = 0.1 \, \mathrm{CV}^2\Big(\sum_x s\Big) $$

$W_3$ and $W_4$ start at zero as in Shazeer (2017); its second loss, on the load, is not in the paper and not built.

When to use it:
    As the historical baseline, or where exploration by noise is wanted: every expert is tried in training, however its logits
    began.

When not:
    Where training should see the routing that evaluation sees, or where its second selector, for the noise, weighs: with many
    small experts it is a noticeable part of the parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseffn import ops
from sparseffn.ffn.block_config import FFNConfig, require
from sparseffn.ffn.feedforward import configured_by
from sparseffn.ffn.methods import register
from sparseffn.ffn.mixture import LOGIT_BYTES, Mixture, TopKMixtureConfig
from sparseffn.ffn.options import option
from sparseffn.ffn.routers import Batch, Routing, TopKRouter, renormalised_scores, scores_by_token
from sparseffn.ffn.softmax_renorm_moe import REFUSES_ONE


@register
@dataclass(frozen=True, kw_only=True, slots=True)
class NoisyMoEConfig(TopKMixtureConfig):
    """Sparsely gated mixture of experts: noisy logits in training, renormalised gates, CV^2 balancing."""

    name: ClassVar[str] = "noisy-moe"
    paper: ClassVar[str] = "Shazeer 2017, arXiv 1701.06538"
    gate: ClassVar[ops.GateName] = "renormalised"

    # Mixtures without noise cannot start from zero, where all experts tie.
    selector_init: Annotated[
        Literal["zero", "equal-norm", "free"], option("Selector rows: zero as in Shazeer, or as in other mixtures.")
    ] = "zero"
    cv_weight: Annotated[float, option("Weight of CV^2 of the experts' summed weights, eq. 14.", low=0.0)] = 0.1

    def validate(self) -> None:
        TopKMixtureConfig.validate(self)
        require(self.k >= 2, "k", REFUSES_ONE, self.k, "raise k or use sigma-moe or softmax-moe")

    def build(self) -> NoisyMoE:
        return NoisyMoE(self)

    def _router_params(self) -> int:
        return 2 * self.n_experts * self.d_model

    def forward_flops(self, *, training: bool = False) -> int:
        """The noise's product is done in training alone."""
        unused = 0 if training else self.n_experts * self.d_model
        return TopKMixtureConfig.forward_flops(self) - 2 * unused

    def _router_bytes(self) -> int:
        """Also the noise and the input of softplus."""
        return TopKMixtureConfig._router_bytes(self) + 2 * self.n_experts * LOGIT_BYTES

    def saved_bytes(self, n_tokens: int, itemsize: int = 4) -> int:
        """Also both selectors as one matrix."""
        return TopKMixtureConfig.saved_bytes(self, n_tokens, itemsize) + 2 * self.n_experts * self.d_model * itemsize

    def input_bytes(self, n_tokens: int, *, half: bool = False) -> int:
        """Autocast leaves that matrix in float32, of which `saved_bytes` in half precision counts the half."""
        rest = 2 * self.n_experts * self.d_model * 2 if half else 0
        return TopKMixtureConfig.input_bytes(self, n_tokens, half=half) + rest

    @classmethod
    def examples(cls) -> list[FFNConfig]:
        return [
            cls(d_model=8, n_experts=5, expert_size=4, k=2, n_layers=2),
            cls(
                d_model=6,
                n_experts=4,
                expert_size=3,
                k=3,
                activation="identity",
                gated=True,
                selector_init="free",
                cv_weight=0.0,
                expert_dropout=0.25,
            ),
        ]


@final
class NoisyRouter(TopKRouter):
    """Noise of learned size on the logits in training, and a softmax over the K largest."""

    in_one_operation = "evaluation"
    score = staticmethod(renormalised_scores)

    def __init__(self, config: NoisyMoEConfig) -> None:
        super().__init__(config)
        self.noise_selector = nn.Parameter(torch.empty(config.n_experts, config.d_model))

    def logits(self, x_TD: Tensor) -> Tensor:
        """The logits, in training with those of the noise behind them: one product with both selectors, `[T, 2 E]`."""
        selector = torch.cat((self.selector, self.noise_selector)) if self.training else self.selector
        return ops.router_logits(x_TD, selector)

    def select(self, logits_TE: Tensor, batch: Batch) -> Routing:
        """Selection and gates both see the noise (equation 13)."""
        if not self.training:
            return self.choose(logits_TE, batch)
        # No views: FSDP2 warns of them among a module's results.
        logits_TE, spread_TE = torch.unsafe_chunk(logits_TE, 2, dim=1)
        return self.choose(logits_TE, batch, spread=spread_TE, noise=self.draw_noise(logits_TE))

    def draw_noise(self, logits_TE: Tensor) -> Tensor:
        """A unit normal for each logit, drawn alike however many processes share the batch."""
        if self.batch_group is None:
            return torch.randn_like(logits_TE)
        return self.batch_group.draw(torch.randn, *logits_TE.shape, device=logits_TE.device, dtype=logits_TE.dtype)

    def scores_reference(self, logits_TE: Tensor, batch: Batch) -> Tensor:
        if self.training:
            noise_TE = self.draw_noise(logits_TE)
            logits_TE = logits_TE + noise_TE * F.softplus(ops.router_logits(batch.x_TD, self.noise_selector))
        return scores_by_token(logits_TE, logits_TE, batch, self.k, self.score)


@final
class NoisyMoE(Mixture):
    """As every mixture, and `router.noise_selector [E, d_model]`."""

    config: NoisyMoEConfig
    router: NoisyRouter

    @configured_by(NoisyMoEConfig)
    def __init__(self, config: NoisyMoEConfig) -> None:
        super().__init__(config, NoisyRouter(config))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Experts as in every mixture; both selectors start at zero, so that noise alone routes at first."""
        super().reset_parameters(generator)
        if self.config.selector_init == "zero":
            nn.init.zeros_(self.router.selector)
        nn.init.zeros_(self.router.noise_selector)
