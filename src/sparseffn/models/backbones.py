"""The models around the feedforward blocks, by name: Transformer-XL, which the paper uses, and a decoder as Llama's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from sparseffn.errors import unknown_name
from sparseffn.models.decoder import Decoder
from sparseffn.models.decoder_config import DecoderConfig
from sparseffn.models.model_config import TransformerXLConfig
from sparseffn.models.transformer_xl import TransformerXL

Backbone = Literal["transformer-xl", "llama"]

BACKBONES: tuple[Backbone, ...] = get_args(Backbone)

ModelConfig = TransformerXLConfig | DecoderConfig


def build_model(config: ModelConfig) -> TransformerXL | Decoder:
    """The model of a config, its parameters not drawn yet by `init_parameters`."""
    return Decoder(config) if isinstance(config, DecoderConfig) else TransformerXL(config)


def model_config_from_json(data: Mapping[str, Any]) -> ModelConfig:
    """The config that a `to_json` wrote; one that names no backbone is a Transformer-XL's.

    Raises:
        UserError: the backbone or a field is unknown, or a field is missing or out of range.
    """
    fields = dict(data)
    match fields.pop("backbone", "transformer-xl"):
        case "transformer-xl":
            return TransformerXLConfig.from_json(fields)
        case DecoderConfig.backbone:
            return DecoderConfig.from_json(fields)
        case other:
            raise unknown_name("backbone", str(other), BACKBONES)
