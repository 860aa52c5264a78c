"""Small finished runs of a mixture and of the dense block, on a song."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparseffn.data import Corpus, load_corpus
from sparseffn.ffn.dense import DenseConfig
from sparseffn.ffn.sigma_moe import SigmaMoEConfig
from sparseffn.models import TransformerXLConfig
from sparseffn.training import TrainConfig, train


@pytest.fixture(scope="session")
def song(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 20 kB."""
    path = tmp_path_factory.mktemp("song") / "song.txt"
    path.write_text("".join(f"{i} bottles of beer on the wall, {i} bottles of beer\n" for i in range(400)))
    return path


@pytest.fixture(scope="session")
def corpus(song: Path) -> Corpus:
    """Its bytes."""
    return load_corpus("text", data_dir=song, cache_dir=song.parent / "cache")


@pytest.fixture(scope="session")
def runs(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Twelve steps of each, evaluated every four."""
    folder = tmp_path_factory.mktemp("runs")
    blocks = {
        "sigma-moe": SigmaMoEConfig(d_model=16, n_experts=4, expert_size=8, k=2),
        "dense": DenseConfig(d_model=16, d_ff=32),
    }
    config = TrainConfig(
        steps=12,
        batch=4,
        context=16,
        memory=16,
        eval_memory=32,
        eval_batch=3,
        lr=5e-3,
        eval_every=4,
        eval_tokens=200,
        checkpoint_every=5,
    )
    for name, ffn in blocks.items():
        model = TransformerXLConfig(vocab_size=256, d_model=16, n_layers=2, n_heads=2, d_head=8, ffn=ffn)
        train(model, config, corpus, folder / name)
    return {name: folder / name for name in blocks}
