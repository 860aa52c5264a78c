"""Ways to fill a new block from the dense block in whose place it comes.

    Same()      the dense block's own weights: nothing to train; `topk` computes their K largest coefficients
    Split()     its pairs clustered into equal experts, with a router fitted to them; see `split`
    Upcycle()   each expert a copy of the whole block (arXiv 2212.05055), or partly drawn anew (2502.19261)
    Random()    the method's own initialisation

What is filled from the dense block starts with gates of 1: values are divided by the gate that a logit of 0 gives.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, final

import torch
from torch import Tensor, nn

from sparseffn.errors import UserError
from sparseffn.ffn import FeedForward, FFNConfig, field_infos, make_config, option
from sparseffn.ffn.dense import TwoMatrices, TwoMatricesConfig
from sparseffn.ffn.mixture import Mixture, MixtureConfig
from sparseffn.ffn.options import check_fields
from sparseffn.hf.dense_blocks import DenseBlock


@dataclass(frozen=True, kw_only=True)
class Fill(ABC):
    """A way to fill a block, with its options."""

    name: ClassVar[str]
    needs_inputs: ClassVar[bool] = False
    """Whether `fill` needs inputs of the dense block, from calibration tokens."""

    def __post_init__(self) -> None:
        check_fields(self)

    @abstractmethod
    def sizes(self, block: DenseBlock, options: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of the config that follow from the dense block."""

    @abstractmethod
    def check(self, block: DenseBlock, config_class: type[FFNConfig]) -> None:
        """Whether the dense block's weights go into a method; raises UserError."""

    @abstractmethod
    def fill(self, layer: FeedForward, block: DenseBlock, inputs_TD: Tensor | None, generator: torch.Generator) -> None:
        """Set the parameters of a new layer, on the CPU or on the block's device, in the block's dtype."""

    def described(self) -> str:
        """The way and its unusual options, as one types them: `upcycle redraw=0.5`."""
        chosen = {field.name: getattr(self, field.name) for field in fields(self)}
        usual = {field.name: field.default for field in fields(self)}
        return " ".join([self.name, *(f"{name}={value}" for name, value in chosen.items() if value != usual[name])])

    def config(self, config_class: type[FFNConfig], block: DenseBlock, options: Mapping[str, Any], n_layers: int) -> FFNConfig:
        """The config of the block's replacement.

        Raises:
            UserError: an option is unknown or follows from the block, one is missing, or the method cannot take the block.
        """
        self.check(block, config_class)
        infos = field_infos(config_class)
        given = {"d_model": block.d_model, "activation": block.activation, "gated": block.gated, **self.sizes(block, options)}
        following = {name: value for name, value in given.items() if name in infos}
        for name in options:
            if name in following and options[name] != following[name]:
                raise UserError(
                    f"`{name}` must be left out, as it follows from the dense block: {following[name]}; got {options[name]!r}; "
                    "fix: init='random' lets you choose it"
                )
        return make_config(config_class, {"n_layers": n_layers, **following, **options})


def mark_fill(layer: FeedForward, described: str | None) -> None:
    """Note on a layer how it was filled, which no parameter and no config says."""
    vars(layer)["filled_from"] = described


def fill_of(layer: FeedForward) -> str | None:
    """What `mark_fill` noted; None: nothing."""
    return vars(layer).get("filled_from")


@final
@dataclass(frozen=True, kw_only=True)
class Random(Fill):
    """The method's own initialisation."""

    name: ClassVar[str] = "random"

    def sizes(self, block: DenseBlock, options: Mapping[str, Any]) -> dict[str, Any]:
        free = {"d_ff": block.d_ff, "activation": block.activation, "gated": block.gated}
        return {key: options.get(key, value) for key, value in free.items()}

    def check(self, block: DenseBlock, config_class: type[FFNConfig]) -> None:
        pass

    def fill(self, layer: FeedForward, block: DenseBlock, inputs_TD: Tensor | None, generator: torch.Generator) -> None:
        layer.reset_parameters(generator)


@final
@dataclass(frozen=True, kw_only=True)
class Same(Fill):
    """The dense block's own weights, for methods that have its parameters."""

    name: ClassVar[str] = "same"

    def sizes(self, block: DenseBlock, options: Mapping[str, Any]) -> dict[str, Any]:
        # Large negative units of GELU and SiLU count as much as positive ones; ReLU has none.
        signed = not block.gated and block.activation not in ("relu", "relu2")
        ranked = {"by_magnitude": options.get("by_magnitude", True)} if signed else {}
        return {"d_ff": block.d_ff, **ranked}

    def check(self, block: DenseBlock, config_class: type[FFNConfig]) -> None:
        if not issubclass(config_class, TwoMatricesConfig):
            raise UserError(
                f"`init` must be split, upcycle or random for {config_class.name}, which has other parameters than the dense "
                "block; got 'same'; fix: init='split', or method topk"
            )

    @torch.no_grad()
    def fill(self, layer: FeedForward, block: DenseBlock, inputs_TD: Tensor | None, generator: torch.Generator) -> None:
        assert isinstance(layer, TwoMatrices), "checked with the config"
        for parameter, tensor in (
            (layer.keys, block.keys), (layer.values, block.values), (layer.key_bias, block.key_bias),
            (layer.bias, block.value_bias),
        ):  # fmt: skip
            _set(parameter, tensor)
        if block.gated:
            _set(layer.gate_keys, block.gate_keys)
            _set(layer.gate_bias, block.gate_bias)


