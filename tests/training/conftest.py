"""A small corpus and a small model."""

from __future__ import annotations

from pathlib import Path

import pytest
from song_text import TEXT

from sparseffn.data import Corpus, load_corpus
from sparseffn.ffn.sigma_moe import SigmaMoEConfig
from sparseffn.models import TransformerXLConfig
from sparseffn.training import TrainConfig


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """A song, 20 kB of bytes."""
    folder: Path = tmp_path_factory.mktemp("text")
    (folder / "song.txt").write_text(TEXT)
    return load_corpus("text", data_dir=folder / "song.txt", cache_dir=folder / "cache")


@pytest.fixture
def model() -> TransformerXLConfig:
    """A sigma-MoE model with every kind of randomness."""
    ffn = SigmaMoEConfig(d_model=16, n_experts=4, expert_size=8, k=2, expert_dropout=0.1, dropout=0.1)
    return TransformerXLConfig(vocab_size=256, d_model=16, n_layers=2, n_heads=2, d_head=8, dropout=0.1, ffn=ffn)


@pytest.fixture
def config() -> TrainConfig:
    """Twelve steps, a checkpoint every five, two micro-batches."""
    return TrainConfig(
        steps=12,
        batch=4,
        context=16,
        memory=16,
        eval_memory=32,
        lr=5e-3,
        warmup=2,
        accumulation=2,
        eval_every=6,
        eval_tokens=500,
        checkpoint_every=5,
    )
