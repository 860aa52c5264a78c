"""Training: continuation bit by bit, refusals, schedules."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from song_text import TEXT

import sparseffn.training.loop as loop
import sparseffn.training.stepper as stepping
from sparseffn.cli import main
from sparseffn.data import Corpus, load_corpus
from sparseffn.errors import UserError
from sparseffn.ffn.dense import DenseConfig
from sparseffn.models import TransformerXL, TransformerXLConfig
from sparseffn.models.presets import get_preset
from sparseffn.storage import write_json
from sparseffn.training import NonFiniteLossError, RunFolder, TrainConfig, from_preset, load_run_model, train
from sparseffn.training.snapshots import list_snapshots


def losses(folder: Path) -> list[dict[str, Any]]:
    """Metrics without what depends on the clock."""
    return [{k: v for k, v in record.items() if k != "time_s"} for record in RunFolder(folder).read_metrics()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Parameters of the last checkpoint."""
    return load_run_model(folder)[0].state_dict()


@pytest.mark.parametrize("when", ["3", "8", "saving"])
def test_killed_run_continues_bit_by_bit(when: str, tmp_path: Path, model: TransformerXLConfig, config: TrainConfig) -> None:
    """SIGKILL before the first checkpoint, between two, and while one is written."""
    (tmp_path / "song.txt").write_text(TEXT)
    write_json(tmp_path / "run.json", {"model": model.to_json(), "train": config.to_json()})
    script = str(Path(__file__).parent / "killed_run.py")
    paths = [str(tmp_path / name) for name in ("run", "song.txt", "cache")]
    killed = subprocess.run([sys.executable, script, *paths, when], check=False)
    assert killed.returncode == -signal.SIGKILL
    corpus = load_corpus("text", data_dir=tmp_path / "song.txt", cache_dir=tmp_path / "cache")
    result = train(model, config, corpus, tmp_path / "run")
    whole = train(model, config, corpus, tmp_path / "whole")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert (result.valid, result.test) == (whole.valid, whole.test)
    ours, theirs = weights(tmp_path / "run"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    ours, theirs = ({p.name: p.read_bytes() for p in (tmp_path / n / "routing").iterdir()} for n in ("run", "whole"))
    assert list(list_snapshots(tmp_path / "whole")) == [0, 6, 12] and ours == theirs


def test_training_lowers_the_loss_and_reports_both_losses_apart(
    tmp_path: Path, corpus: Corpus, model: TransformerXLConfig, config: TrainConfig
) -> None:
    """Cross-entropy falls; the balancing loss stands beside it."""
    train(model, dataclasses.replace(config, steps=40), corpus, tmp_path / "run")
    steps = [r for r in losses(tmp_path / "run") if "loss" in r]
    assert steps[-1]["loss"] < 0.8 * steps[0]["loss"]
    assert all(-0.01 < r["balance_loss"] < 0 for r in steps)


def test_finished_run_returns_its_result_at_once(
    tmp_path: Path, corpus: Corpus, model: TransformerXLConfig, config: TrainConfig
) -> None:
    """No step is taken again."""
    first = train(model, config, corpus, tmp_path / "run")
    before = losses(tmp_path / "run")
    assert train(model, config, corpus, tmp_path / "run") == first
    assert losses(tmp_path / "run") == before


def test_non_finite_loss_stops_before_the_step(
    tmp_path: Path, corpus: Corpus, model: TransformerXLConfig, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message names the step and the last good checkpoint."""
    honest, calls = stepping.token_losses, [0]

    def poisoned(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return honest(logits, targets) * (torch.nan if calls[0] > 14 else 1.0)

    monkeypatch.setattr(stepping, "token_losses", poisoned)
    with pytest.raises(NonFiniteLossError, match=r"at step 8, which was not taken.*step-00000005"):
        train(model, config, corpus, tmp_path / "run")
    assert max(r["step"] for r in losses(tmp_path / "run")) == 7


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_steps_read_together_are_the_steps_read_one_by_one(
    precision: Any,
    tmp_path: Path,
    corpus: Corpus,
    model: TransformerXLConfig,
    config: TrainConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Same metrics, one line a step, same parameters."""
    config = dataclasses.replace(config, precision=precision)
    train(model, config, corpus, tmp_path / "singly")
    monkeypatch.setitem(loop.READ_EVERY, "cpu", 4)
    train(model, config, corpus, tmp_path / "together")
    assert losses(tmp_path / "together") == losses(tmp_path / "singly")
    ours, theirs = weights(tmp_path / "together"), weights(tmp_path / "singly")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_step_that_is_not_finite_changes_no_parameter_before_it_is_read(
    corpus: Corpus, model: TransformerXLConfig, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The optimiser leaves it out, moments and count of steps included."""
    net = TransformerXL(model)
    stepper = stepping.Stepper(net, config)
    window = corpus.training_streams(batch=config.batch, context=config.context).window(0)
    assert stepping.read_steps([stepper.take(*window, lr=0.1)], config)[0].finite
    before = [t.clone() for t in (*net.parameters(), *(t for s in stepper.optimizer.state.values() for t in s.values()))]
    honest = stepping.token_losses
    monkeypatch.setattr(stepping, "token_losses", lambda logits, targets: honest(logits, targets) * torch.inf)
    assert not stepping.read_steps([stepper.take(*window, lr=0.1)], config)[0].finite
    after = [*net.parameters(), *(t for s in stepper.optimizer.state.values() for t in s.values())]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_float16_goes_on_bit_by_bit_with_its_scale(
    tmp_path: Path, corpus: Corpus, model: TransformerXLConfig, config: TrainConfig
) -> None:
    """A run that stops takes up the scale that it had."""
    config = dataclasses.replace(config, precision="float16")

    def stop(report: Any) -> None:
        if report.step == 7:
            raise KeyboardInterrupt

    whole = train(model, config, corpus, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(model, config, corpus, tmp_path / "run", on_step=stop)
    assert train(model, config, corpus, tmp_path / "run").test == whole.test
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    scales = [record["loss_scale"] for record in losses(tmp_path / "whole") if "loss_scale" in record]
    assert len(scales) == config.steps and scales[0] == 2.0**16


def test_an_assertion_of_the_device_is_explained(
    tmp_path: Path, corpus: Corpus, model: TransformerXLConfig, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU it is what NaN in a router comes to; any other error of the device is left as it is."""
    honest, calls = stepping.read_steps, [0]

    def assertion(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 7:
            raise torch.AcceleratorError("CUDA error: device-side assert triggered")
        return honest(*args)

    monkeypatch.setattr(loop, "read_steps", assertion)
    with pytest.raises(UserError, match=r"assertion at step 7 to 8.*Last good checkpoint: .*step-00000005"):
        train(model, config, corpus, tmp_path / "run")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you"),
    ],
    ids=["gpu", "python", "cpu"],
)
def test_no_memory_is_explained(
    error: Exception,
    tmp_path: Path,
    corpus: Corpus,
    model: TransformerXLConfig,
    config: TrainConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With what was asked for and what would need less; another error of PyTorch's is left as it is."""

    def fails(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(loop, "read_steps", fails)
    with pytest.raises(
        UserError,
        match=r"after step 1, with 2 streams of 16 tokens and .* planned to take 4\d\d\.\d\d KiB, and [\d.,]+ GiB are there; "
        r"fix: --accumulation 4 \(the batch in parts of 1, planned 3\d\d\.\d\d KiB\) in a new --out",
    ):
        train(model, config, corpus, tmp_path / "run")
    error = RuntimeError("something else")
    with pytest.raises(RuntimeError, match="something else"):
        train(model, config, corpus, tmp_path / "run")


def test_scaled_gradients_that_overflow_are_no_failure_until_the_scale_is_1() -> None:
    """What float16 cannot hold at a scale is tried at half of it."""
    assert stepping.StepNumbers(2.0, 0.0, float("inf"), 4.0).overflowed
    assert not stepping.StepNumbers(2.0, 0.0, float("inf"), 1.0).overflowed
    assert not stepping.StepNumbers(float("nan"), 0.0, float("nan"), 4.0).overflowed


def test_learning_rate_warms_up_and_decays_to_zero(config: TrainConfig) -> None:
    """Linear, then a cosine."""
    c = dataclasses.replace(config, steps=102, warmup=2, lr=1.0)
    assert [c.lr_at(0), c.lr_at(1), c.lr_at(52), c.lr_at(102)] == pytest.approx([0.5, 1.0, 0.5, 0.0])


def test_python_callers_are_told_of_micro_batches_too(
    tmp_path: Path, corpus: Corpus, model: TransformerXLConfig, config: TrainConfig, caplog: pytest.LogCaptureFixture
) -> None:
    """In the log once, and in the result each time."""
    first, again = (train(model, config, corpus, tmp_path / "run") for _ in range(2))
    assert first.notes == again.notes == (caplog.records[0].message,) and len(caplog.records) == 1
    assert "micro-batch of 2 streams" in first.notes[0]


def test_accumulation_equals_the_whole_batch(tmp_path: Path, corpus: Corpus, config: TrainConfig) -> None:
    """For a dense model without dropout, to rounding."""
    ffn = DenseConfig(d_model=16, d_ff=32)
    model = TransformerXLConfig(vocab_size=256, d_model=16, n_layers=1, n_heads=2, d_head=8, ffn=ffn)
    whole = train(model, dataclasses.replace(config, accumulation=1), corpus, tmp_path / "whole")
    parts = train(model, config, corpus, tmp_path / "parts")
    assert parts.valid == pytest.approx(whole.valid, rel=1e-3)


def test_bfloat16_and_adamw_run(tmp_path: Path, corpus: Corpus, model: TransformerXLConfig, config: TrainConfig) -> None:
    """Autocast and decoupled weight decay give finite losses that differ from float32 and Adam."""
    plain = train(model, config, corpus, tmp_path / "plain")
    other = dataclasses.replace(config, precision="bfloat16", optimizer="adamw", weight_decay=0.1)
    assert train(model, other, corpus, tmp_path / "other").valid != plain.valid


def test_constant_balancing_loss_is_complained_of(model: TransformerXLConfig) -> None:
    """A method with a weight whose loss reaches nothing."""
    with pytest.raises(UserError, match="must depend on the parameters"):
        stepping.check_balance(TransformerXL(model), torch.zeros(()))


def test_settings_of_a_preset_follow_its_length() -> None:
    """A tenth of the steps bounds the warm-up, twelve points are on the curve; any field may be set."""
    config = from_preset(get_preset("small"), steps=300, seed=3)
    assert (config.steps, config.seed, config.warmup, config.eval_every, config.checkpoint_every) == (300, 3, 30, 25, 50)
    assert (config.eval_tokens, config.eval_memory, config.lr) == (8192, 1024, 1e-3)
    whole = from_preset(get_preset("small"), optimizer="adamw", warmup=7)
    assert (whole.steps, whole.optimizer, whole.warmup) == (10_000, "adamw", 7)
    with pytest.raises(UserError, match="unknown training option 'weight_deacy'; fix: did you mean 'weight_decay'"):
        from_preset(get_preset("small"), weight_deacy=0.1)


def test_train_and_compare_train_one_model(tmp_path: Path) -> None:
    """Of the same settings: config, every loss and every parameter are equal."""
    (tmp_path / "song.txt").write_text(TEXT)
    words = ["--corpus", "text", "--data-dir", str(tmp_path / "song.txt"), "--steps", "14", "--batch", "2", "--context", "8"]
    words += ["--device", "cpu"]
    assert main(["train", "--method", "sigma-moe", *words, "--out", str(tmp_path / "train")]) == 0
    assert main(["compare", "--methods", "sigma-moe", *words, "--out", str(tmp_path / "compare")]) == 0
    ours, theirs = tmp_path / "train", tmp_path / "compare" / "runs" / "sigma-moe" / "seed-0"
    assert (ours / "config.json").read_text() == (theirs / "config.json").read_text()
    assert losses(ours) == losses(theirs)
    assert all(map(torch.equal, weights(ours).values(), weights(theirs).values()))