class MixtureFill(Fill):
    """What split and upcycle share: mixtures whose evaluation gates are known."""

    def check(self, block: DenseBlock, config_class: type[FFNConfig]) -> None:
        if not issubclass(config_class, MixtureConfig) or config_class.gate is None:
            raise UserError(
                f"`init` must be same or random for {config_class.name}, which is no mixture with a plain gate; "
                f"got {self.name!r}; fix: method sigma-moe, softmax-moe, softmax-renorm-moe or switch"
            )
        if block.has_biases:
            raise UserError(
                f"`method` must have biases, as the dense block {block.kind} has; "
                f"got {config_class.name}, whose experts have none; fix: method topk"
            )


@final
@dataclass(frozen=True, kw_only=True)
class Upcycle(MixtureFill):
    """Each expert a copy of the whole block: it computes K times as much, and starts as the dense block."""

    name: ClassVar[str] = "upcycle"
    redraw: Annotated[
        float, option("Share of each expert's pairs that is drawn anew, as Drop-Upcycling does.", low=0.0, high=1.0)
    ] = 0.0

    def sizes(self, block: DenseBlock, options: Mapping[str, Any]) -> dict[str, Any]:
        return {"expert_size": block.d_ff}

    @torch.no_grad()
    def fill(self, layer: FeedForward, block: DenseBlock, inputs_TD: Tensor | None, generator: torch.Generator) -> None:
        assert isinstance(layer, Mixture), "checked with the config"
        whole = torch.arange(block.d_ff).expand(layer.config.n_experts, -1)
        set_experts(layer, block, whole, share=1 / layer.config.n_selected)
        # Gates stay near that of a logit of 0, while every expert has a logit of its own.
        noise = torch.randn(layer.router.selector.shape, generator=generator)
        layer.router.selector.copy_(noise * (_UPCYCLED_LOGIT / block.d_model**0.5))
        n_drawn = round(self.redraw * block.d_ff)
        if n_drawn:
            for expert in range(layer.config.n_experts):
                pairs = torch.randperm(block.d_ff, generator=generator)[:n_drawn]
                self._redraw(layer, expert, pairs.to(block.keys.device), generator)

    def _redraw(self, layer: Mixture, expert: int, pairs: Tensor, generator: torch.Generator) -> None:
        """New pairs, normal with the mean and the standard deviation of those that they replace (2502.19261, section 3)."""
        experts = layer.experts
        for parameter, dim in ((experts.keys, 1), (experts.gate_keys, 1), (experts.values, 0)):
            if parameter is None:
                continue
            matrix = parameter[expert]
            old = matrix.index_select(dim, pairs).float()
            noise = torch.randn(old.shape, generator=generator).to(old.device)
            matrix.index_copy_(dim, pairs, (old.mean() + old.std() * noise).to(matrix.dtype))


# Standard deviation of an upcycled router's logits, for inputs of unit variance.
_UPCYCLED_LOGIT = 0.01


def set_experts(layer: Mixture, block: DenseBlock, pairs_EG: Tensor, share: float = 1.0) -> None:
    """Experts from the pairs of a dense block; values times `share` over the gate of a logit of 0, so that gates are 1."""
    experts, pairs_EG = layer.experts, pairs_EG.to(block.keys.device)
    experts.keys.copy_(block.keys[pairs_EG].transpose(1, 2))
    experts.values.copy_(block.values[pairs_EG] * (share / gate_at_zero(layer.config)))
    if block.gate_keys is not None:
        assert experts.gate_keys is not None, "the config is gated where the block is"
        experts.gate_keys.copy_(block.gate_keys[pairs_EG].transpose(1, 2))


def gate_at_zero(config: MixtureConfig) -> float:
    """The gate of a selected expert where all logits are 0."""
    match config.gate:
        case "sigmoid":
            return 0.5
        case "softmax":
            return 1 / config.n_experts
        case "renormalised":
            return 1 / config.n_selected
    raise AssertionError(f"{config.gate} is no gate")


def _set(parameter: nn.Parameter, tensor: Tensor | None) -> None:
    if tensor is None:
        parameter.zero_()
    else:
        parameter.copy_(tensor)
