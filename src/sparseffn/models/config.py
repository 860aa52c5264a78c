"""Sizes of the Transformer-XL language model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparseffn.errors import UserError, unknown_name
from sparseffn.ffn import FFNConfig, config_from_json


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerXLConfig:
    """A model is its sizes and the config of its feedforward blocks; the memory's length is an argument of `forward`."""

    vocab_size: int
    """Tokens."""
    d_model: int
    """Width."""
    n_layers: int
    """Blocks."""
    n_heads: int
    """Attention heads."""
    d_head: int
    """Size of a head; need not be d_model / n_heads."""
    dropout: float = 0.0
    """Rate on the embedding, on each sub-block's output and before the output projection."""
    ffn: FFNConfig
    """The feedforward block of every layer."""
    shared_layers: bool = False
    """Whether all layers are one layer, applied n_layers times (Universal Transformer, Dehghani 2019, arXiv 1807.03819)."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "n_layers", "n_heads", "d_head"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UserError(f"`{name}` must be an integer of at least 1; got {value!r}; fix: pass a positive integer")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"`dropout` must be at least 0 and below 1; got {self.dropout!r}; fix: 0 switches it off")
        if not isinstance(self.shared_layers, bool):
            raise UserError(f"`shared_layers` must be true or false; got {self.shared_layers!r}; fix: leave it out for false")
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
        """All parameters, in closed form."""
        return self.other_params() + self.n_blocks * self.ffn.num_params()

    def active_params(self) -> int:
        """Parameters that one token's prediction depends on, at most; of the embedding, all rows count."""
        # A shared block may select other parameters each time, but no more than it has.
        blocks = min(self.n_layers * self.ffn.active_params(), self.n_blocks * self.ffn.num_params())
        return self.other_params() + blocks

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict that `from_json` reads back."""
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
        names = [f.name for f in dataclasses.fields(cls)]
        for key in data:
            if key not in names:
                raise unknown_name("model option", key, names)
        missing = [name for name in names if name not in data and name not in ("dropout", "shared_layers")]
        if missing:
            raise UserError(f"a model config needs {', '.join(missing)}; got {', '.join(data)}; fix: add them")
        return cls(**{**data, "ffn": config_from_json(data["ffn"])})
