"""The base of every layer: a drop-in feedforward block with optional mask and statistics; and how parameters are drawn."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, overload

import torch
from torch import Tensor, nn

from sparseffn.errors import UserError
from sparseffn.ffn.block_config import FFNConfig
from sparseffn.ffn.routing_stats import Routed, RoutingStats, routing_stats


class FeedForward(nn.Module, ABC):
    """A feedforward block `(..., d_model) -> (..., d_model)`, without layer norm and without residual.

    Every block is a sum of key-value pairs: `layer(x) == coefficients(x) @ values_matrix() + output_bias()`.
    A method implements the methods below that take `x_TD`, tokens in a matrix.
    """

    knows_sequences: ClassVar[bool] = False
    """Whether `compute`, `output_TD`, `coefficients_TF` and `reference_TD` also take `length`, the tokens of a sequence.

    They get it where x is `(..., length, d_model)` with three dimensions or more; tokens in a matrix are one sequence.
    """

    def __init__(self, config: FFNConfig) -> None:
        super().__init__()
        self.config = config

    @abstractmethod
    def compute(self, x_TD: Tensor, mask_T: Tensor | None) -> tuple[Tensor, Routed]:
        """The output `[T, D]` and what it was computed from. `mask_T` is False for padding, whose x is zero already."""

    def output_TD(self, x_TD: Tensor, mask_T: Tensor | None) -> Tensor:
        """The output of `compute` alone; a method overrides this where leaving out the rest saves time."""
        return self.compute(x_TD, mask_T)[0]

    @abstractmethod
    def coefficients_TF(self, x_TD: Tensor) -> Tensor:
        """The coefficient of every pair, `[T, d_ff]`, zero for those not selected."""

    @abstractmethod
    def reference_TD(self, x_TD: Tensor) -> Tensor:
        """The paper's equations, slowly: the truth for `compute` in tests."""

    @abstractmethod
    def values_matrix(self) -> Tensor:
        """The values `v_i`, `[d_ff, d_model]`."""

    @abstractmethod
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the initial parameters again, from `generator` or from PyTorch's global one."""

    def keys_matrix(self) -> Tensor | None:
        """The keys `k_i`, `[d_ff, d_model]`, of the dense block that the layer equals when everything is selected.

        The contract suite holds a layer of `identity_example()` against that block; there every selector row is
        (100, 0, ..., 0) and the first entry of x is 1, which opens a sigmoid's gate. None where no such block exists.
        """
        return None

    def key_bias_vector(self) -> Tensor | None:
        """Biases of the keys, `[d_ff]`, where there are any."""
        return None

    def output_bias(self) -> Tensor | None:
        """The bias added to the sum of values, `[d_model]`, where there is one."""
        return None

    @overload
    def forward(self, x: Tensor, *, mask: Tensor | None = None, return_stats: Literal[False] = False) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, *, mask: Tensor | None = None, return_stats: Literal[True]) -> tuple[Tensor, RoutingStats]: ...

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, return_stats: bool = False
    ) -> Tensor | tuple[Tensor, RoutingStats]:
        """Apply the block to each token.

        Args:
            x: `(..., d_model)`, any leading shape, zero tokens included.
            mask: bool of x's leading shape, False for padding: it gets output 0 and takes no part in balancing,
                batch-wide routing or statistics.
            return_stats: also return `RoutingStats`.

        Returns:
            y of x's shape; under autocast in autocast's dtype, as `nn.Linear`. With `return_stats`, `(y, stats)`.

        Raises:
            UserError: x or mask has another shape than the layer needs, or x is not floating-point.
        """
        x_TD, mask_T = self._flatten(x, mask)
        known = self._known(x)
        y_TD, routed = self.compute(x_TD, mask_T, **known) if return_stats else (self.output_TD(x_TD, mask_T, **known), None)
        if mask_T is not None:
            y_TD = y_TD.masked_fill(~mask_T[:, None], 0.0)
        y = y_TD if x.dim() == 2 else y_TD.reshape(x.shape)
        return y if routed is None else (y, routing_stats(routed, mask_T, x_TD.shape[0]))

    def coefficients(self, x: Tensor) -> Tensor:
        """The coefficient of every key-value pair, `(..., d_ff)`: non-negative for ReLU, zero where not selected."""
        x_TD, _ = self._flatten(x, None)
        return self.coefficients_TF(x_TD, **self._known(x)).reshape(*x.shape[:-1], -1)

    def reference(self, x: Tensor) -> Tensor:
        """The output by the slow reference; draws the same random numbers as `forward` where a method routes by them."""
        x_TD, _ = self._flatten(x, None)
        return self.reference_TD(x_TD, **self._known(x)).reshape(x.shape)

    def _known(self, x: Tensor) -> dict[str, Any]:
        return {"length": x.shape[-2]} if self.knows_sequences and x.dim() > 2 else {}

    def _flatten(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        d_model = self.config.d_model
        if x.dim() == 0 or x.shape[-1] != d_model or not x.is_floating_point():
            raise UserError(
                f"`x` must be floating-point with last dimension d_model = {d_model}; "
                f"got {tuple(x.shape)} of {x.dtype}; fix: check the layer's d_model"
            )
        x_TD = x if x.dim() == 2 else x.reshape(-1, d_model)
        if mask is None:
            return x_TD, None
        if mask.shape != x.shape[:-1] or mask.dtype != torch.bool:
            raise UserError(
                f"`mask` must be bool of shape {tuple(x.shape[:-1])}; got {tuple(mask.shape)} of {mask.dtype}; "
                "fix: True for tokens, False for padding"
            )
        mask_T = mask.reshape(-1)
        return x_TD.masked_fill(~mask_T[:, None], 0.0), mask_T

    def extra_repr(self) -> str:
        """The config, in `print(model)`."""
        return ", ".join(f"{k}={v!r}" for k, v in self.config.to_json().items())


def scaled_std(fan: int, n_layers: int) -> float:
    """`sqrt(2 / (fan n_layers))`, the dense pre-layernorm block's standard deviation."""
    return math.sqrt(2.0 / (fan * n_layers))


@torch.no_grad()
def normal_(weight: Tensor, std: float, generator: torch.Generator | None) -> None:
    weight.normal_(0.0, std, generator=generator)


@torch.no_grad()
def truncated_normal_(weight: Tensor, std: float, generator: torch.Generator | None) -> None:
    """Normal truncated at two standard deviations, the sample then rescaled to exactly `std` (about zero)."""
    torch.nn.init.trunc_normal_(weight, generator=generator)
    weight.mul_(std / weight.square().mean().sqrt().clamp_min(1e-12))


@torch.no_grad()
def equal_norm_rows_(weight: Tensor, std: float, generator: torch.Generator | None) -> None:
    """Normal, every row rescaled to the same norm, then the matrix rescaled so that its standard deviation is `std`.

    A row's norm would otherwise favour or starve its expert whatever the angle between row and input.
    """
    weight.normal_(generator=generator)
    weight.div_(weight.norm(dim=-1, keepdim=True).clamp_min(1e-12))
    weight.mul_(std / weight.std(correction=0).clamp_min(1e-12) if weight.numel() > 1 else std)
