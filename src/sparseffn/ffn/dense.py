r"""The dense two-layer block that every method approximates, equations 1-5 of arXiv 2310.10837.

$$ u = \mathrm{act}(W_1 x + b_1) $$
$$ y = W_2 u + b_2 = \sum_i u[i] \, v_i + b_2 $$

Rows of `keys` are the $k_i$, rows of `values` the $v_i$. Gated it is $u = \mathrm{act}(W_1 x + b_1) \odot (V x + c)$, with the
gate keys $g_i$ as rows of $V$ (Shazeer 2020, arXiv 2002.05202). This file is the template to copy for a new method.

When to use it:
    As the baseline of every comparison, and where the block is no bottleneck: small models, or batches so small that attention
    and the embedding take most of the time.

When not:
    Where the block holds most of the parameters and the compute: a mixture of experts of the same parameters computes a
    fraction of it for each token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseffn.ffn.block_config import INDEX_BYTES, FFNConfig, GatedConfig
from sparseffn.ffn.feedforward import FeedForward, configured_by, gate_std, scaled_std, truncated_normal_
from sparseffn.ffn.methods import register
from sparseffn.ffn.options import option
from sparseffn.ffn.routing_stats import Routed
from sparseffn.ops.activations import hidden_units, saved_activations


@dataclass(frozen=True, kw_only=True, slots=True)
class TwoMatricesConfig(GatedConfig):
    """Fields of blocks with the dense block's parameters."""

    size_fields: ClassVar[tuple[str, ...]] = ("d_ff",)
    preset_fields: ClassVar[tuple[str, ...]] = (*FFNConfig.preset_fields, "dropout")

    d_ff: Annotated[int, option("Key-value pairs: width of the hidden layer.", low=1)]

    def num_params(self) -> int:
        """All matrices, a bias for each key and gate key, and one on the output."""
        return self.n_products * self.d_model * self.d_ff + (self.n_products - 1) * self.d_ff + self.d_model

    @property
    def n_channels(self) -> int:
        return self.d_ff


@register
@dataclass(frozen=True, kw_only=True, slots=True)
class DenseConfig(TwoMatricesConfig):
    """Every key-value pair for every token: the block to approximate."""

    name: ClassVar[str] = "dense"
    paper: ClassVar[str] = "Vaswani 2017, arXiv 1706.03762"
    has_backends: ClassVar[bool] = False

    dropout: Annotated[float, option("Dropout rate on u.", low=0.0, below=1.0)] = 0.0

    def build(self) -> Dense:
        return Dense(self)

    def active_params(self) -> int:
        return self.num_params()

    def forward_flops(self, *, training: bool = False) -> int:
        return 2 * self.n_products * self.d_model * self.d_ff

    def saved_bytes(self, n_tokens: int, itemsize: int = 4) -> int:
        """u once or twice, gated both of its factors, and with dropout its mask and the dropped u."""
        tensors = saved_activations(self.activation, self.dropout, gated=self.gated)
        return n_tokens * self.d_ff * tensors * itemsize

    def input_bytes(self, n_tokens: int, *, half: bool = False) -> int:
        """Under autocast gated keys take a copy of their own."""
        copies = 2 if self.gated and half else 1
        return copies * GatedConfig.input_bytes(self, n_tokens, half=half)

    def work_bytes(self, n_tokens: int, itemsize: int = 4) -> int:
        """Statistics need more: of each unit whether it is not 0, and that as a whole number, to be summed."""
        return n_tokens * self.d_ff * max(2 * itemsize, 1 + INDEX_BYTES)

    @property
    def active_channels(self) -> int:
        """All of them are computed; how many are non-zero is for the analyses to count."""
        return self.d_ff

    @classmethod
    def identity_example(cls) -> DenseConfig:
        return cls(d_model=8, d_ff=24)

    @classmethod
    def examples(cls) -> list[FFNConfig]:
        return [
            cls(d_model=8, d_ff=24, n_layers=2),
            cls(d_model=6, d_ff=10, activation="gelu", dropout=0.25),
            cls(d_model=6, d_ff=10, activation="silu", gated=True, n_layers=2),
            cls(d_model=6, d_ff=10, activation="clamped_swiglu", gated=True, dropout=0.25),
        ]


