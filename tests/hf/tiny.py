"""Models of transformers with one mixture of experts, small and random: from config classes alone, nothing is downloaded.

The mixture is the last block, so that rounding within it cannot change what a router selects.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AriaTextConfig,
    AutoModelForCausalLM,
    GptOssConfig,
    GraniteMoeConfig,
    MixtralConfig,
    NemotronHConfig,
    OlmoeConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
)
from transformers.models.aria.modeling_aria import AriaTextForCausalLM
from transformers.models.beam.configuration_beam import BeamConfig
from transformers.models.hy_v4.configuration_hy_v4 import HYV4Config

from sparseffn.data.tokenizers import BytesTokenizer
from sparseffn.hf import TransformerXLForCausalLM, TransformerXLHubConfig
from sparseffn.hf.fast_tokenizers import fast_tokenizer

VOCABULARY = 64
_SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_LAYER = {**_SIZES, "num_hidden_layers": 1}
_MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16}


def _nemotron() -> Any:
    experts = {"moe_intermediate_size": 24, "n_routed_experts": 8, "num_experts_per_tok": 2}
    shared = {"moe_shared_expert_intermediate_size": 16, "n_group": 1, "topk_group": 1}
    return NemotronHConfig(**_SIZES, head_dim=16, layers_block_type=["attention", "moe"], **experts, **shared)


def _beam() -> Any:
    experts = {"moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    return BeamConfig(**_LAYER, head_dim=16, mlp_layer_types=["sparse"], **experts)


def _hy() -> Any:
    experts = {"moe_intermediate_size": 24, "n_routed_experts": 8, "num_experts_per_tok": 2, "swiglu_limit": 0.5}
    return HYV4Config(**_LAYER, **_MLA, mlp_layer_types=["sparse"], index_head_dim=16, index_n_heads=2, **experts)


_LOCAL = {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 24}
CONFIGS: dict[str, Callable[[], Any]] = {
    "olmoe": lambda: OlmoeConfig(**_LAYER, intermediate_size=24, num_experts=8, num_experts_per_tok=2),
    "qwen3_moe": lambda: Qwen3MoeConfig(**_LAYER, head_dim=16, moe_intermediate_size=24, num_experts=8, num_experts_per_tok=2),
    "granitemoe": lambda: GraniteMoeConfig(**_LAYER, **_LOCAL),
    "mixtral": lambda: MixtralConfig(**_LAYER, **_LOCAL),
    "gpt_oss": lambda: GptOssConfig(
        **_LAYER, **_LOCAL, head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 1e4}
    ),
    "nemotron_h": _nemotron,
    "aria": lambda: AriaTextConfig(
        **_LAYER, head_dim=16, intermediate_size=24, moe_num_experts=8, moe_topk=2, moe_num_shared_experts=1
    ),
    "beam": _beam,
    "hy_v4": _hy,
}
"""Beam overrides the gate by one that we know, HY-V4 by one that we do not."""


def build(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model with weights of unit scale, in evaluation mode."""
    config = CONFIGS[family]()
    torch.manual_seed(0)
    model = AriaTextForCausalLM(config) if family == "aria" else AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        with torch.no_grad():
            std = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
            parameter.add_(torch.randn(parameter.shape), alpha=std)
    return model.to(dtype).eval()


def tokens() -> Tensor:
    return torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))


def results(model: PreTrainedModel, implementation: str) -> dict[str, Tensor]:
    """Logits, and the gradient of every parameter, with an implementation of the experts."""
    model.set_experts_implementation(implementation)
    model.zero_grad()
    ids = tokens().to(model.device)
    found = model(input_ids=ids, labels=ids)
    found.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": found.logits.detach(), **gradients}


def largest_deviation(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Of all tensors: norm of the difference over that of the wanted one.

    A gradient below a fiftieth of the largest is a sum that cancels (gpt-oss's two attention sinks): it has the rounding of
    its terms, not its own.
    """
    assert found.keys() == wanted.keys()
    smallest = max(float(t.norm()) for name, t in wanted.items() if name != "logits") / 50
    return max(float((found[n].double() - t.double()).norm()) / max(float(t.norm()), smallest) for n, t in wanted.items())


def export(folder: Path) -> None:
    """A folder as `sparseffn export` writes one."""
    TransformerXLForCausalLM(TransformerXLHubConfig(hidden_size=32, num_hidden_layers=1)).save_pretrained(folder)
    fast_tokenizer(BytesTokenizer()).save_pretrained(folder)


def save_byte_tokenizer(folder: Path) -> None:
    """256 tokens, one for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
