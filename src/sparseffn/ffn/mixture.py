"""What all mixtures of experts share: the experts, the layer that runs a selection, config fields and counts."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseffn import ops
from sparseffn.errors import UserError
from sparseffn.ffn.block_config import INDEX_BYTES, GatedConfig, require
from sparseffn.ffn.feedforward import (
    FeedForward,
    Ranking,
    equal_norm_rows_,
    gate_std,
    largest,
    normal_,
    parameter_shapes,
    scaled_std,
)
from sparseffn.ffn.gradient_means import require_fsdp_over_all
from sparseffn.ffn.options import option
from sparseffn.ffn.routers import Router, Routing, cv_loss, entropy_loss, switch_loss
from sparseffn.ffn.routing_stats import Routed
from sparseffn.ops.activations import hidden_units

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

LOGIT_BYTES = 4

# Switch's reduced initialisation, Fedus 2022 section 2.4: the usual variance times 0.1.
_SWITCH_VARIANCE = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtureConfig(GatedConfig):
    """Fields of every mixture of experts."""

    unit: ClassVar[str] = "experts"
    size_fields: ClassVar[tuple[str, ...]] = ("n_experts", "expert_size")

    n_experts: Annotated[int, option("Experts (N_E).", low=1)]
    expert_size: Annotated[int, option("Key-value pairs of one expert (G).", low=1)]
    dropout: Annotated[
        float,
        option("Standard dropout: rate on s u inside the experts, in place of expert dropout.", low=0.0, below=1.0),
    ] = 0.0
    init: Annotated[
        Literal["shared", "standard", "switch"],
        option(
            "Fan-in of the values: all N_E G pairs (shared), one expert's G (standard), or that at a tenth of the variance."
        ),
    ] = "shared"
    selector_init: Annotated[Literal["equal-norm", "free"], option("Selector rows: rescaled to one norm, or drawn freely.")] = (
        "equal-norm"
    )

    @property
    @abstractmethod
    def n_selected(self) -> int:
        """K, experts a token uses."""

    @property
    def survivors(self) -> int | None:
        """Units that an inner top-K leaves of a token's K G; None: all of them."""
        return None

    def _router_params(self) -> int:
        return self.n_experts * self.d_model

    def num_params(self) -> int:
        """Keys, gate keys and values of all experts, and the selector."""
        return self.n_products * self.n_channels * self.d_model + self._router_params()

    def active_params(self) -> int:
        """Keys, gate keys and values of K experts, and the selector."""
        return self.n_products * self.active_channels * self.d_model + self._router_params()

    def forward_flops(self, *, training: bool = False) -> int:
        """Selector, and the products of K experts."""
        return 2 * self._router_params() + 2 * self.n_products * self.active_channels * self.d_model

    def saved_bytes(self, n_tokens: int, itemsize: int = 4) -> int:
        """Hidden units of the selected experts, and what routing keeps of each selection."""
        # The operation keeps one hidden tensor, gated both products, which units dropout left, and the order of the rows.
        hidden = self.active_channels * (self._kept_products * itemsize + (self.dropout > 0))
        rows = self.n_selected * INDEX_BYTES
        return n_tokens * (hidden + rows + self._router_bytes()) + self._batch_bytes()

    def input_bytes(self, n_tokens: int, *, half: bool = False) -> int:
        """The router takes x in float32 whatever the experts take."""
        router = 4 * n_tokens * self.d_model if half else 0
        return router + GatedConfig.input_bytes(self, n_tokens, half=half)

    @property
    def _kept_products(self) -> int:
        """Numbers that the operation keeps of a hidden unit."""
        return 1 + self.gated

    def _batch_bytes(self) -> int:
        """Bytes that do not grow with the tokens: where each expert's rows begin."""
        return (self.n_experts + 1) * INDEX_BYTES

    def _router_bytes(self) -> int:
        """Bytes a token that the router keeps: selected indices and their gates, and where they are gathered the logits."""
        logits = 0 if self.trains_as_it_evaluates else self.n_experts * LOGIT_BYTES
        return logits + self.n_selected * (INDEX_BYTES + LOGIT_BYTES)

    @property
    def rows_per_pair(self) -> int:
        return self.n_products

    @property
    def n_channels(self) -> int:
        return self.n_experts * self.expert_size

    @property
    def active_channels(self) -> int:
        return self.n_selected * self.expert_size


