"""Training on streamed documents goes on bit by bit; reading keeps up with training."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import pytest
import torch

from sparseffn.data import TrainingStreams, load_corpus
from sparseffn.errors import UserError
from sparseffn.ffn.dense import DenseConfig
from sparseffn.models import TransformerXL, TransformerXLConfig
from sparseffn.models.presets import get_preset
from sparseffn.training import RunFolder, TrainConfig, load_run_model, train
from sparseffn.training.checkpoint import list_checkpoints
from sparseffn.training.journal import StepReport
from sparseffn.training.stepper import make_optimizer, training_losses

from .sharded import SMALL_PES2O, open_small, write_shards

MODEL = TransformerXLConfig(
    vocab_size=256,
    d_model=16,
    n_layers=2,
    n_heads=2,
    d_head=8,
    dropout=0.1,
    ffn=DenseConfig(d_model=16, n_layers=2, d_ff=32),
)
CONFIG = TrainConfig(
    steps=8, batch=4, context=32, memory=16, eval_memory=16, lr=5e-3, eval_every=4, eval_tokens=300, checkpoint_every=3
)


class Killed(Exception):
    """The run ends here."""


def losses(folder: Path) -> list[dict]:
    """Metrics without what depends on the clock."""
    return [{k: v for k, v in record.items() if k != "time_s"} for record in RunFolder(folder).read_metrics()]


def test_a_killed_run_goes_on_bit_by_bit(tmp_path: Path, cache_dir: Path) -> None:
    """Killed before the first checkpoint, and again after it: the same documents, losses and parameters."""
    corpus = open_small(SMALL_PES2O, write_shards(tmp_path / "shards", SMALL_PES2O), cache_dir)
    for when in (2, 5):

        def kill(report: StepReport, when: int = when) -> None:
            if report.step == when:
                raise Killed

        with pytest.raises(Killed):
            train(MODEL, CONFIG, corpus, tmp_path / "run", on_step=kill)
    result = train(MODEL, CONFIG, corpus, tmp_path / "run")
    whole = train(MODEL, CONFIG, corpus, tmp_path / "whole")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert (result.valid, result.test) == (whole.valid, whole.test)
    ours, theirs = (load_run_model(tmp_path / name)[0].state_dict() for name in ("run", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_seeds_of_a_run_see_other_orders(tmp_path: Path, cache_dir: Path) -> None:
    """The first loss is that of the windows of the run's seed, and would be another on those of seed 0."""
    corpus = open_small(SMALL_PES2O, write_shards(tmp_path / "shards", SMALL_PES2O), cache_dir)
    sizes, config = dataclasses.replace(MODEL, dropout=0.0), dataclasses.replace(CONFIG, steps=1, seed=1)
    train(sizes, config, corpus, tmp_path / "run")
    (step,) = (record for record in losses(tmp_path / "run") if "loss" in record)
    model = TransformerXL(sizes)
    model.init_parameters(config.seed)
    windows = [corpus.training_streams(batch=4, context=32, seed=seed).window(0) for seed in (1, 0)]
    own, other = (float(training_losses(model, *window, None, config)[0].mean().detach()) for window in windows)
    assert step["loss"] == pytest.approx(own, rel=1e-6) and own != pytest.approx(other, rel=1e-3)


def test_shards_that_are_gone_are_noticed_when_a_run_goes_on(tmp_path: Path, cache_dir: Path) -> None:
    """The corpus is another one then."""
    folder = write_shards(tmp_path / "shards", SMALL_PES2O)
    train(MODEL, CONFIG, open_small(SMALL_PES2O, folder, cache_dir), tmp_path / "run")
    assert list_checkpoints(tmp_path / "run" / "checkpoints")
    (folder / SMALL_PES2O.train.format(1)).unlink()
    with pytest.raises(UserError, match="`out` must be a new folder or one of the same config"):
        train(MODEL, dataclasses.replace(CONFIG), open_small(SMALL_PES2O, folder, cache_dir), tmp_path / "run")


def train_steps(streams: TrainingStreams, model: TransformerXL, config: TrainConfig, n_steps: int) -> float:
    """Median seconds of training on a window."""
    optimizer = make_optimizer(model.train(), config)
    training, memory = [], None
    for i in range(n_steps):
        inputs, targets = streams.window(i)
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        losses, balance, memory = training_losses(model, inputs, targets, memory, config)
        (losses.mean() + balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        training.append(time.perf_counter() - start)
    return sorted(training)[n_steps // 2]


def read_windows(streams: TrainingStreams, n_windows: int) -> float:
    """Mean seconds of a window once the first has filled the buffer, which a run does once; documents come in blocks."""
    streams.window(0)
    start = time.perf_counter()
    for i in range(1, n_windows):
        streams.window(i)
    return (time.perf_counter() - start) / (n_windows - 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["stored-bytes", "streamed-bpe"])
def test_reading_costs_under_two_percent_of_a_step(tmp_path: Path, cache_dir: Path, kind: str) -> None:
    """Of the preset `tiny`; both in one run, reading the best of three passes, as other load on the machine only adds."""
    if kind == "stored-bytes":
        corpus = load_corpus("stdlib")
    else:
        pytest.importorskip("sentencepiece")
        corpus = open_small(SMALL_PES2O, write_shards(tmp_path / "shards", SMALL_PES2O, n_documents=2000), cache_dir, "bpe")
    preset = get_preset("tiny")
    ffn = DenseConfig.from_shape(preset.shape)
    model = TransformerXL(preset.model(ffn, corpus.tokenizer.vocab_size))
    model.init_parameters(0)
    config = TrainConfig(steps=100, batch=preset.batch, context=preset.context, memory=preset.memory, clip=preset.clip)

    def streams(seed: int) -> TrainingStreams:
        return corpus.training_streams(batch=config.batch, context=config.context, seed=seed)

    training = train_steps(streams(0), model, config, n_steps=20)
    reading = min(read_windows(streams(seed), n_windows=120) for seed in range(3))
    assert reading < 0.02 * training, f"{1e3 * reading:.2f} ms of {1e3 * training:.1f} ms"
