"""The base of every layer: a drop-in feedforward block with optional mask and statistics; and how parameters are drawn."""

from __future__ import annotations

import functools
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, ParamSpec, Protocol, TypeVar, overload

import torch
from torch import Tensor, nn

from sparseffn.errors import UserError
from sparseffn.ffn.block_config import FFNConfig
from sparseffn.ffn.methods import make_config
from sparseffn.ffn.options import field_infos
from sparseffn.ffn.routing_stats import Routed, RoutingStats, routing_stats
from sparseffn.ops import BatchGroup

Fields = ParamSpec("Fields")
Config = TypeVar("Config", bound=FFNConfig)
ConfigIn = TypeVar("ConfigIn", bound=FFNConfig, contravariant=True)


class _Call(Protocol[Fields, ConfigIn]):  # pyright: ignore[reportInvalidTypeVarUse]
    @overload
    def __call__(self, config: ConfigIn) -> None: ...

    @overload
    def __call__(self, *args: Fields.args, **fields: Fields.kwargs) -> None: ...


class _Constructor(Protocol[Fields, ConfigIn]):
    """What type checkers see of an `__init__` that `configured_by` decorates: it is called with a config or with its fields."""

    def __get__(self, instance: object, owner: type | None = None, /) -> _Call[Fields, ConfigIn]: ...


def configured_by(
    config_class: Callable[Fields, Config],
) -> Callable[[Callable[[Any, Config], None]], _Constructor[Fields, Config]]:
    """Decorator of a layer's `__init__(self, config)`: the layer is also built from the config's fields by keyword.

    Raises, when the layer is built:
        UserError: both or another config is given, or the fields make no config.
    """
    assert isinstance(config_class, type), "a config class, which type checkers must see as its constructor"

    def decorate(init: Callable[[Any, Config], None]) -> _Constructor[Fields, Config]:
        @functools.wraps(init)
        def construct(self: Any, config: Any = None, **fields: Any) -> None:
            if config is None:
                config = make_config(config_class, fields)
            elif fields or not isinstance(config, config_class):
                got = f"{config!r} and {', '.join(fields)}" if fields else repr(config)
                raise UserError(
                    f"`config` must be a {config_class.__name__} by itself; got {got}; fix: pass its fields by keyword"
                )
            init(self, config)

        # What `help` and notebooks show.
        itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        parameters = (p.replace(annotation=p.empty) for p in inspect.signature(config_class).parameters.values())
        vars(construct)["__signature__"] = inspect.Signature([itself, *parameters])
        return construct  # pyright: ignore[reportReturnType]

    return decorate


@dataclass(frozen=True, slots=True)
class Ranking:
    """A choice of the K largest of some scores."""

    scores: Tensor
    """`[T, ..., n]`, the choice is along the last dimension."""
    k: int
    of_pairs: bool
    """Whether single key-value pairs are chosen, of which there are thousands, or experts."""


