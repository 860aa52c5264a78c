"""Several processes train as one: same losses, files that any number of them goes on from, and one end for all."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from song_text import TEXT
from torch.distributed import HashStore

from sparseffn.data import Corpus, load_corpus
from sparseffn.distribution import World
from sparseffn.ffn import FFNConfig, list_methods
from sparseffn.ffn.methods import method_class
from sparseffn.ffn.sigma_moe import SigmaMoEConfig
from sparseffn.models import ModelConfig, TransformerXLConfig
from sparseffn.training import RunFolder, TrainConfig, train
from sparseffn.training.checkpoint import list_checkpoints, load_checkpoint
from sparseffn.training.journal import StepReport

SCRIPT = Path(__file__).with_name("together.py")
CONFIG = TrainConfig(
    steps=6,
    batch=8,
    context=12,
    memory=12,
    eval_memory=24,
    eval_batch=3,
    lr=5e-3,
    warmup=2,
    accumulation=2,
    eval_every=3,
    eval_tokens=400,
    checkpoint_every=2,
)


def model_of(ffn: FFNConfig, dropout: float = 0.0) -> ModelConfig:
    """Two layers; dropout of single numbers is each process's own, so that only runs without it are compared."""
    d = ffn.d_model
    return TransformerXLConfig(vocab_size=256, d_model=d, n_layers=2, n_heads=1, d_head=4, dropout=dropout, ffn=ffn)


def examples(*, each: int | None = None) -> dict[str, ModelConfig]:
    """Every method, with what is random in its routers and without dropout of single numbers; `each`: so many of a method."""
    found = {}
    for name in list_methods():
        without = [example for example in method_class(name).examples() if getattr(example, "dropout", 0.0) == 0]
        found |= {f"{name}-{i}": model_of(example) for i, example in enumerate(without[:each])}
    return found


