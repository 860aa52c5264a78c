r"""Top-K activation: only the K largest entries of u take part, equations 6 and 7 of arXiv 2310.10837.

$$ \mathcal{E}_x = \mathrm{argtopk}(u, K) $$
$$ y = \sum_{i \in \mathcal{E}_x} u[i] \, v_i + b_2 $$

All of u is computed; the work and the memory of the second product shrink to K / d_ff. Exactly K entries survive, ties going
to the lowest index. Dropout acts on u before the selection, as in the dense block. Gated, u has either sign and |u| is ranked;
`by_magnitude` ranks |u| without a gate too, as GELU's negative units count in a model that was trained dense.

When to use it:
    In a model that is trained already: its weights are used as they are, since the parameters are the dense block's. To learn
    how few pairs a token needs, before choosing the K and G of a mixture.

When not:
    Where the first product is what costs: it stays whole, so that no more than half of the FLOPs of a plain block can go, and a
    third of a gated one. Training saves less still.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, ClassVar, final

import torch
from torch import Tensor

from sparseffn import ops
from sparseffn.ffn.block_config import INDEX_BYTES, BlockShape, FFNConfig, require
from sparseffn.ffn.dense import TwoMatrices, TwoMatricesConfig
from sparseffn.ffn.feedforward import Ranking, configured_by, largest
from sparseffn.ffn.methods import register
from sparseffn.ffn.options import option
from sparseffn.ffn.routing_stats import Routed


@register
@dataclass(frozen=True, kw_only=True, slots=True)
class TopKConfig(TwoMatricesConfig):
    """The K largest entries of u, all of which is computed."""

    name: ClassVar[str] = "topk"
    paper: ClassVar[str] = "Csordás 2023, arXiv 2310.10837, eq. 6-7"

    k: Annotated[int, option("Entries of u that survive.", low=1)]
    use_norm: Annotated[bool, option("Rank by u[i] |v_i|, the error bound's terms, instead of u[i]; gated by |u[i]|.")] = False
    by_magnitude: Annotated[
        bool, option("Rank by |u[i]| also where no gate gives u both signs; for GELU and SiLU.", added_later=True)
    ] = False
    dropout: Annotated[float, option("Dropout rate on u, before the selection.", low=0.0, below=1.0)] = 0.0

    def validate(self) -> None:
        require(self.k <= self.d_ff, "k", f"at most d_ff = {self.d_ff}", self.k, "lower k or raise d_ff")

    def build(self) -> TopK:
        return TopK(self)

    def active_params(self) -> int:
        """All keys and gate keys, K values."""
        return self.num_params() - self.d_model * (self.d_ff - self.k)

    def forward_flops(self, *, training: bool = False) -> int:
        return 2 * self.d_model * ((self.n_products - 1) * self.d_ff + self.k)

    def saved_bytes(self, n_tokens: int, itemsize: int = 4) -> int:
        """K indices and coefficients, derivatives that these do not show, and which units dropout left."""
        shown = self.activation == "relu" or (self.activation == "identity" and self.dropout == 0)
        slopes = 2 if self.gated else 0 if shown else 1
        left = self.d_ff if self.dropout > 0 else 0
        return n_tokens * (self.k * (INDEX_BYTES + (1 + slopes) * itemsize) + left)

    def work_bytes(self, n_tokens: int, itemsize: int = 4) -> int:
        """Every score, from which it selects, if that is more."""
        return n_tokens * max(2 * self.k, self.d_ff) * itemsize

    @property
    def active_channels(self) -> int:
        return self.k

    @property
    def ranks_magnitude(self) -> bool:
        """Whether |u[i]| is ranked."""
        return self.gated or self.by_magnitude

    @classmethod
    def from_shape(cls, shape: BlockShape) -> TopKConfig:
        """The dense block's size with as many active channels as the mixtures have."""
        return super(TopKConfig, cls).from_shape(dataclasses.replace(shape, k=shape.active_channels))

    @classmethod
    def identity_example(cls) -> TopKConfig:
        return cls(d_model=8, d_ff=24, k=24)

    @classmethod
    def examples(cls) -> list[FFNConfig]:
        return [
            cls(d_model=8, d_ff=24, k=5, n_layers=2),
            cls(d_model=6, d_ff=10, k=3, use_norm=True, by_magnitude=True, activation="silu"),
            cls(d_model=6, d_ff=10, k=10, dropout=0.25),
            cls(d_model=6, d_ff=10, k=4, gated=True, activation="gelu_tanh", use_norm=True),
        ]


