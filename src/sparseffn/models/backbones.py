"""The models around the feedforward blocks, by name: Transformer-XL, which the paper uses, and a decoder as Llama's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

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
        UserError: a field is unknown, missing or out of range.
    """
    is_decoder = data.get("backbone") == DecoderConfig.backbone
    return DecoderConfig.from_json(data) if is_decoder else TransformerXLConfig.from_json(data)
