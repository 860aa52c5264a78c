"""Training: continuation bit by bit, refusals, schedules."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from song_text import TEXT

import sparseffn
import sparseffn.training.loop as loop
import sparseffn.training.step as step
from sparseffn.data import Corpus, load_corpus
from sparseffn.errors import UserError
from sparseffn.evaluation import evaluate
from sparseffn.ffn.dense import DenseConfig
from sparseffn.models import TransformerXL, TransformerXLConfig
from sparseffn.models.presets import get_preset
from sparseffn.storage import cpu_name, digest_of, json_digest, sources_digest, write_json
from sparseffn.training import NonFiniteLossError, RunFolder, TrainConfig, from_preset, load_run_corpus, load_run_model, train
from sparseffn.training.checkpoint import list_checkpoints
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


def test_tokenizer_of_a_run_is_whole_or_absent(
    tmp_path: Path, corpus: Corpus, model: TransformerXLConfig, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interruption while it is written leaves none, and the same call goes on."""
    replace = Path.replace

    def interrupted(self: Path, target: Path) -> Path:
        if Path(target).name == "tokenizer.json":
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(model, config, corpus, tmp_path / "run")
    assert not (tmp_path / "run" / "tokenizer.json").exists()
    train(model, config, corpus, tmp_path / "run")
    assert (tmp_path / "run" / "tokenizer.json").read_text() == corpus.tokenizer.to_json()


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


def test_run_says_which_code_made_it_and_goes_on_with_other_code(
    tmp_path: Path, corpus: Corpus, model: TransformerXLConfig, config: TrainConfig
) -> None:
    """Outside its identity; the digest follows every file's name and contents."""
    train(model, config, corpus, tmp_path / "run")
    path = tmp_path / "run" / "environment.json"
    made = json.loads(path.read_text())
    assert made["sources"] == sources_digest(Path(sparseffn.__file__).parent)
    assert "sources" not in (tmp_path / "run" / "config.json").read_text()
    write_json(path, {**made, "sources": "of other code"})
    (tmp_path / "run" / "result.json").unlink()
    assert train(model, config, corpus, tmp_path / "run").steps == 12
    assert json.loads(path.read_text())["sources"] == "of other code"
    digests = set()
    for number, (name, text) in enumerate([("a.py", "1"), ("a.py", "2"), ("b.py", "1"), ("a.cpp", "1"), ("a.txt", "1")]):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / name).write_text(text)
        digests.add(sources_digest(tmp_path / str(number)))
    assert len(digests) == 5 and sources_digest(tmp_path / "4") == digest_of()