class FeedForward(nn.Module, ABC):
    """A feedforward block `(..., d_model) -> (..., d_model)`, without layer norm and without residual.

    Every block is a sum of key-value pairs: `layer(x) == coefficients(x) @ values_matrix() + output_bias()`.
    A method implements the methods below that take `x_TD`, tokens in a matrix.
    """

    knows_sequences: ClassVar[bool] = False
    """Whether `compute`, `output_TD`, `coefficients_TF` and `reference_TD` also take `length`, the tokens of a sequence.

    They get it where x is `(..., length, d_model)` with three dimensions or more; tokens in a matrix are one sequence.
    """

    batch_group: BatchGroup | None = None
    """The processes that a training batch is spread over; `set_batch_group` sets it."""

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

    def gate_keys_matrix(self) -> Tensor | None:
        """The gate keys `g_i`, `[d_ff, d_model]`, where that dense block is gated."""
        return None

    def gate_bias_vector(self) -> Tensor | None:
        """Biases of the gate keys, `[d_ff]`, where there are any."""
        return None

    def output_bias(self) -> Tensor | None:
        """The bias added to the sum of values, `[d_model]`, where there is one."""
        return None

    # What the benchmark's correctness check needs to know of a method; all of it is for evaluation.

    def formula_flops(self) -> int | None:
        """FLOPs a token of `formula_TD`; None where a method has no formula faster than its reference."""
        return None

    def formula_TD(self, x_TD: Tensor) -> Tensor:
        """The output by dense products over all pairs, differentiable: the truth for thousands of tokens."""
        return self.reference_TD(x_TD)

    def pair_scores(self, x_TD: Tensor) -> Tensor:
        """The score of every pair before the activation, `[T, ..., d_ff]`, for methods with a formula."""
        keys, bias = self.keys_matrix(), self.key_bias_vector()
        assert keys is not None, "blocks with a formula name their keys"
        return x_TD @ keys.t() if bias is None else x_TD @ keys.t() + bias

    def pair_gates(self, x_TD: Tensor) -> Tensor | None:
        """`g_i . x` of every pair, `[T, d_ff]`; None without gates."""
        keys, bias = self.gate_keys_matrix(), self.gate_bias_vector()
        if keys is None:
            return None
        return x_TD @ keys.t() if bias is None else x_TD @ keys.t() + bias

    def near_kink(self, x_TD: Tensor, margin: float) -> Tensor:
        """bool `[T]`: tokens with a pair that matters and whose score is within `margin` of 0, ReLU's kink."""
        return (self.pair_scores(x_TD).abs() < margin).flatten(1).any(dim=1)

    def rankings(self, x_TD: Tensor) -> list[Ranking]:
        """Every choice of the largest that the method makes, so that tokens can be found whose choice hangs on rounding."""
        return []

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
            UserError: x or mask has another shape than the layer needs, or x is not floating-point or distributed.
        """
        x_TD, mask_T = self._flatten(x, mask)
        known = self._known(x) if self.knows_sequences else {}
        y_TD, routed = self.compute(x_TD, mask_T, **known) if return_stats else (self.output_TD(x_TD, mask_T, **known), None)
        if mask_T is not None:
            y_TD = y_TD.masked_fill(~mask_T[:, None], 0.0)
        y = y_TD if x_TD is x else y_TD.reshape(x.shape)
        if routed is None:
            return y
        return y, routing_stats(routed, mask_T, x_TD.shape[0], self.batch_group if self.training else None)

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
        d_model, shape = self.config.d_model, x.shape
        if not shape or shape[-1] != d_model or not x.is_floating_point():
            raise UserError(
                f"`x` must be floating-point with last dimension d_model = {d_model}; "
                f"got {tuple(x.shape)} of {x.dtype}; fix: check the layer's d_model"
            )
        if type(x) is not Tensor and self.config.has_backends and type(x).__name__ == "DTensor":
            raise UserError(
                "`x` must be a tensor of this process; got a DTensor, whose parts the layer's kernels do not know; "
                "fix: pass x.to_local() or x.full_tensor(), and shard the parameters with FSDP2"
            )
        x_TD = x if len(shape) == 2 else x.reshape(-1, d_model)
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
        """In `print(model)`: the config's fields that are not the defaults, sizes, and the block's own parameters."""
        c = self.config
        given = {i.name: getattr(c, i.name) for i in field_infos(type(c)).values() if getattr(c, i.name) != i.default}
        fields = ", ".join(f"{name}={value!r}" for name, value in given.items())
        counts = f"{c.num_params():,} parameters, {c.active_params():,} active"
        return "\n".join(filter(None, (fields, counts, parameter_shapes(self))))


def parameter_shapes(module: nn.Module) -> str:
    """A module's own parameters in words: `keys [4, 8, 2], values [4, 2, 8]`."""
    return ", ".join(f"{name} {list(p.shape)}" for name, p in module.named_parameters(recurse=False))


def largest(scores: Tensor, k: int) -> Tensor:
    """1 at the K largest of the last dimension, 0 elsewhere."""
    return torch.zeros_like(scores).scatter(-1, scores.topk(k).indices, 1.0)


def scaled_std(fan: int, n_layers: int) -> float:
    """`sqrt(2 / (fan n_layers))`, the dense pre-layernorm block's standard deviation."""
    return math.sqrt(2.0 / (fan * n_layers))


def gate_std(d_model: int) -> float:
    """`sqrt(1 / d_model)`, the gate keys' standard deviation: `g . x` then has unit variance for the x that layer norm leaves.

    The two products are independent, so `E[alpha^2] = E[act(k . x)^2] E[(g . x)^2]`: a gated block starts with coefficients of
    the second moment of one that is not gated, and so do its output and the gradients of keys and values. Drawn like the keys,
    with `2 / (d_model n_layers)`, the product would lose a factor n_layers / 2 more of the variance, 8 at 16 layers, which the
    keys' depth scaling has already taken out of the residual stream once.
    """
    return math.sqrt(1.0 / d_model)


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
