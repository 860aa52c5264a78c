"""Sizes of the Transformer-XL language model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from sparseffn.errors import UserError
from sparseffn.ffn import FFNConfig, config_from_json, option
from sparseffn.ffn.options import check_fields, from_fields


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerXLConfig:
    """A model is its sizes and the config of its feedforward blocks; the memory's length is an argument of `forward`."""

    vocab_size: Annotated[int, option("Tokens.", low=1)]
    d_model: Annotated[int, option("Width.", low=1)]
    n_layers: Annotated[int, option("Blocks.", low=1)]
    n_heads: Annotated[int, option("Attention heads.", low=1)]
    d_head: Annotated[int, option("Size of a head; need not be d_model / n_heads.", low=1)]
    dropout: Annotated[
        float,
        option("Rate on the embedding, each sub-block's output and before the output projection.", low=0.0, below=1.0),
    ] = 0.0
    ffn: FFNConfig
    """The feedforward block of every layer."""
    shared_layers: Annotated[
        bool, option("Whether all layers are one layer, applied n_layers times (Universal Transformer, arXiv 1807.03819).")
    ] = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.ffn.d_model != self.d_model:
            raise UserError(
                f"`ffn.d_model` must be the model's d_model = {self.d_model}; got {self.ffn.d_model}; fix: use one for both"
            )

    @property
    def n_blocks(self) -> int:
        """Layers that have parameters of their own."""
        return 1 if self.shared_layers else self.n_layers

    def attention_params(self) -> int:
        """Five projections, two biases a head, and the scale."""
        width = self.n_heads * self.d_head
        return 5 * self.d_model * width + 2 * width + 1

    def other_params(self) -> int:
        """Everything but the feedforward blocks: embedding, output with bias, attention, layer norms."""
        embeddings = 2 * self.vocab_size * self.d_model + self.vocab_size
        norms = 2 * self.d_model * (2 * self.n_blocks + 1)
        return embeddings + norms + self.n_blocks * self.attention_params()

    def num_params(self) -> int:
        """In closed form."""
        return self.other_params() + self.n_blocks * self.ffn.num_params()

    def active_params(self) -> int:
        """Parameters that one token's prediction depends on, at most; of the embedding, all rows count."""
        # A shared block may select other parameters each time, but no more than it has.
        blocks = min(self.n_layers * self.ffn.active_params(), self.n_blocks * self.ffn.num_params())
        return self.other_params() + blocks

    def to_json(self) -> dict[str, Any]:
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        # Left out where it says nothing: the files of models that were written before there was a choice stay theirs.
        if not self.shared_layers:
            del data["shared_layers"]
        return {**data, "ffn": self.ffn.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TransformerXLConfig:
        """The config that `to_json` wrote.

        Raises:
            UserError: a field is unknown, missing or out of range.
        """
        fields = {**data, "ffn": config_from_json(data["ffn"])} if "ffn" in data else data
        return from_fields(cls, fields, owner="a model config", what="model option")
