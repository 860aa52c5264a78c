"""The config of our decoder in a Hugging Face folder: the sizes of `models.DecoderConfig` under transformers' names."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig

from sparseffn.hf.outputs import NOT_AT_INFERENCE
from sparseffn.models import DecoderConfig


class SparseFFNConfig(PreTrainedConfig):
    """Sizes of `SparseFFNForCausalLM`.

    `ffn` is the config of the feedforward blocks, a method and its options as `FFNConfig.to_json` writes them:
    `{"method": "sigma-moe", "n_experts": 16, "expert_size": 128, "k": 4}`. `d_model` and `n_layers` follow from the model; None
    is Llama's block, dense and gated by SiLU, with 8/3 `hidden_size` pairs. `max_position_embeddings` limits nothing, as
    rotary positions need no table: it is the length that the model was trained with, for programs that ask.

    Raises:
        UserError: a size is out of range, the method is unknown, or its options make no config.
    """

    model_type: ClassVar[str] = "sparseffn"
    keys_to_ignore_at_inference: ClassVar[list[str]] = NOT_AT_INFERENCE
    attribute_map: ClassVar[dict[str, str]] = {
        "d_model": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "d_head": "head_dim",
    }

    vocab_size: int = 32_000
    hidden_size: int = 512
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 64
    dropout: float = 0.0
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 2048
    ffn: dict[str, Any] | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        llama = {"method": "dense", "d_ff": 8 * self.hidden_size // 3, "activation": "silu", "gated": True}
        given = llama if self.ffn is None else self.ffn
        self.ffn = {"d_model": self.hidden_size, "n_layers": self.num_hidden_layers, **given}
        super().__post_init__(**kwargs)
        # What makes no model is refused now, not when it is built.
        _ = self.model_config

    @property
    def model_config(self) -> DecoderConfig:
        """The sizes as the model's own config."""
        return DecoderConfig.from_json(
            {
                "vocab_size": self.vocab_size,
                "d_model": self.hidden_size,
                "n_layers": self.num_hidden_layers,
                "n_heads": self.num_attention_heads,
                "n_kv_heads": self.num_key_value_heads,
                "d_head": self.head_dim,
                "dropout": self.dropout,
                "rope_base": self.rope_theta,
                "norm_eps": self.rms_norm_eps,
                "tied_embeddings": self.tie_word_embeddings,
                "ffn": self.ffn,
            }
        )

    @classmethod
    def of_model(cls, config: DecoderConfig, **fields: Any) -> SparseFFNConfig:
        """The config of a model of ours; `fields` are further ones."""
        return cls(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            head_dim=config.d_head,
            dropout=config.dropout,
            rope_theta=config.rope_base,
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=config.tied_embeddings,
            ffn=config.ffn.to_json(),
            **fields,
        )
