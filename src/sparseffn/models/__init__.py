"""Language models that take any method's feedforward block: Transformer-XL, and a decoder of today's kind."""

from sparseffn.models.attention import PlainAttention, RelativeAttention
from sparseffn.models.backbones import Backbone, ModelConfig, build_model, model_config_from_json
from sparseffn.models.decoder import Decoder
from sparseffn.models.decoder_config import DecoderConfig
from sparseffn.models.language_model import LanguageModel, Memory, ModelOutput, keyed_generator
from sparseffn.models.model_config import TransformerXLConfig
from sparseffn.models.released_models import load_released_model
from sparseffn.models.transformer_xl import TransformerXL

__all__ = [
    "Backbone",
    "Decoder",
    "DecoderConfig",
    "LanguageModel",
    "Memory",
    "ModelConfig",
    "ModelOutput",
    "PlainAttention",
    "RelativeAttention",
    "TransformerXL",
    "TransformerXLConfig",
    "build_model",
    "keyed_generator",
    "load_released_model",
    "model_config_from_json",
]
