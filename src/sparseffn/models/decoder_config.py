"""Sizes of the decoder of today's kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from sparseffn.errors import UserError
from sparseffn.ffn import FFNConfig, config_from_json, option
from sparseffn.ffn.block_config import require
from sparseffn.ffn.options import check_fields, from_fields


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderConfig:
    """A model is its sizes and the config of its feedforward blocks."""

    backbone: ClassVar[str] = "llama"

    vocab_size: Annotated[int, option("Tokens.", low=1)]
    d_model: Annotated[int, option("Width.", low=1)]
    n_layers: Annotated[int, option("Blocks.", low=1)]
    n_heads: Annotated[int, option("Attention heads of the queries.", low=1)]
    n_kv_heads: Annotated[int, option("Heads of keys and values; each serves n_heads / n_kv_heads of the queries.", low=1)]
    d_head: Annotated[int, option("Size of a head; even, need not be d_model / n_heads.", low=2)]
    dropout: Annotated[
        float,
        option("Rate on the embedding, each sub-block's output and before the output projection.", low=0.0, below=1.0),
    ] = 0.0
    rope_base: Annotated[float, option("Wavelengths of the rotary positions reach 2 pi times this.", low=1.0)] = 10_000.0
    norm_eps: Annotated[float, option("Added to the mean square in the norms.", low=0.0)] = 1e-5
    tied_embeddings: Annotated[bool, option("Whether the output projection is the embedding.")] = False
    ffn: FFNConfig
    """The feedforward block of every layer."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.ffn.d_model != self.d_model:
            raise UserError(
                f"`ffn.d_model` must be the model's d_model = {self.d_model}; got {self.ffn.d_model}; fix: use one for both"
            )
        require(self.d_head % 2 == 0, "d_head", "even, as positions rotate pairs", self.d_head, "add or take away 1")
        heads = f"a divisor of n_heads = {self.n_heads}"
        require(self.n_heads % self.n_kv_heads == 0, "n_kv_heads", heads, self.n_kv_heads, f"n_kv_heads={self.n_heads}")

    @property
    def n_blocks(self) -> int:
        """Layers that have parameters of their own: all."""
        return self.n_layers

    def attention_params(self) -> int:
        """Queries and output of all heads, keys and values of the shared ones."""
        return 2 * self.d_model * self.d_head * (self.n_heads + self.n_kv_heads)

    def other_params(self) -> int:
        """Everything but the feedforward blocks: embedding, output unless it is tied, attention, norms."""
        embeddings = (1 if self.tied_embeddings else 2) * self.vocab_size * self.d_model
        norms = self.d_model * (2 * self.n_layers + 1)
        return embeddings + norms + self.n_layers * self.attention_params()

    def num_params(self) -> int:
        """In closed form."""
        return self.other_params() + self.n_layers * self.ffn.num_params()

    def active_params(self) -> int:
        """Parameters that one token's prediction depends on, at most; of the embedding, all rows count."""
        return self.other_params() + self.n_layers * self.ffn.active_params()

    def to_json(self) -> dict[str, Any]:
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"backbone": self.backbone, **data, "ffn": self.ffn.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> DecoderConfig:
        """The config that `to_json` wrote.

        Raises:
            UserError: a field is unknown, missing or out of range.
        """
        fields = {key: value for key, value in data.items() if key != "backbone"}
        if "ffn" in fields:
            fields["ffn"] = config_from_json(fields["ffn"])
        return from_fields(cls, fields, owner="a decoder's config", what="model option")
