r"""Product-key memory, equation 8 of arXiv 2310.10837 (Lample 2019, arXiv 1907.05242), with the paper's ReLU.

$$ x = x_a \mid x_b, \quad u_a = W_a x_a, \quad u_b = W_b x_b $$
$$ u[i] = u_b[\lfloor i / n_a \rfloor] + u_a[i \bmod n_a] $$
$$ y = \sum_{i \in \mathcal{E}_x} \mathrm{act}(u[i]) \, v_i, \quad \mathcal{E}_x = \mathrm{argtopk}(u, K) $$

n_a + n_b sub-keys score n_a n_b values. Each head has its own sub-keys and takes its own top K; all share one value table.
`k=None` is the dense form that the released configurations run: the heads' scores are summed per value, no top-K, the
activation on the sum. No query projection, no normalisation, no dropout.

When to use it:
    For a very large table of values, of which a token reads a handful: scoring them costs the square root of their number. In
    place of one block or two of a deep model, as Lample (2019) did, rather than of all.

When not:
    For the best loss at equal parameters: in the paper, and in our runs, it stays behind the dense block. The keys are sums of
    two halves, and values far apart in memory are gathered one by one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseffn import ops
from sparseffn.ffn.block_config import INDEX_BYTES, BlockShape, FFNConfig, require
from sparseffn.ffn.feedforward import FeedForward, Ranking, configured_by, largest, normal_, scaled_std
from sparseffn.ffn.methods import register
from sparseffn.ffn.options import option
from sparseffn.ffn.routing_stats import Routed
from sparseffn.ops.activations import ACTIVATIONS


@register
@dataclass(frozen=True, kw_only=True, slots=True)
class PKMConfig(FFNConfig):
    """Product keys: n_a + n_b sub-keys a head score n_a x n_b values, of which K a head are read."""

    name: ClassVar[str] = "pkm"
    paper: ClassVar[str] = "Lample 2019, arXiv 1907.05242"
    unit: ClassVar[str] = "values"
    size_fields: ClassVar[tuple[str, ...]] = ("n_subkeys", "n_subkeys_b")

    n_subkeys: Annotated[int, option("Sub-keys of the first half, and of the second unless n_subkeys_b is given.", low=1)]
    k: Annotated[int | None, option("Values a head reads; none: the released dense form, without top-K.", low=1)]
    n_subkeys_b: Annotated[int | None, option("Sub-keys of the second half; none: as many as the first.", low=1)] = None
    n_heads: Annotated[int, option("Heads, each with its own sub-keys; their outputs are summed.", low=1)] = 4
    # The original memory normalises each head's scores by a softmax, which no other method does.
    activation: Annotated[
        Literal["relu", "softmax", "gelu", "silu", "identity", "relu2", "gelu_tanh"], option("Applied to the selected scores.")
    ] = "relu"
    values_init: Annotated[
        Literal["d_model", "n_values"], option("Fan of the values' initialisation; n_values is the paper's '+ init'.")
    ] = "d_model"

    def validate(self) -> None:
        even = "even, as product keys split x in halves"
        require(self.d_model % 2 == 0, "d_model", even, self.d_model, "use an even d_model")
        if self.k is not None:
            most = f"at most the number of values {self.n_channels}"
            require(self.k <= self.n_channels, "k", most, self.k, "lower k or add sub-keys")

    @property
    def n_b(self) -> int:
        """Sub-keys of the second half."""
        return self.n_subkeys if self.n_subkeys_b is None else self.n_subkeys_b

    def build(self) -> PKM:
        return PKM(self)

    def _key_params(self) -> int:
        return self.n_heads * (self.n_subkeys + self.n_b) * (self.d_model // 2)

    def num_params(self) -> int:
        return self._key_params() + self.n_channels * self.d_model

    def active_params(self) -> int:
        """All sub-keys, and the values that the heads read."""
        return self._key_params() + min(self.active_channels, self.n_channels) * self.d_model

    def forward_flops(self, *, training: bool = False) -> int:
        return 2 * self._key_params() + 2 * self.active_channels * self.d_model

    def saved_bytes(self, n_tokens: int, itemsize: int = 4) -> int:
        """Indices and weights of the values read, and slopes that these do not show; in the dense form all weights."""
        tensors = 1 if self.activation in ("relu", "softmax", "identity") else 2
        index_bytes = 0 if self.k is None else INDEX_BYTES
        return n_tokens * self.active_channels * (index_bytes + tensors * itemsize)

    @property
    def n_channels(self) -> int:
        return self.n_subkeys * self.n_b

    @property
    def active_channels(self) -> int:
        """heads x k, or every value in the dense form."""
        return self.n_channels if self.k is None else self.n_heads * self.k

    @classmethod
    def from_shape(cls, shape: BlockShape) -> PKMConfig:
        """As many values as the dense block has pairs, and heads x k = K x G."""
        n_subkeys = max(1, round(math.sqrt(shape.d_ff)))
        k = max(1, shape.active_channels // shape.n_heads)
        return cls(d_model=shape.d_model, n_subkeys=n_subkeys, n_heads=shape.n_heads, k=k, n_layers=shape.n_layers)

    @classmethod
    def identity_example(cls) -> PKMConfig:
        """One head that reads every value: a dense block whose keys are all pairs of sub-keys."""
        return cls(d_model=8, n_subkeys=4, n_subkeys_b=3, n_heads=1, k=12)

    @classmethod
    def examples(cls) -> list[FFNConfig]:
        return [
            cls(d_model=8, n_subkeys=5, n_heads=2, k=3, n_layers=2),
            cls(d_model=6, n_subkeys=3, n_subkeys_b=4, n_heads=1, k=6, activation="softmax", values_init="n_values"),
            cls(d_model=8, n_subkeys=4, n_heads=2, k=None),
            cls(d_model=8, n_subkeys=4, n_heads=2, k=None, activation="softmax"),
        ]


@final
class PKM(FeedForward):
    """`keys_a [H, n_a, d_model/2]`, `keys_b [H, n_b, d_model/2]`, `values [n_a n_b, d_model]`."""

    config: PKMConfig

    @configured_by(PKMConfig)
    def __init__(self, config: PKMConfig) -> None:
        super().__init__(config)
        half = config.d_model // 2
        self.keys_a = nn.Parameter(torch.empty(config.n_heads, config.n_subkeys, half))
        self.keys_b = nn.Parameter(torch.empty(config.n_heads, config.n_b, half))
        self.values = nn.Parameter(torch.empty(config.n_channels, config.d_model))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """`N(0, 2 / (d_model n_layers))`; with "+ init" the values have n_values in place of d_model."""
        c = self.config
        normal_(self.keys_a, scaled_std(c.d_model, c.n_layers), generator)
        normal_(self.keys_b, scaled_std(c.d_model, c.n_layers), generator)
        fan = c.n_channels if c.values_init == "n_values" else c.d_model
        normal_(self.values, scaled_std(fan, c.n_layers), generator)

    def scores(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """u_a `[T, H, n_a]` and u_b `[T, H, n_b]`."""
        x_a, x_b = x_TD.chunk(2, dim=1)
        u_a = F.linear(x_a, self.keys_a.flatten(0, 1)).unflatten(1, (self.config.n_heads, -1))
        u_b = F.linear(x_b, self.keys_b.flatten(0, 1)).unflatten(1, (self.config.n_heads, -1))
        return u_a, u_b

    def activate(self, u: Tensor) -> Tensor:
        """The activation; softmax runs over the last dimension: one head's K, or every value in the dense form."""
        name = self.config.activation
        return u.softmax(dim=-1) if name == "softmax" else ACTIVATIONS[name](u)

    def reads(self, x_TD: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """y, and value indices and coefficients, `[T, H K]`."""
        return ops.product_key_rows(x_TD, self.keys_a, self.keys_b, self.values, k=k, activation=self.config.activation)

    def dense_coefficients(self, x_TD: Tensor) -> Tensor:
        """The released form: scores summed over heads, activation on the sum, `[T, n_values]`."""
        u_a, u_b = self.scores(x_TD)
        u_TN = (u_b.sum(dim=1)[:, :, None] + u_a.sum(dim=1)[:, None, :]).flatten(1)
        return self.activate(u_TN)

    def compute(self, x_TD: Tensor, mask_T: Tensor | None) -> tuple[Tensor, Routed]:
        if self.config.k is None:
            alpha_TN = self.dense_coefficients(x_TD)
            return alpha_TN @ self.values, Routed(alpha_TN)
        y_TD, indices, alpha = self.reads(x_TD, self.config.k)
        kept = alpha if mask_T is None else alpha * mask_T[:, None]
        selection = ops.Selection.fixed(indices, kept, self.config.n_channels)
        return y_TD, Routed(selection)

    def coefficients_TF(self, x_TD: Tensor) -> Tensor:
        if self.config.k is None:
            return self.dense_coefficients(x_TD)
        _, indices, alpha = self.reads(x_TD, self.config.k)
        return alpha.new_zeros(x_TD.shape[0], self.config.n_channels).scatter_add(1, indices, alpha)

    def reference_TD(self, x_TD: Tensor) -> Tensor:
        """Equation 8, token by token and head by head, over all n_a n_b sums."""
        outputs = []
        for x in x_TD:
            x_a, x_b = x.chunk(2)
            u_HN = torch.stack(
                [((b @ x_b)[:, None] + (a @ x_a)[None, :]).flatten() for a, b in zip(self.keys_a, self.keys_b, strict=True)]
            )
            outputs.append(self._read(u_HN))
        return torch.stack(outputs) if outputs else x_TD * sum(p.sum() for p in self.parameters())

    def _read(self, u_HN: Tensor) -> Tensor:
        if self.config.k is None:
            return self.activate(u_HN.sum(dim=0)) @ self.values
        y = self.values.new_zeros(self.config.d_model)
        for u_N in u_HN:
            best = u_N.detach().sort(descending=True, stable=True).indices[: self.config.k]
            y = y + self.activate(u_N[best]) @ self.values[best]
        return y

    def keys_matrix(self) -> Tensor | None:
        """Of one head: every pair of sub-keys, side by side."""
        if self.config.n_heads > 1:
            return None
        a_ND, b_ND = self.keys_a[0], self.keys_b[0]
        return torch.cat((a_ND.repeat(len(b_ND), 1), b_ND.repeat_interleave(len(a_ND), dim=0)), dim=1)

    def values_matrix(self) -> Tensor:
        return self.values

    def formula_flops(self) -> int:
        """Every head scores every pair."""
        return 4 * self.config.d_model * self.config.n_channels * self.config.n_heads

    def pair_scores(self, x_TD: Tensor) -> Tensor:
        """Of each head, `[T, H, n_a n_b]`."""
        halves = zip(x_TD.chunk(2, dim=1), (self.keys_a, self.keys_b), strict=True)
        u_a, u_b = (torch.einsum("td,knd->tkn", x, keys) for x, keys in halves)
        return (u_b[..., :, None] + u_a[..., None, :]).flatten(2)

    def formula_TD(self, x_TD: Tensor) -> Tensor:
        """Equation 8 over all pairs of sub-keys."""
        u_THN = self.pair_scores(x_TD)
        if self.config.k is None:
            return self.activate(u_THN.sum(dim=1)) @ self.values
        best_THN = largest(u_THN.detach(), self.config.k)
        if self.config.activation == "softmax":
            return u_THN.masked_fill(best_THN == 0, -torch.inf).softmax(dim=2).sum(dim=1) @ self.values
        return (self.activate(u_THN) * best_THN).sum(dim=1) @ self.values

    def near_kink(self, x_TD: Tensor, margin: float) -> Tensor:
        """Of many thousands of pairs some always are near; those that no head reads do not matter."""
        scores = self.pair_scores(x_TD)
        near = scores.abs() < margin
        if self.config.k is not None:
            near &= scores > scores.topk(self.config.k).values[..., -1:] - 2 * margin
        return near.flatten(1).any(dim=1)

    @torch.no_grad()
    def rankings(self, x_TD: Tensor) -> list[Ranking]:
        return [] if self.config.k is None else [Ranking(self.pair_scores(x_TD), self.config.k, of_pairs=True)]
