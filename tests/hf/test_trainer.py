"""Transformers' Trainer: goes on after an interruption as if there was none, micro-batches and processes add up."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate: pip install 'sparseffn[hf]'")

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import sparseffn
from hf import trained_by_trainer
from hf.trained_by_trainer import train

SCRIPT = str(trained_by_trainer.__file__)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "song.txt"
    path.write_text("".join(f"{i} bottles of beer on the wall\n" for i in range(3000)))
    return path


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """Eight steps in one go, with dropout, expert dropout, padding and a balancing loss."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return out, train(out, text)


def test_goes_on_from_a_checkpoint_bit_by_bit(whole: tuple[Path, list[float]], text: Path, tmp_path: Path) -> None:
    """From the third step, and the model that is saved is the same."""
    out, losses = whole
    assert len(losses) == 8 and losses[-1] < losses[0] - 1
    shutil.copytree(out / "checkpoint-3", tmp_path / "out" / "checkpoint-3")
    assert train(tmp_path / "out", text) == losses
    first, second = (AutoModelForCausalLM.from_pretrained(path) for path in (out, tmp_path / "out"))
    assert all(map(torch.equal, first.parameters(), second.parameters()))


def test_checkpointed_activations_change_nothing(whole: tuple[Path, list[float]], text: Path, tmp_path: Path) -> None:
    """To the bit, dropout included."""
    assert train(tmp_path / "out", text, checkpointing="1") == whole[1]


def test_micro_batches_add_up(text: Path, tmp_path: Path) -> None:
    """Two of two rows of different lengths are one of four, without what is of a whole batch."""
    one = train(tmp_path / "one", text, entropy="0", steps="4")
    two = train(tmp_path / "two", text, entropy="0", steps="4", batch="2", accumulation="2")
    assert two == pytest.approx(one, rel=1e-5)


def test_evaluates_without_the_balancing_loss(text: Path, tmp_path: Path) -> None:
    """`exp(eval_loss)` is the perplexity; predictions are logits alone."""
    data = trained_by_trainer.rows(text)[1:3]
    model = trained_by_trainer.model(entropy=0.5)
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
    found = Trainer(model=model, args=arguments).predict(data)  # pyright: ignore[reportArgumentType]
    tokens = torch.stack([row["input_ids"] for row in data])
    output = model.eval()(tokens, labels=tokens)
    assert found.metrics["test_loss"] == pytest.approx(output.cross_entropy.item(), rel=1e-5)
    assert output.balance_loss.item() < -0.5 and output.loss is output.cross_entropy
    torch.testing.assert_close(torch.tensor(found.predictions), output.logits)


@pytest.mark.slow
def test_is_killed_at_any_moment_and_goes_on_bit_by_bit(text: Path, tmp_path: Path) -> None:
    """400 steps, three times broken off by SIGKILL: once as it begins a checkpoint, twice somewhere after one.

    All in the first 260 steps or soon after, so that on a busy machine the run does not end before.
    """
    options = ["steps=400", "save=20"]
    seed = time.time_ns() % 10**6
    draw, out = random.Random(seed), tmp_path / "killed"
    wanted = printed([sys.executable, SCRIPT, str(tmp_path / "whole"), str(text), *options])
    for least, delay in ((2, 0.0), (6, draw.random() / 2), (10, draw.random() / 2)):
        checkpoint = out / f"checkpoint-{20 * (least + draw.randrange(3))}"
        kill_after([sys.executable, SCRIPT, str(out), str(text), *options], checkpoint, delay)
        assert not (out / "model.safetensors").exists(), seed
    assert printed([sys.executable, SCRIPT, str(out), str(text), *options]) == wanted, seed
    first, second = (load_file(folder / "model.safetensors") for folder in (tmp_path / "whole", out))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first), seed
    assert len(wanted) == 400 and wanted[-1] < 1 < 5 < wanted[0]


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(text: Path, tmp_path: Path) -> None:
    """By `accelerate launch`, which starts several processes of the CPU by its flag for several GPUs alone."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    two = printed([*launch, SCRIPT, str(tmp_path / "two"), str(text), "batch=2", "entropy=0"])
    assert two == pytest.approx(train(tmp_path / "one", text, entropy="0"), rel=1e-5)


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(sparseffn.__file__).parents[1]), "OMP_NUM_THREADS": "1"}


def kill_after(command: list[str], path: Path, delay: float) -> None:
    """Start a run, and kill it some seconds after a path is there."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT) as process:
        while not path.exists():
            assert process.poll() is None, f"it ended before {path.name}"
            time.sleep(0.001)
        time.sleep(delay)
        process.kill()
    assert process.returncode == -signal.SIGKILL


def printed(command: list[str]) -> list[float]:
    """The losses that a run prints in its last line."""
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
