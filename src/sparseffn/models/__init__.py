"""The language model: Transformer-XL that takes any method's feedforward block."""

from sparseffn.models.attention import PlainAttention, RelativeAttention
from sparseffn.models.model_config import TransformerXLConfig
from sparseffn.models.transformer_xl import Memory, ModelOutput, TransformerXL, keyed_generator

__all__ = [
    "Memory",
    "ModelOutput",
    "PlainAttention",
    "RelativeAttention",
    "TransformerXL",
    "TransformerXLConfig",
    "keyed_generator",
]
