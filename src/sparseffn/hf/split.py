"""A dense block split into equal experts (MoEfication, Zhang 2021, arXiv 2110.01786).

Pairs that are active for the same tokens become an expert: k-means with equal sizes, on the pairs' profiles over calibration
tokens or on their keys. A linear router is then fitted to find the K experts that contribute most to a token's output.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseffn import ops
from sparseffn.errors import UserError
from sparseffn.ffn import FeedForward, option
from sparseffn.ffn.mixture import Mixture
from sparseffn.hf.dense_blocks import DenseBlock
from sparseffn.hf.fill import MixtureFill, set_experts

# Tokens that a profile is over, and that contributions are summed over at a time: memory is d_ff or K d_model floats each.
_PROFILE_TOKENS = 2048
_CHUNK = 1024
# Tokens that a router is fitted on, an n_experts floats each; its 200 steps of 1024 draw each of them six times.
_ROUTER_TOKENS = 32_768
SMALL_LOGIT = 0.05
"""Standard deviation of the fitted router's logits: gates deviate by a few percent from that of a logit of 0."""
# Step of the router's fit by Adam, for inputs of root mean square 1.
_LR = 0.002
_ROUTER_BATCH = 1024


@final
@dataclass(frozen=True, kw_only=True)
class Split(MixtureFill):
    """The dense pairs clustered into equal experts, with a router fitted on calibration tokens."""

    name: ClassVar[str] = "split"
    needs_inputs: ClassVar[bool] = True
    by: Annotated[
        Literal["coactivation", "keys"], option("What makes pairs alike: tokens that they are active for, or their keys.")
    ] = "coactivation"
    rounds: Annotated[int, option("Rounds of k-means.", low=0)] = 10
    router_steps: Annotated[int, option("Steps of the router's fit.", low=0)] = 200

    def sizes(self, block: DenseBlock, options: Mapping[str, Any]) -> dict[str, Any]:
        n_experts = options.get("n_experts")
        if not isinstance(n_experts, int) or n_experts < 1:
            return {}
        if block.d_ff % n_experts:
            near = [n for n in range(1, block.d_ff + 1) if block.d_ff % n == 0]
            near = sorted(sorted(near, key=lambda n: abs(n - n_experts))[:3])
            raise UserError(
                f"`n_experts` must divide the dense block's {block.d_ff} pairs; got {n_experts}; "
                f"fix: {', '.join(map(str, near[:-1]))} or {near[-1]}"
            )
        return {"expert_size": block.d_ff // n_experts}

    @torch.no_grad()
    def fill(self, layer: FeedForward, block: DenseBlock, inputs_TD: Tensor | None, generator: torch.Generator) -> None:
        assert isinstance(layer, Mixture) and inputs_TD is not None, "checked with the config, and inputs are asked for"
        n_experts, k = layer.config.n_experts, layer.config.n_selected
        features_FS = self._features(block, inputs_TD, generator)
        pairs_EG = balanced_clusters(features_FS, n_experts, self.rounds, generator)
        set_experts(layer, block, pairs_EG)
        if k == n_experts:
            # Nothing to select: every gate is that of a logit of 0, and the layer is the dense block.
            layer.router.selector.zero_()
            return
        if len(inputs_TD) > _ROUTER_TOKENS:
            # In their order, which is faster to read from a mapped file.
            tokens = torch.randperm(len(inputs_TD), generator=generator)[:_ROUTER_TOKENS].sort().values
            inputs_TD = inputs_TD[tokens.to(inputs_TD.device)]
        energies_TE = contributions(block, pairs_EG, inputs_TD)
        selector = fitted_router(inputs_TD, energies_TE, k, self.router_steps, generator)
        layer.router.selector.copy_(selector)

    def _features(self, block: DenseBlock, inputs_TD: Tensor, generator: torch.Generator) -> Tensor:
        """float32 `[F, S]` of unit rows."""
        if self.by == "keys":
            features = block.keys if block.gate_keys is None else torch.cat((block.keys, block.gate_keys), dim=1)
            return F.normalize(features.float(), dim=1)
        chosen = torch.randperm(len(inputs_TD), generator=generator)[:_PROFILE_TOKENS].to(inputs_TD.device)
        size_SF = block.coefficients(inputs_TD[chosen]).float().abs() * block.values.float().norm(dim=1)
        # Sizes, not their correlation: pairs that are large for every token belong together too. Measured on SmolLM2's blocks
        # 3, 15 and 27, 64 experts of which half are kept: a tenth less is left out.
        return F.normalize(size_SF.t(), dim=1)


def balanced_clusters(features_FS: Tensor, n_clusters: int, rounds: int, generator: torch.Generator) -> Tensor:
    """int64 `[n_clusters, F / n_clusters]`: rows of each cluster, by k-means on the sphere with equal sizes.

    Each round assigns rows to centroids so that the sum of cosines is maximal at equal sizes; the sum never falls.
    """
    n_rows = len(features_FS)
    centroids_ES = features_FS[torch.randperm(n_rows, generator=generator)[:n_clusters].to(features_FS.device)]
    assigned = ops.balanced_assignment(features_FS @ centroids_ES.t())
    for _ in range(rounds):
        sums = torch.zeros_like(centroids_ES).index_add_(0, assigned, features_FS)
        again = ops.balanced_assignment(features_FS @ F.normalize(sums, dim=1).t())
        if torch.equal(again, assigned):
            break
        assigned = again
    return assigned.argsort(stable=True).view(n_clusters, -1)


def contributions(block: DenseBlock, pairs_EG: Tensor, inputs_TD: Tensor) -> Tensor:
    """float32 `[T, E]`: squared norm of what each expert adds to a token's output."""
    pairs_EG = pairs_EG.to(block.keys.device)
    values_EGD = block.values[pairs_EG]
    found = []
    for x_TD in inputs_TD.split(_CHUNK):
        alpha_TF = block.coefficients(x_TD)
        found.append(
            torch.stack([(alpha_TF[:, p] @ v).float().square().sum(1) for p, v in zip(pairs_EG, values_EGD, strict=True)])
        )
    return torch.cat(found, dim=1).t()


def fitted_router(inputs_TD: Tensor, energies_TE: Tensor, k: int, steps: int, generator: torch.Generator) -> Tensor:
    """float32 `[E, D]`: selector whose logits order experts by their contribution, of standard deviation `SMALL_LOGIT`.

    Minimises the cross-entropy of each expert's being among the K largest contributions, weighted by how much of the token's
    whole contribution hangs on it: a mistake between experts that add next to nothing costs next to nothing.
    """
    size = torch.stack([x_TD.float().square().sum(dtype=torch.float64) for x_TD in inputs_TD.split(_CHUNK)]).sum()
    scale = float((size / inputs_TD.numel()).sqrt())
    with torch.enable_grad():
        selector = torch.zeros(energies_TE.shape[1], inputs_TD.shape[1], device=inputs_TD.device, requires_grad=True)
        optimizer = torch.optim.Adam([selector], lr=_LR / max(scale, 1e-20))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / max(steps, 1))
        for _ in range(steps):
            rows = torch.randint(len(inputs_TD), (_ROUTER_BATCH,), generator=generator).to(inputs_TD.device)
            energies_BE = energies_TE[rows]
            top_BE = torch.zeros_like(energies_BE).scatter_(1, energies_BE.topk(k, dim=1).indices, 1.0)
            share_BE = energies_BE.sqrt() / energies_BE.sqrt().mean(dim=1, keepdim=True).clamp_min(1e-20)
            logits_BE = inputs_TD[rows].float() @ selector.t()
            loss = F.binary_cross_entropy_with_logits(logits_BE, top_BE, weight=share_BE)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    selector = selector.detach()
    logits_TE = torch.cat([x_TD.float() @ selector.t() for x_TD in inputs_TD.split(_CHUNK)])
    return selector * (SMALL_LOGIT / logits_TE.std().clamp_min(1e-20))