def test_folder_of_another_config_is_refused_and_left_alone(
    tmp_path: Path, corpus: Corpus, model: TransformerXLConfig, config: TrainConfig
) -> None:
    """The difference is named."""
    train(model, config, corpus, tmp_path / "run")
    files = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=r"train\.lr is 0\.005, not 0\.1"):
        train(model, dataclasses.replace(config, lr=0.1), corpus, tmp_path / "run")
    assert files == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_damaged_checkpoint_is_refused_and_the_one_before_serves(
    damage: str, tmp_path: Path, corpus: Corpus, model: TransformerXLConfig, config: TrainConfig
) -> None:
    """The error says which folder to remove; then the run goes on."""
    train(model, config, corpus, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    last = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    state = last / "state.safetensors"
    data = state.read_bytes()
    state.unlink()
    if damage != "missing":
        state.write_bytes(data[:-100] if damage == "truncated" else data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(UserError, match=f"fix: remove .*{last.name} to go on"):
        train(model, config, corpus, tmp_path / "run")
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    assert train(model, config, corpus, tmp_path / "run").steps == 12


def test_checkpoints_hold_no_pickle(tmp_path: Path, corpus: Corpus, model: TransformerXLConfig, config: TrainConfig) -> None:
    """Two are kept, of safetensors and JSON."""
    train(model, config, corpus, tmp_path / "run")
    kept = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert [p.name for p in kept] == ["step-00000010", "step-00000012"]
    assert {f.suffix for p in kept for f in p.iterdir()} == {".safetensors", ".json"}


def test_non_finite_loss_stops_before_the_step(
    tmp_path: Path, corpus: Corpus, model: TransformerXLConfig, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message names the step and the last good checkpoint."""
    honest, calls = step.token_losses, [0]

    def poisoned(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return honest(logits, targets) * (torch.nan if calls[0] > 14 else 1.0)

    monkeypatch.setattr(step, "token_losses", poisoned)
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
    stepper = step.Stepper(net, config)
    window = corpus.training_streams(batch=config.batch, context=config.context).window(0)
    assert step.read_steps([stepper.take(*window, lr=0.1)], config)[0].finite
    before = [t.clone() for t in (*net.parameters(), *(t for s in stepper.optimizer.state.values() for t in s.values()))]
    honest = step.token_losses
    monkeypatch.setattr(step, "token_losses", lambda logits, targets: honest(logits, targets) * torch.inf)
    assert not step.read_steps([stepper.take(*window, lr=0.1)], config)[0].finite
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
    honest, calls = step.read_steps, [0]

    def assertion(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 7:
            raise torch.AcceleratorError("CUDA error: device-side assert triggered")
        return honest(*args)

    monkeypatch.setattr(loop, "read_steps", assertion)
    with pytest.raises(UserError, match=r"assertion at step 7 to 8.*Last good checkpoint: .*step-00000005"):
        train(model, config, corpus, tmp_path / "run")


def test_scaled_gradients_that_overflow_are_no_failure_until_the_scale_is_1() -> None:
    """What float16 cannot hold at a scale is tried at half of it."""
    assert step.StepNumbers(2.0, 0.0, float("inf"), 4.0).overflowed
    assert not step.StepNumbers(2.0, 0.0, float("inf"), 1.0).overflowed
    assert not step.StepNumbers(float("nan"), 0.0, float("nan"), 4.0).overflowed


def test_metrics_say_on_which_device_steps_were_taken(
    tmp_path: Path, corpus: Corpus, model: TransformerXLConfig, config: TrainConfig
) -> None:
    """A line where a run starts and where it comes to another device; readers of losses do not see it."""
    train(model, config, corpus, tmp_path / "run", device="cpu")
    folder = RunFolder(tmp_path / "run")
    for step_, device in ((12, "cpu"), (12, "Some GPU"), (13, "Some GPU"), (14, "cpu")):
        folder.note_device(step_, device)
    lines = [json.loads(line) for line in folder.metrics_path.read_text().splitlines()]
    devices = [(line["step"], line["device"]) for line in lines if "device" in line]
    assert devices == [(0, "cpu"), (12, "Some GPU"), (14, "cpu")]
    assert all("device" not in record for record in folder.read_metrics())
    with pytest.raises(UserError, match="`--device` must be auto, cpu"):
        train(model, config, corpus, tmp_path / "other", device="gpu")
    assert not (tmp_path / "other").exists()


def test_a_checkpoint_of_version_0_1_is_gone_on_from(
    tmp_path: Path, corpus: Corpus, model: TransformerXLConfig, config: TrainConfig
) -> None:
    """Of format 2, without a scaler, beside metrics without devices."""
    whole = train(model, config, corpus, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    folder.result_path.unlink()
    for path in list_checkpoints(folder.checkpoints):
        manifest = json.loads((path / "checkpoint.json").read_text())
        del manifest["extra"]["scaler"], manifest["manifest_digest"]
        write_json(path / "checkpoint.json", {**manifest, "manifest_digest": json_digest(manifest)})
    folder.metrics_path.write_text("".join(json.dumps(r) + "\n" for r in folder.read_metrics()))
    assert train(model, config, corpus, folder.path).test == whole.test


def test_a_run_knows_its_corpus(tmp_path: Path, model: TransformerXLConfig, config: TrainConfig) -> None:
    """Where it was and how it was cut into tokens; a text that moved needs its new place, another one is refused."""
    place = tmp_path / "song.txt"
    place.write_text(TEXT)
    corpus = load_corpus("text", data_dir=place, cache_dir=tmp_path / "cache")
    train(model, config, corpus, tmp_path / "run")
    assert load_run_corpus(tmp_path / "run").digest == corpus.digest
    place.rename(tmp_path / "moved.txt")
    with pytest.raises(UserError, match=re.escape(str(place))):
        load_run_corpus(tmp_path / "run")
    assert load_run_corpus(tmp_path / "run", data_dir=tmp_path / "moved.txt").digest == corpus.digest
    (tmp_path / "run" / "corpus.json").unlink()
    assert load_run_corpus(tmp_path / "run", data_dir=tmp_path / "moved.txt").digest == corpus.digest
    place.write_text(TEXT.replace("beer", "milk"))
    with pytest.raises(UserError, match="the corpus must be the run's"):
        load_run_corpus(tmp_path / "run", data_dir=place)


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
        step.check_balance(TransformerXL(model), torch.zeros(()))


def test_evaluation_predicts_every_token_but_the_first_once(corpus: Corpus, model: TransformerXLConfig) -> None:
    """Whatever the windows; with one stream the loss is that of one long text."""
    net = TransformerXL(model).train()
    tokens = corpus.valid[:200]
    for batch, context in ((1, 7), (3, 16), (8, 50)):
        assert evaluate(net, tokens, batch=batch, context=context, memory=64).n_predictions == 199
    assert net.training
    text = torch.from_numpy(tokens.astype("int64"))[None]
    with torch.no_grad():
        logits = net.eval()(text[:, :-1]).logits
    whole = float(torch.nn.functional.cross_entropy(logits[0], text[0, 1:]))
    got = evaluate(net, tokens, batch=1, context=16, memory=256).nats_per_token
    assert got == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("n_tokens", [190, 191, 210], ids=["even", "narrow-last", "uneven"])
def test_window_losses_follow_the_text(corpus: Corpus, model: TransformerXLConfig, n_tokens: int) -> None:
    """Stream by stream, as if each were a text of its own; rows that end early have no window more."""
    net = TransformerXL(model)
    net.init_parameters(0)
    tokens = corpus.valid[:n_tokens]
    bounds = np.cumsum([0, *(len(part) for part in np.array_split(np.arange(n_tokens - 1), 3))])
    alone = [
        evaluate(net, tokens[start : stop + 1], batch=1, context=21, memory=32).window_nats
        for start, stop in itertools.pairwise(bounds)
    ]
    together = evaluate(net, tokens, batch=3, context=21, memory=32).window_nats
    assert together == pytest.approx(np.concatenate(alone), rel=1e-5)


def test_processor_is_told_from_its_namesakes(tmp_path: Path) -> None:
    """By family and model, where Linux says them."""
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: Some CPU\nflags\t: a b\n\nprocessor\t: 1\n")
    assert cpu_name(info) == "Some CPU (family 25, model 17)"
    info.write_text("processor\t: 0\nBogoMIPS\t: 50.00\n")
    assert cpu_name(info) == cpu_name(tmp_path / "none") != ""


def test_settings_of_a_preset_follow_its_length() -> None:
    """A tenth of the steps bounds the warm-up, twelve points are on the curve; any field may be set."""
    config = from_preset(get_preset("small"), steps=300, seed=3)
    assert (config.steps, config.seed, config.warmup, config.eval_every, config.checkpoint_every) == (300, 3, 30, 25, 50)
    assert (config.eval_tokens, config.eval_memory, config.lr) == (8192, 1024, 1e-3)
    whole = from_preset(get_preset("small"), optimizer="adamw", warmup=7)
    assert (whole.steps, whole.optimizer, whole.warmup) == (10_000, "adamw", 7)
    with pytest.raises(UserError, match="unknown training option 'weight_deacy'; fix: did you mean 'weight_decay'"):
        from_preset(get_preset("small"), weight_deacy=0.1)
