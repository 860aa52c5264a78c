"""Checkpoints and results: complete or absent, of one run, verified before anything is loaded."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import sparseffn.training.checkpoint as checkpoints
from sparseffn.data import Corpus
from sparseffn.errors import UserError
from sparseffn.ffn.sigma_moe import SigmaMoEConfig
from sparseffn.models import TransformerXLConfig
from sparseffn.storage import json_digest, read_json, write_json
from sparseffn.training import RunFolder, TrainConfig, TrainResult, load_run_model, train
from sparseffn.training.checkpoint import Checkpoint, best_checkpoint, list_checkpoints, load_checkpoint, save_checkpoint
from sparseffn.training.journal import StepReport


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, corpus: Corpus) -> Path:
    """A finished run, never written to."""
    ffn = SigmaMoEConfig(d_model=16, n_experts=4, expert_size=8, k=2)
    model = TransformerXLConfig(vocab_size=256, d_model=16, n_layers=2, n_heads=2, d_head=8, ffn=ffn)
    config = TrainConfig(
        steps=8, batch=2, context=16, memory=16, eval_memory=16, lr=5e-3, eval_every=4, eval_tokens=200, checkpoint_every=4
    )
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(model, config, corpus, folder)
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> RunFolder:
    """A copy of it."""
    shutil.copytree(finished, tmp_path / "run")
    return RunFolder(tmp_path / "run")


def tiny(step: int, valid: float | None = None) -> Checkpoint:
    """A checkpoint of one number."""
    return Checkpoint(step=step, tensors={"model.x": torch.tensor([float(step)])}, seconds=0.0, run="abc", valid=valid)


def test_the_last_and_the_best_are_kept_and_other_folders_are_left_alone(tmp_path: Path) -> None:
    """A user's copy, however it is called, is his."""
    (tmp_path / "step-00000002-best").mkdir()
    (tmp_path / "step-foo").mkdir()
    for step, valid in enumerate((5.0, 3.0, None, 4.0, 3.0, 3.5), start=1):
        save_checkpoint(tmp_path, tiny(step, valid), kept=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000005", "step-00000006"]
    assert best_checkpoint(tmp_path) == tmp_path / "step-00000002"
    assert {path.name for path in tmp_path.iterdir()} > {"step-00000002-best", "step-foo"}
    save_checkpoint(tmp_path, tiny(100_000_000), kept=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002", "step-100000000"]


def test_a_checkpoint_is_chosen_by_name(run: RunFolder) -> None:
    """`last`, `best`, a step; each with its own weights."""
    chosen = {name: load_run_model(run.path, checkpoint=name)[0].embedding.weight for name in ("last", "best", "4", "8")}
    assert torch.equal(chosen["last"], chosen["8"]) and not torch.equal(chosen["4"], chosen["8"])
    losses = {record["step"]: record["valid"] for record in run.read_metrics() if "valid" in record}
    assert torch.equal(chosen["best"], chosen[str(min((4, 8), key=lambda step: losses[step]))])
    with pytest.raises(UserError, match=r"`checkpoint` must be last, best or one of 4, 8; got '5'"):
        load_run_model(run.path, checkpoint="5")


def edit_config(run: RunFolder) -> None:
    """Another k, which fits the same weights."""
    run.config_path.write_text(run.config_path.read_text().replace('"k": 2', '"k": 3'))


def grow_config(run: RunFolder) -> None:
    """A model of terabytes, before version 0.2 bound checkpoints to their config."""
    run.config_path.write_text(run.config_path.read_text().replace('"n_layers": 2', '"n_layers": 100000000'))
    reseal(run, lambda manifest: manifest["extra"].pop("run"))


def swap_tensors(run: RunFolder) -> None:
    """The state of the checkpoint before, whole in itself."""
    before, last = list_checkpoints(run.checkpoints)
    shutil.copy(before / "state.safetensors", last / "state.safetensors")


def truncate(run: RunFolder) -> None:
    """A tensor file that lost its end."""
    state = list_checkpoints(run.checkpoints)[-1] / "state.safetensors"
    os.truncate(state, state.stat().st_size - 1)


def hostile_header(run: RunFolder) -> None:
    """A header that is said to be of 2^60 bytes, under a digest that fits."""
    state = list_checkpoints(run.checkpoints)[-1] / "state.safetensors"
    state.write_bytes((2**60).to_bytes(8, "little") + b"{" * 100)
    reseal(run, lambda manifest: manifest.update(bytes=108, digest=checkpoints.file_digest(state)))


def pipe(run: RunFolder) -> None:
    """Not a regular file."""
    state = list_checkpoints(run.checkpoints)[-1] / "state.safetensors"
    state.unlink()
    os.mkfifo(state)


def reseal(run: RunFolder, change: Callable[[dict], object]) -> None:
    """Change a manifest as somebody who knows the format would."""
    path = list_checkpoints(run.checkpoints)[-1] / "checkpoint.json"
    manifest = read_json(path)
    del manifest["manifest_digest"]
    change(manifest)
    write_json(path, {**manifest, "manifest_digest": json_digest(manifest)})


DAMAGE = [edit_config, grow_config, swap_tensors, truncate, hostile_header, pipe]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_checkpoint_that_is_not_the_runs_is_refused(damage: Callable[[RunFolder], None], run: RunFolder) -> None:
    """In well under a second, with a remedy."""
    damage(run)
    with pytest.raises(UserError, match=r"must .*; got .*; fix: "):
        load_run_model(run.path)


def edit_result(run: RunFolder) -> None:
    """A better loss."""
    write_json(run.result_path, read_json(run.result_path) | {"test": 1.0})


def other_losses(run: RunFolder) -> None:
    """Those of other windows."""
    np.save(run.window_losses_path("test"), np.ones(3))


def cut_metrics(run: RunFolder) -> None:
    """A curve that ends earlier."""
    run.metrics_path.write_text("".join(run.metrics_path.read_text().splitlines(keepends=True)[:4]))


@pytest.mark.parametrize("damage", [edit_result, other_losses, cut_metrics, edit_config], ids=lambda damage: damage.__name__)
def test_a_finished_run_knows_its_files(damage: Callable[[RunFolder], None], run: RunFolder) -> None:
    """A changed figure, curve or config is refused; so is a missing one."""
    assert TrainResult.read(run.result_path).steps == 8
    damage(run)
    with pytest.raises(UserError, match=r"must (match its digest|be as the finished run left it); got .*fix: "):
        TrainResult.read(run.result_path)


def test_results_of_version_0_1_are_read(run: RunFolder) -> None:
    """They know no digests."""
    whole = read_json(run.result_path)
    write_json(run.result_path, {name: whole[name] for name in ("steps", "valid", "test", "seconds")})
    run.metrics_path.unlink()
    assert TrainResult.read(run.result_path).test == whole["test"]


def test_a_symlink_in_a_runs_place_is_replaced_not_written_through(run: RunFolder, corpus: Corpus, tmp_path: Path) -> None:
    """Losses of windows."""
    (tmp_path / "victim").write_text("precious")
    run.result_path.unlink()
    run.window_losses_path("valid").unlink()
    run.window_losses_path("valid").symlink_to(tmp_path / "victim")
    config = read_json(run.config_path)
    train(TransformerXLConfig.from_json(config["model"]), TrainConfig.from_json(config["train"]), corpus, run.path)
    assert (tmp_path / "victim").read_text() == "precious" and not run.window_losses_path("valid").is_symlink()


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file of more than 40 kB; what goes beyond fails as on a full disk."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, before)


@pytest.mark.usefixtures("small_disk")
def test_a_full_disk_is_reported_and_the_last_checkpoint_stays(tmp_path: Path) -> None:
    """With what to do; nothing half-written is left."""
    save_checkpoint(tmp_path, tiny(1))
    large = Checkpoint(step=2, tensors={"model.x": torch.zeros(20_000)}, seconds=0.0)
    with pytest.raises(UserError, match=r"cannot write .*step-00000002.*; fix: make room on the disk"):
        save_checkpoint(tmp_path, large)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert load_checkpoint(tmp_path / "step-00000001", run="abc").step == 1
    with pytest.raises(UserError, match="must be of the run whose config lies beside it"):
        load_checkpoint(tmp_path / "step-00000001", run="another")


def vanish(folder: Path) -> None:
    """Removed while the run goes on."""
    shutil.rmtree(folder)


def fill(folder: Path) -> None:
    """The device of full disks."""
    (folder / "metrics.jsonl").unlink()
    (folder / "metrics.jsonl").symlink_to("/dev/full")


@pytest.mark.parametrize(("happens", "number"), [(vanish, errno.ENOENT), (fill, errno.ENOSPC)], ids=["vanished", "full"])
def test_a_folder_that_fails_ends_the_run_with_the_reason(
    happens: Callable[[Path], None],
    number: int,
    tmp_path: Path,
    corpus: Corpus,
    model: TransformerXLConfig,
    config: TrainConfig,
) -> None:
    """One error with file, reason and remedy; nothing is made anew in a folder that is gone."""

    def on_step(report: StepReport) -> None:
        if report.step == 3:
            happens(tmp_path / "run")

    with pytest.raises(UserError, match=f"cannot write .*metrics.jsonl.*{os.strerror(number)}; fix: "):
        train(model, config, corpus, tmp_path / "run", on_step=on_step)
    assert not (tmp_path / "run" / "result.json").exists()