@dataclass(frozen=True, kw_only=True, slots=True)
class TopKMixtureConfig(MixtureConfig):
    """Fields of mixtures that take the K best experts."""

    k: Annotated[int, option("Experts a token uses (K).", low=1)]
    expert_dropout: Annotated[
        float, option("Rate at which whole experts are removed from a token's choice (delta).", low=0.0, below=1.0)
    ] = 0.0
    # Weights add up, so that every combination means something; the paper's rows each set one.
    entropy_weight: Annotated[float, option("Weight of the entropy balancing loss (gamma), eq. 21.", low=0.0)] = 0.0
    switch_weight: Annotated[float, option("Weight of Switch's balancing loss, eq. 17.", low=0.0)] = 0.0
    cv_weight: Annotated[float, option("Weight of CV^2 of the experts' summed weights, eq. 14.", low=0.0)] = 0.0

    def validate(self) -> None:
        require(self.k <= self.n_experts, "k", f"at most n_experts = {self.n_experts}", self.k, "lower k or raise n_experts")

    @property
    def n_selected(self) -> int:
        return self.k

    def _router_bytes(self) -> int:
        """With expert dropout also which experts it left; of an own choice which selections, and their gates once more."""
        if self.expert_dropout == 0:
            return MixtureConfig._router_bytes(self)
        left = self.k * (1 + LOGIT_BYTES) if self.gate is None else self.n_experts
        return MixtureConfig._router_bytes(self) + left

    def balancing(self) -> dict[str, float]:
        return {"entropy": self.entropy_weight, "switch": self.switch_weight, "cv": self.cv_weight}


class Experts(nn.Module):
    """`keys [E, d_model, G]` and `values [E, G, d_model]`, no biases: the layout of the authors' released layer; gated also
    `gate_keys [E, d_model, G]`.
    """

    is_sharded: bool = False
    """Whether they are spread over processes, as DTensors; `shard_experts` sets it."""
    compute_dtype: torch.dtype | None = None
    """Of sharded experts beside FSDP2 that computes in another one than parameters have; `shard_rest` sets it."""
    means_are_right: bool = False
    """Whether FSDP2 was seen to average the other gradients over all these processes."""

    def __init__(self, config: MixtureConfig) -> None:
        super().__init__()
        self.config = config
        self.keys = nn.Parameter(torch.empty(config.n_experts, config.d_model, config.expert_size))
        self.values = nn.Parameter(torch.empty(config.n_experts, config.expert_size, config.d_model))
        self.gate_keys: nn.Parameter | None
        self.register_parameter("gate_keys", nn.Parameter(torch.empty_like(self.keys)) if config.gated else None)

    def forward(self, x_TD: Tensor, gates_TK: Tensor, indices_TK: Tensor) -> Tensor:
        """`sum_k gates[t, k] values[e] (act(keys[e] x_t) ...)` with `e = indices[t, k]`; see `ops.experts`."""
        c = self.config
        # For one token the search for a parameter that is not there is a percent of the layer.
        gate_keys = self.gate_keys if c.gated else None
        if self.is_sharded:
            return self._dispatched(x_TD, gates_TK, indices_TK)
        return ops.experts(
            x_TD, self.keys, self.values, gates_TK, indices_TK, gate_keys=gate_keys, activation=c.activation,
            dropout=c.dropout if self.training else 0.0, inner_k=c.survivors,
        )  # fmt: skip

    def _dispatched(self, x_TD: Tensor, gates_TK: Tensor, indices_TK: Tensor) -> Tensor:
        """The same where other processes hold most experts."""
        c = self.config
        keys, values, gate_keys = (cast("DTensor", getattr(self, name)) for name in ("keys", "values", "gate_keys"))
        mesh = keys.device_mesh
        if not self.means_are_right and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.means_are_right = require_fsdp_over_all(self, mesh)
        return ops.dispatched_experts(
            x_TD, keys.to_local(), values.to_local(), gates_TK, indices_TK, mesh.get_group(mesh.ndim - 1),
            replicas=mesh.get_group(0) if mesh.ndim > 1 else None, gate_keys=gate_keys.to_local() if c.gated else None,
            activation=c.activation, dropout=c.dropout if self.training else 0.0, dtype=self.compute_dtype,
        )  # fmt: skip

    def require_whole(self) -> None:
        """Raise for what needs all experts in this process.

        Raises:
            UserError: they are sharded.
        """
        if self.is_sharded:
            raise UserError(
                "the experts must all be in this process to look at their pairs; got sharded ones; fix: unshard_experts(model)"
            )

    def extra_repr(self) -> str:
        return parameter_shapes(self)