@final
class TopK(TwoMatrices):
    """See `TwoMatrices`: from one seed it starts like the dense block."""

    config: TopKConfig

    @configured_by(TopKConfig)
    def __init__(self, config: TopKConfig) -> None:
        super().__init__(config)

    def rank(self, u_TF: Tensor) -> Tensor:
        """What the K largest are chosen by: u, of gated units its size, times the values' norms where those count."""
        size_TF = u_TF.abs() if self.config.ranks_magnitude else u_TF
        return size_TF * self.values.norm(dim=1) if self.config.use_norm else size_TF

    def survivors(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """y, and indices and coefficients `[T, K]` of the survivors."""
        c = self.config
        return ops.topk_rows(
            x_TD, self.keys, self.values, k=c.k, gate_keys=self.gate_keys if c.gated else None, key_bias=self.key_bias,
            gate_bias=self.gate_bias if c.gated else None, value_bias=self.bias, activation=c.activation,
            dropout=c.dropout if self.training else 0.0, by_norm=c.use_norm, by_magnitude=c.ranks_magnitude,
        )  # fmt: skip

    def compute(self, x_TD: Tensor, mask_T: Tensor | None) -> tuple[Tensor, Routed]:
        """Score all keys, add up K values."""
        y_TD, indices_TK, alpha_TK = self.survivors(x_TD)
        kept_TK = alpha_TK if mask_T is None else alpha_TK * mask_T[:, None]
        return y_TD, Routed(ops.Selection.fixed(indices_TK, kept_TK, self.config.d_ff))

    def coefficients_TF(self, x_TD: Tensor) -> Tensor:
        """u at the survivors, zero elsewhere."""
        _, indices_TK, alpha_TK = self.survivors(x_TD)
        return alpha_TK.new_zeros(x_TD.shape[0], self.config.d_ff).scatter(1, indices_TK, alpha_TK)

    def reference_TD(self, x_TD: Tensor) -> Tensor:
        """Equations 6 and 7, token by token."""
        c, outputs = self.config, []
        norms = self.values.norm(dim=1).tolist()
        for x in x_TD:
            u = self.units(self.keys @ x + self.key_bias, self.gate_keys @ x + self.gate_bias if c.gated else None)
            sizes = [abs(u_i) if c.ranks_magnitude else u_i for u_i in u.tolist()]
            rank = [size * (norm if c.use_norm else 1.0) for size, norm in zip(sizes, norms, strict=True)]
            best = sorted(range(len(rank)), key=lambda i: (-rank[i], i))[: c.k]
            outputs.append(sum((u[i] * self.values[i] for i in best), self.bias))
        return torch.stack(outputs) if outputs else x_TD * self.values.sum() + self.bias

    def formula_TD(self, x_TD: Tensor) -> Tensor:
        """Equations 6 and 7 by products over all pairs."""
        u_TF = self.units(self.pair_scores(x_TD), self.pair_gates(x_TD))
        (ranking,) = self.rankings(x_TD)
        return (u_TF * largest(ranking.scores, ranking.k)) @ self.values + self.bias

    @torch.no_grad()
    def rankings(self, x_TD: Tensor) -> list[Ranking]:
        """As `rank` says."""
        u_TF = self.units(self.pair_scores(x_TD), self.pair_gates(x_TD))
        return [Ranking(self.rank(u_TF), self.config.k, of_pairs=True)]
