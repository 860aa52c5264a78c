"""Models of transformers with dense feedforward blocks, small and random: from config classes alone, nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3NextConfig,
    SmolLM3Config,
)
from transformers.models.ministral.configuration_ministral import MinistralConfig
from transformers.models.ministral3.configuration_ministral3 import Ministral3Config

VOCABULARY = 64
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 64, **_TOKENS,
}  # fmt: skip
_GROUPED = {**_SIZES, "num_key_value_heads": 1}
FULL = {**_GROUPED, "head_dim": 16, "layer_types": ["full_attention", "full_attention"]}
"""Of families that mix kinds of attention: blocks are what matters here."""

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**_SIZES),
    "mistral": lambda: MistralConfig(**_GROUPED),
    "ministral": lambda: MinistralConfig(**FULL),
    "ministral3": lambda: Ministral3Config(
        **_GROUPED,
        head_dim=16,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1e4,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 16,
        },
    ),
    "qwen2": lambda: Qwen2Config(**_GROUPED),
    "qwen3": lambda: Qwen3Config(**_GROUPED, head_dim=16),
    "qwen3_5": lambda: Qwen3_5TextConfig(**FULL),
    "qwen3_next": lambda: Qwen3NextConfig(**FULL, mlp_only_layers=[0, 1]),
    "smollm3": lambda: SmolLM3Config(**_GROUPED),
    "gemma": lambda: GemmaConfig(**_GROUPED, head_dim=16),
    "gemma2": lambda: Gemma2Config(**_GROUPED, head_dim=16),
    "gemma3": lambda: Gemma3TextConfig(**_GROUPED, head_dim=16),
    "gemma4": lambda: Gemma4TextConfig(**FULL, global_head_dim=16, hidden_size_per_layer_input=0),
    "gpt2": lambda: GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_inner=48, n_positions=64, **_TOKENS),
    "gpt_neox": lambda: GPTNeoXConfig(**_SIZES),
}


def build(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model with weights of unit scale, biases included, in evaluation mode."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]())
    for parameter in model.parameters():
        with torch.no_grad():
            std = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
            parameter.add_(torch.randn(parameter.shape), alpha=std)
    return model.to(dtype).eval()


def ids(n: int = 4, length: int = 24) -> Tensor:
    return torch.randint(3, VOCABULARY, (n, length), generator=torch.Generator().manual_seed(1))
