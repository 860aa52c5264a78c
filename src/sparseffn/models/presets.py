"""Named sizes: the paper's four models, one that trains on a laptop, and one for a demonstration of minutes.

Published sizes are tables 8 and 9 of arXiv 2310.10837. A preset holds everything that a comparison shares: the model outside
its feedforward blocks, the block to be matched, and the training settings.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

from sparseffn.errors import unknown_name
from sparseffn.ffn import BlockShape, FFNConfig
from sparseffn.ffn.block_config import GatedConfig
from sparseffn.models.backbones import Backbone, ModelConfig
from sparseffn.models.decoder_config import DecoderConfig
from sparseffn.models.model_config import TransformerXLConfig

Config = TypeVar("Config", bound=FFNConfig)


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Sizes and settings under one name; defaults are the paper's."""

    name: str
    doc: str
    shape: BlockShape
    """The dense block, and the mixtures' experts."""
    n_heads: int
    d_head: int
    context: int
    batch: int
    lr: float = 2.5e-4
    warmup: int = 0
    clip: float = 0.25
    steps: int = 100_000
    eval_batch: int = 8
    backbone: Backbone = "transformer-xl"
    """The model around the feedforward blocks; the paper's is the Transformer-XL."""

    @property
    def memory(self) -> int:
        """In training: one context; a decoder has none."""
        return self.context if self.backbone == "transformer-xl" else 0

    @property
    def eval_memory(self) -> int:
        """In evaluation: four contexts; a decoder has none."""
        return 4 * self.memory

    def within(self, backbone: Backbone) -> Preset:
        """The same sizes around another model."""
        return replace(self, backbone=backbone)

    def block(self, config_class: type[Config]) -> Config:
        """A method's block at the preset's sizes, before parameters are matched.

        In Llama's decoder it is gated by SiLU, as Llama's own is, if it can be gated; with the same number of pairs, of three
        vectors each.
        """
        config = config_class.from_shape(self.shape)
        gated = self.backbone == "llama" and issubclass(config_class, GatedConfig)
        return config.replace(gated=True, activation="silu") if gated else config

    def model(self, ffn: FFNConfig, vocab_size: int) -> ModelConfig:
        """The model with a given feedforward block."""
        return self._decoder(ffn, vocab_size) if self.backbone == "llama" else self.transformer_xl(ffn, vocab_size)

    def transformer_xl(self, ffn: FFNConfig, vocab_size: int) -> TransformerXLConfig:
        """The Transformer-XL with a given feedforward block."""
        return TransformerXLConfig(
            vocab_size=vocab_size,
            d_model=self.shape.d_model,
            n_layers=self.shape.n_layers,
            n_heads=self.n_heads,
            d_head=self.d_head,
            dropout=self.shape.dropout,
            ffn=ffn,
        )

    def _decoder(self, ffn: FFNConfig, vocab_size: int) -> DecoderConfig:
        """As many heads, each of an even size, of which two share keys and values."""
        return DecoderConfig(
            vocab_size=vocab_size,
            d_model=self.shape.d_model,
            n_layers=self.shape.n_layers,
            n_heads=self.n_heads,
            n_kv_heads=self.n_heads // 2 if self.n_heads % 2 == 0 else self.n_heads,
            d_head=self.d_head + self.d_head % 2,
            dropout=self.shape.dropout,
            ffn=ffn,
        )


_TINY = Preset(
    name="tiny",
    doc="demonstration: 2 layers of width 128, d_ff 2048, 256 active channels; minutes on 2 cores",
    # d_ff = 16 d_model, so that the feedforward block is most of the model, and 256 active channels, since the paper finds
    # that fewer hurt.
    shape=BlockShape(d_model=128, d_ff=2048, n_experts=16, expert_size=128, k=2, n_layers=2),
    n_heads=4,
    d_head=32,
    context=128,
    batch=16,
    # Chosen among 1, 2, 4 and 8 e-3 on the validation split with the dense model (300 steps: 3.18, 3.13, 3.10, 3.15 bits per
    # byte).
    lr=4e-3,
    warmup=50,
    steps=1000,
    eval_batch=16,
)
_SMALL = Preset(
    name="small",
    doc="hours on a laptop: 6 layers of width 256, d_ff 2053, about 8M parameters",
    shape=BlockShape(d_model=256, d_ff=2053, n_experts=16, expert_size=128, k=4, n_layers=6, dropout=0.1),
    n_heads=8,
    d_head=32,
    context=256,
    batch=16,
    lr=1e-3,
    warmup=200,
    steps=10_000,
)
_WT_S = Preset(
    name="wt-s",
    doc="WikiText-103, 47M (paper)",
    shape=BlockShape(d_model=412, d_ff=2053, n_experts=16, expert_size=128, k=4, n_layers=16, dropout=0.1),
    n_heads=10,
    d_head=41,
    context=256,
    batch=64,
)
_WT_S_STAR = replace(
    _WT_S,
    name="wt-s-star",
    doc="WikiText-103, 47M with the feedforward blocks scaled up to 238M (paper)",
    shape=replace(_WT_S.shape, d_ff=16480, n_experts=128, expert_dropout=0.05),
)
_WT_B = Preset(
    name="wt-b",
    doc="WikiText-103, 262M (paper)",
    shape=BlockShape(d_model=1024, d_ff=4110, n_experts=32, expert_size=128, k=4, n_layers=18, dropout=0.2, expert_dropout=0.2),
    n_heads=16,
    d_head=64,
    context=512,
    batch=64,
    warmup=4000,
)
_E8 = Preset(
    name="e8",
    doc="enwik8, 41M (paper)",
    shape=BlockShape(
        d_model=512,
        d_ff=2053,
        n_experts=16,
        expert_size=128,
        k=4,
        n_layers=12,
        dropout=0.1,
        expert_dropout=0.05,
        entropy_weight=1e-4,
    ),
    n_heads=8,
    d_head=64,
    context=512,
    batch=32,
)

PRESETS = {preset.name: preset for preset in (_TINY, _SMALL, _WT_S, _WT_S_STAR, _WT_B, _E8)}


def get_preset(name: str) -> Preset:
    """A preset by name; hyphens and underscores are the same.

    Raises:
        UserError: there is no such preset.
    """
    wanted = name.replace("_", "-")
    if wanted not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    return PRESETS[wanted]
