"""The config of `TransformerXLForCausalLM`: the sizes of `models.TransformerXLConfig` under the names of transformers."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig

from sparseffn.hf.outputs import NOT_AT_INFERENCE
from sparseffn.models import TransformerXLConfig


class TransformerXLHubConfig(PreTrainedConfig):
    """Sizes of `TransformerXLForCausalLM`.

    `ffn` is the config of the feedforward blocks as `FFNConfig.to_json` writes it; None is the dense block with four times
    `hidden_size` pairs. `memory_length` is how many positions before a window its tokens see through `past_key_values`.
    """

    model_type: ClassVar[str] = "sparseffn-transformer-xl"
    keys_to_ignore_at_inference: ClassVar[list[str]] = NOT_AT_INFERENCE
    # Programs that ask how long a text may be, as lm-evaluation-harness does, read how far a token sees.
    attribute_map: ClassVar[dict[str, str]] = {
        "max_position_embeddings": "memory_length",
        "d_model": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "d_head": "head_dim",
    }

    vocab_size: int = 256
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    head_dim: int = 32
    dropout: float = 0.0
    shared_layers: bool = False
    memory_length: int = 1024
    ffn: dict[str, Any] | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.ffn is None:
            dense = {"d_model": self.hidden_size, "n_layers": self.num_hidden_layers, "d_ff": 4 * self.hidden_size}
            self.ffn = {"method": "dense", **dense, "dropout": self.dropout}
        super().__post_init__(**kwargs)

    @property
    def model_config(self) -> TransformerXLConfig:
        """The sizes as the model's own config.

        Raises:
            UserError: a size is out of range, or the block's method is unknown.
        """
        return TransformerXLConfig.from_json(
            {
                "vocab_size": self.vocab_size,
                "d_model": self.hidden_size,
                "n_layers": self.num_hidden_layers,
                "n_heads": self.num_attention_heads,
                "d_head": self.head_dim,
                "dropout": self.dropout,
                "shared_layers": self.shared_layers,
                "ffn": self.ffn,
            }
        )

    @classmethod
    def of_model(cls, config: TransformerXLConfig, *, memory_length: int, **fields: Any) -> TransformerXLHubConfig:
        """The config of a model of ours; `fields` are further ones."""
        return cls(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            head_dim=config.d_head,
            dropout=config.dropout,
            shared_layers=config.shared_layers,
            ffn=config.ffn.to_json(),
            memory_length=memory_length,
            **fields,
        )