class Mixture(FeedForward):
    """Router x experts: `y = sum_{e in E_x} s[e] W2^e act(W1^e x)` (equations 11, 12). Methods are its final subclasses.

    Gated experts compute `W2^e (act(W1^e x) (V^e x))`. `router.selector [E, d_model]`, `experts.keys [E, d_model, G]`,
    `experts.values [E, G, d_model]`, gated `experts.gate_keys [E, d_model, G]`.
    """

    config: MixtureConfig

    def __init__(self, config: MixtureConfig, router: Router) -> None:
        super().__init__(config)
        self.router = router
        self.experts = Experts(config)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Experts like the dense block of all pairs ("shared") or of one expert; selector with the keys' spread.

        Gate keys have the spread that `gate_std` gives reasons for, whatever `init` is: a gate of unit variance leaves to keys
        and values what each initialisation means for them.
        """
        c = self.config
        variance = _SWITCH_VARIANCE if c.init == "switch" else 1.0
        key_std = scaled_std(c.d_model, c.n_layers) * math.sqrt(variance)
        fan = c.n_channels if c.init == "shared" else c.expert_size
        normal_(self.experts.keys, key_std, generator)
        normal_(self.experts.values, scaled_std(fan, c.n_layers) * math.sqrt(variance), generator)
        draw = equal_norm_rows_ if c.selector_init == "equal-norm" else normal_
        draw(self.router.selector, key_std, generator)
        if self.experts.gate_keys is not None:
            normal_(self.experts.gate_keys, gate_std(c.d_model), generator)

    def compute(self, x_TD: Tensor, mask_T: Tensor | None, length: int | None = None) -> tuple[Tensor, Routed]:
        """Route, then run the selected experts. `length` is that of a sequence, for layers that know it (`knows_sequences`)."""
        routing = self.router(x_TD, mask_T, length)
        y_TD = self.experts(x_TD, routing.weights_TK, routing.indices_TK)
        return y_TD, Routed(routing.selection(), balance=lambda: self._balance_of(routing, mask_T), dropped=routing.dropped)

    def output_TD(self, x_TD: Tensor, mask_T: Tensor | None, length: int | None = None) -> Tensor:
        """The output alone: for one token what describes the selection costs as much as the router, and a call tells too."""
        routing = self.router(x_TD, mask_T, length)
        return self.experts(x_TD, routing.weights_TK, routing.indices_TK)

    def _balance_of(self, routing: Routing, mask_T: Tensor | None) -> Tensor:
        """The balancing losses times their weights, summed."""
        logits_TE, group = routing.logits_TE, self.router.training_group
        losses: dict[str, Callable[[float], Tensor]] = {
            "entropy": lambda weight: entropy_loss(logits_TE, mask_T, weight, group),
            "switch": lambda weight: switch_loss(routing, mask_T, weight, group),
            "cv": lambda weight: cv_loss(routing, weight, group),
            "slot_entropy": lambda weight: entropy_loss(logits_TE.gather(1, routing.indices_TK), mask_T, weight, group),
        }
        terms = [losses[name](weight) for name, weight in self.config.balancing().items() if weight > 0]
        return sum(terms[1:], terms[0]) if terms else routing.weights_TK.new_zeros(())

    def coefficients_TF(self, x_TD: Tensor, length: int | None = None) -> Tensor:
        """`s[e] act(k_i . x)` for the pairs of selected experts, or the largest of these; zero elsewhere."""
        self.experts.require_whole()
        c = self.config
        selection = self.router(x_TD, None, length).selection()
        tokens_R, experts_R, gate_keys = selection.tokens(), selection.indices, self.experts.gate_keys
        x_RD = x_TD[tokens_R]
        h_RG = ops.cvmm(x_RD, experts_R, self.experts.keys)
        u_RG = hidden_units(c.activation, h_RG, None if gate_keys is None else ops.cvmm(x_RD, experts_R, gate_keys))
        if self.training and c.dropout > 0:
            u_RG = F.dropout(u_RG, c.dropout)
        alpha_RG = u_RG * selection.weights[:, None].to(u_RG.dtype)
        slots = tokens_R * c.n_experts + experts_R

        def spread(units_RG: Tensor) -> Tensor:
            units = units_RG.new_zeros(len(x_TD) * c.n_experts, c.expert_size).index_add(0, slots, units_RG)
            return units.view(len(x_TD), c.n_channels)

        alpha_TF = spread(alpha_RG)
        if c.survivors is None:
            return alpha_TF
        # Units of experts that are not selected must not win against negative ones that are.
        open_TF = spread(torch.ones_like(alpha_RG)) > 0
        best = ops.topk(alpha_TF.masked_fill(~open_TF, -torch.inf), c.survivors, ordered=False)
        return alpha_TF * torch.zeros_like(alpha_TF).scatter(1, best, 1.0)

    def reference_TD(self, x_TD: Tensor, length: int | None = None) -> Tensor:
        """Equation 12, token by token and expert by expert."""
        self.experts.require_whole()
        scores_TE = self.router.reference(x_TD, length)
        keys, values, gate_keys = self.experts.keys, self.experts.values, self.experts.gate_keys
        zero = sum((0 * p.sum() for p in self.experts.parameters()), x_TD.new_zeros(()))
        outputs = []
        for x, s in zip(x_TD, scores_TE, strict=True):
            alpha: dict[int, Tensor] = {}
            for e in torch.nonzero(s).flatten().tolist():
                u = hidden_units(self.config.activation, x @ keys[e], None if gate_keys is None else x @ gate_keys[e])
                alpha[e] = s[e].to(x.dtype) * u
            if self.config.survivors is not None:
                alpha = _keep_largest(alpha, self.config.survivors)
            outputs.append(sum((a @ values[e] for e, a in alpha.items()), x * 0 + zero + 0 * s.sum().to(x.dtype)))
        return torch.stack(outputs) if outputs else x_TD * scores_TE.sum()

    def formula_flops(self) -> int:
        return 2 * self.config.n_products * self.config.d_model * self.config.n_channels

    def formula_TD(self, x_TD: Tensor) -> Tensor:
        """Equation 12 over all experts."""
        alpha_TF, selected_TF = self._pairs(x_TD)
        survivors = self.config.survivors
        if survivors is not None:
            alpha_TF = alpha_TF * largest(alpha_TF.detach().masked_fill(~selected_TF, -torch.inf), survivors)
        return alpha_TF @ self.values_matrix()

    def _pairs(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Score times activation of every pair, `[T, d_ff]`, and which pairs are of selected experts."""
        u_TF = hidden_units(self.config.activation, self.pair_scores(x_TD), self.pair_gates(x_TD))
        scores_TF = self.router.reference(x_TD).repeat_interleave(self.config.expert_size, dim=1)
        return scores_TF * u_TF, scores_TF != 0

    @torch.no_grad()
    def rankings(self, x_TD: Tensor) -> list[Ranking]:
        """Logits, and with an inner top-K the coefficients of the selected experts."""
        experts = Ranking(x_TD @ self.router.selector.t(), self.config.n_selected, of_pairs=False)
        survivors = self.config.survivors
        if survivors is None:
            return [experts]
        alpha_TF, selected_TF = self._pairs(x_TD)
        return [experts, Ranking(alpha_TF[selected_TF].view(len(x_TD), -1), survivors, of_pairs=True)]

    def keys_matrix(self) -> Tensor:
        self.experts.require_whole()
        return self.experts.keys.transpose(1, 2).flatten(0, 1)

    def gate_keys_matrix(self) -> Tensor | None:
        gate_keys = self.experts.gate_keys
        return None if gate_keys is None else gate_keys.transpose(1, 2).flatten(0, 1)

    def values_matrix(self) -> Tensor:
        """Values of all experts, `[N_E G, d_model]`."""
        self.experts.require_whole()
        return self.experts.values.flatten(0, 1)


def _keep_largest(alpha: dict[int, Tensor], k: int) -> dict[int, Tensor]:
    """A token's coefficients by expert, zero but for the K largest of all."""
    ranked = sorted(((a, e, g) for e, row in alpha.items() for g, a in enumerate(row.tolist())), key=lambda r: -r[0])
    kept = {(e, g) for _, e, g in ranked[:k]}
    return {e: torch.stack([a if (e, g) in kept else a * 0 for g, a in enumerate(row)]) for e, row in alpha.items()}