@dataclass
class Place:
    """Where the runs are."""

    path: Path
    corpus: Corpus

    def job(self, name: str, model: ModelConfig, **more: Any) -> dict[str, Any]:
        """A run of `together.py`; `faults` and other settings of single processes go by their ranks."""
        return {"model": model.to_json(), "train": CONFIG.to_json(), "out": str(self.path / name), "dtype": "float64", **more}

    def launch(self, n: int, jobs: list[dict[str, Any]], timeout: float = 240) -> list[tuple[int, str]]:
        """Exit code and standard error of each process."""
        (self.path / "jobs.json").write_text(json.dumps(jobs))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [
            sys.executable,
            str(SCRIPT),
            *map(str, (self.path / "jobs.json", self.path / "song.txt", self.path / "cache")),
        ]
        shared = {**os.environ, "WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        processes = [
            subprocess.Popen(command, env={**shared, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True) for rank in range(n)
        ]
        try:
            errors = [process.communicate(timeout=timeout)[1] for process in processes]
        finally:
            for process in processes:
                process.kill()
        return [(process.returncode, error) for process, error in zip(processes, errors, strict=True)]

    def alone(self, name: str, model: ModelConfig, **more: Any) -> list[dict[str, Any]]:
        """The metrics of a run of this process, in float64."""
        torch.set_default_dtype(torch.float64)
        try:
            train(model, CONFIG, self.corpus, self.path / name, **more)
        finally:
            torch.set_default_dtype(torch.float32)
        return self.metrics(name)

    def metrics(self, name: str) -> list[dict[str, Any]]:
        return RunFolder(self.path / name).read_metrics()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    path = tmp_path_factory.mktemp("several")
    (path / "song.txt").write_text(TEXT)
    return Place(path, load_corpus("text", data_dir=path / "song.txt", cache_dir=path / "cache"))


def assert_same(several: list[dict[str, Any]], one: list[dict[str, Any]]) -> None:
    """Losses, balancing losses, gradient norms and validation agree to rounding in float64."""
    keys = ("step", "loss", "balance_loss", "grad_norm", "valid")
    assert [set(record) for record in several] == [set(record) for record in one]
    for a, b in zip(several, one, strict=True):
        for key in keys:
            assert a.get(key, 0.0) == pytest.approx(b.get(key, 0.0), rel=1e-9, abs=1e-9), (key, b["step"])


def check_equal(place: Place, n: int, models: dict[str, ModelConfig], ways: dict[str, str]) -> None:
    """Train each model in n processes, by the way that is named or else by DDP, and in one."""
    ways = dict.fromkeys(models, "ddp") | ways
    jobs = [place.job(f"{name}-{n}-{ways[name]}", model, strategy=ways[name]) for name, model in models.items()]
    for code, error in place.launch(n, jobs):
        assert code == 0, error
    for job, name in zip(jobs, models, strict=True):
        one = place.metrics(f"{name}-1") or place.alone(f"{name}-1", models[name])
        assert_same(place.metrics(Path(job["out"]).name), one)


def test_two_processes_train_every_method_as_one_does(place: Place) -> None:
    """Balancing losses, batch-wide routing and the routers' random numbers are of the whole batch."""
    models = examples(each=1) | {name: examples()[name] for name in ("sigma-moe-1", "s-base-1")}
    ways = {"sigma-moe-0": "fsdp", "s-base-0": "fsdp", "sigma-moe-1": "ep", "s-base-1": "ep-fsdp"}
    check_equal(place, 2, models, ways)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_four_processes_train_every_method_as_one_does(place: Place, way: str) -> None:
    models = examples(each=1)
    check_equal(place, 4, models, dict.fromkeys(models, way))


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("way", ["ep", "ep-fsdp"])
def test_processes_with_experts_of_their_own_train_as_one_does(place: Place, n: int, way: str) -> None:
    """Mixtures whose number of experts they divide."""
    models = {name: model for name, model in examples().items() if getattr(model.ffn, "n_experts", 1) % n == 0}
    models = {name: model for name, model in models.items() if getattr(model.ffn, "survivors", None) is None}
    assert len(models) > 2
    check_equal(place, n, models, dict.fromkeys(models, way))


def sigma(dropout: float = 0.0) -> ModelConfig:
    ffn = SigmaMoEConfig(d_model=8, n_experts=4, expert_size=4, k=2, expert_dropout=0.25, dropout=dropout)
    return model_of(ffn, dropout)


class EnoughError(Exception):
    """Ends a run of this process."""


def stop_after_4(report: StepReport) -> None:
    if report.step == 5:
        raise EnoughError


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(list_checkpoints(out / "checkpoints")[-1]).group("model")


@pytest.mark.parametrize("order", [(1, 2, 1, 2), (1, 1, 2, 2)], ids=["in-turn", "one-behind"])
def test_what_was_said_is_removed_when_everybody_has_heard_it(order: tuple[int, ...]) -> None:
    """And no sooner: each hears all of it, and the store does not grow."""
    store = HashStore()
    worlds = [World(rank, 3, store) for rank in range(3)]
    n_before = store.num_keys()
    for value in ("a run", None):
        worlds[0].say(value)
    assert [worlds[rank].heard() for rank in order].count('"a run"') == 2
    assert store.num_keys() == n_before and worlds[1].heard() is None
    worlds[0].say("the next")
    assert worlds[1].heard() == worlds[2].heard() == '"the next"'


def test_processes_that_disagree_are_all_refused(place: Place) -> None:
    """Other settings, a batch that they do not divide, a text that one of them cannot read: one message, nothing written."""
    jobs = [
        place.job("other", sigma(), only={"1": {"lr": 0.1}}),
        place.job("odd", sigma(), train={**CONFIG.to_json(), "batch": 6, "accumulation": 2}),
        place.job("unread", sigma(), faults={"1": "reads nothing"}),
    ]
    ended = place.launch(2, jobs)
    assert [code for code, _ in ended] == [2, 2]
    for _, error in ended:
        assert re.search(r"must be the same in all 2 processes; got lr = 0.005 in process 0 and lr = 0.1 in process 1", error)
        assert re.search(r"`--batch` must be a multiple of processes x accumulation = 2 x 2; got 6; fix: --batch 4 or 8", error)
        assert "the text must be there; got none; fix: bring it" in error
    assert "OtherProcessError: the text must be there; got none; fix: bring it (process 1 of 2)" in ended[0][1]
    assert not any((place.path / name / "checkpoints").exists() for name in ("other", "odd", "unread"))


def test_a_run_that_ends_in_one_process_ends_in_all_and_the_next_one_begins(place: Place) -> None:
    """An error of the first one's caller, losses that are not finite: whole, spread or in shards."""
    wild = {**CONFIG.to_json(), "lr": 1e30, "warmup": 0, "steps": 6}
    jobs = [place.job("stopped", sigma(), faults={"0": "callback 2"})]
    four = examples()["sigma-moe-1"]
    jobs += [place.job(f"wild-{way}", four, train=wild, strategy=way) for way in ("ddp", "ep", "fsdp", "ep-fsdp")]
    jobs += [place.job("after", sigma())]
    (first, said), (second, heard) = place.launch(2, jobs)
    assert (first, second) == (2, 2), (said, heard)
    assert "Stop: enough" in said and "OtherProcessError: Stop: enough (process 0 of 2)" in heard
    for error in (said, heard):
        assert error.count("NonFiniteLossError: loss and gradient must be finite") == 4, error
    assert (place.path / "after" / "result.json").exists()


def test_a_run_goes_on_in_any_number_of_processes(place: Place) -> None:
    """Two processes are terminated, one goes on with what they left, as if nothing had been; and two with what one left."""
    straight = place.alone("straight", sigma())
    with pytest.raises(EnoughError):
        place.alone("joined", sigma(), on_step=stop_after_4)
    jobs = [
        place.job("joined", sigma(), strategy="ep-fsdp"),
        place.job("moved", sigma(), strategy="fsdp", faults={"1": "terminated 3"}),
    ]
    ended = place.launch(2, jobs)
    assert [code for code, _ in ended] == [143, 143], ended
    assert all(error.count("interrupted after step 4 of 6") == 1 for _, error in ended)
    assert_same(place.metrics("joined"), straight)
    assert_same(place.alone("moved", sigma()), straight)


def test_a_killed_process_ends_the_others_soon_and_nothing_is_lost(place: Place) -> None:
    """With dropout of every kind: the run that goes on ends with the same bits."""
    started = time.monotonic()
    jobs = [place.job("unharmed", sigma(0.1)), place.job("killed", sigma(0.1), faults={"1": "killed 5"})]
    (_, said), (code, _) = place.launch(2, jobs)
    assert (place.path / "unharmed" / "result.json").exists() and code == -signal.SIGKILL, said
    assert re.search(r"a process of 2 must not go away; process 0 lost it .*the same command goes on", said), said
    assert time.monotonic() - started < 60
    assert [code for code, _ in place.launch(2, [place.job("killed", sigma(0.1))])] == [0, 0]
    assert_same(place.metrics("killed"), place.metrics("unharmed"))
    for name, value in weights(place.path / "unharmed").items():
        assert torch.equal(weights(place.path / "killed")[name], value), name


def test_a_process_that_fails_tells_the_others_why(place: Place) -> None:
    (code, said), (failed, _) = place.launch(2, [place.job("failed", sigma(), faults={"1": "fails 2"})])
    assert (code, failed) == (2, 1)
    assert "process 1 of 2 failed, and process 0 with it: ZeroDivisionError: a fault of this process alone" in said