class TwoMatrices(FeedForward):
    """Parameters of the dense block: `keys [d_ff, d_model]`, `key_bias [d_ff]`, `values [d_ff, d_model]`, `bias [d_model]`;
    gated also `gate_keys [d_ff, d_model]` and `gate_bias [d_ff]`.
    """

    config: TwoMatricesConfig

    def __init__(self, config: TwoMatricesConfig) -> None:
        super().__init__(config)
        self.keys = nn.Parameter(torch.empty(config.d_ff, config.d_model))
        self.key_bias = nn.Parameter(torch.empty(config.d_ff))
        self.values = nn.Parameter(torch.empty(config.d_ff, config.d_model))
        self.bias = nn.Parameter(torch.empty(config.d_model))
        if config.gated:
            self.gate_keys = nn.Parameter(torch.empty(config.d_ff, config.d_model))
            self.gate_bias = nn.Parameter(torch.empty(config.d_ff))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Truncated normal with standard deviation `sqrt(2 / (fan_in n_layers))`, biases zero; gate keys as `gate_std` says."""
        c = self.config
        truncated_normal_(self.keys, scaled_std(c.d_model, c.n_layers), generator)
        truncated_normal_(self.values, scaled_std(c.n_channels, c.n_layers), generator)
        nn.init.zeros_(self.key_bias)
        nn.init.zeros_(self.bias)
        if c.gated:
            truncated_normal_(self.gate_keys, gate_std(c.d_model), generator)
            nn.init.zeros_(self.gate_bias)

    def values_matrix(self) -> Tensor:
        return self.values

    def keys_matrix(self) -> Tensor:
        return self.keys

    def key_bias_vector(self) -> Tensor:
        return self.key_bias

    def gate_keys_matrix(self) -> Tensor | None:
        return self.gate_keys if self.config.gated else None

    def gate_bias_vector(self) -> Tensor | None:
        return self.gate_bias if self.config.gated else None

    def output_bias(self) -> Tensor:
        return self.bias

    def formula_flops(self) -> int:
        return 2 * self.config.n_products * self.config.d_model * self.config.d_ff

    def units(self, scores: Tensor, gate_scores: Tensor | None) -> Tensor:
        """u of both products with x, biases included."""
        return hidden_units(self.config.activation, scores, gate_scores)

    def products_TF(self, x_TD: Tensor) -> tuple[Tensor, Tensor | None]:
        """Both products with x, biases included; the second is None without a gate."""
        scores_TF = F.linear(x_TD, self.keys, self.key_bias)
        return scores_TF, F.linear(x_TD, self.gate_keys, self.gate_bias) if self.config.gated else None


@final
class Dense(TwoMatrices):
    """See `TwoMatrices`."""

    config: DenseConfig

    @configured_by(DenseConfig)
    def __init__(self, config: DenseConfig) -> None:
        super().__init__(config)

    def coefficients_TF(self, x_TD: Tensor) -> Tensor:
        """u, dropout included."""
        u_TF = self.units(*self.products_TF(x_TD))
        return F.dropout(u_TF, self.config.dropout) if self.training and self.config.dropout > 0 else u_TF

    def compute(self, x_TD: Tensor, mask_T: Tensor | None) -> tuple[Tensor, Routed]:
        """Keys, then values; every unit counts as selected where u is not zero."""
        u_TF = self.coefficients_TF(x_TD)
        return F.linear(u_TF, self.values.t(), self.bias), Routed(u_TF)

    def reference_TD(self, x_TD: Tensor) -> Tensor:
        """Equation 5, pair by pair."""
        y_TD = self.bias.expand(x_TD.shape)
        for i, value in enumerate(self.values):
            up_T = x_TD @ self.gate_keys[i] + self.gate_bias[i] if self.config.gated else None
            alpha_T = self.units(x_TD @ self.keys[i] + self.key_bias[i], up_T)
            y_TD = y_TD + alpha_T[:, None] * value
        return y_TD

    def formula_TD(self, x_TD: Tensor) -> Tensor:
        """Equation 5 by products over all pairs."""
        return self.units(self.pair_scores(x_TD), self.pair_gates(x_TD)) @ self.values + self.bias
