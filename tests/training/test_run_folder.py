"""Files of a run: whole or absent, of one config, readable by later versions."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from song_text import TEXT

import sparseffn
from sparseffn.data import Corpus, load_corpus
from sparseffn.errors import UserError
from sparseffn.models import TransformerXLConfig
from sparseffn.storage import cpu_name, digest_of, json_digest, sources_digest, write_json
from sparseffn.training import RunFolder, RunSettings, TrainConfig, load_run_corpus, loop, train
from sparseffn.training.checkpoint import list_checkpoints
from sparseffn.training.loop import run_config


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


def test_a_run_that_was_killed_within_its_first_file_goes_on(
    tmp_path: Path, corpus: Corpus, model: TransformerXLConfig, config: TrainConfig
) -> None:
    """What it left of `config.json` is nobody else's file, and is removed; one of another name is left alone."""
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        # As a killed process does: neither moved nor tidied up.
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            train(model, config, corpus, out)
    assert any(path.name.startswith(".config.json.") for path in out.iterdir())
    assert train(model, config, corpus, out).steps == 12
    assert {path.name for path in out.glob(".*")} == {".lock"}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".notes.0123456789abcdef").write_text("mine")
    with pytest.raises(UserError, match="which holds other files"):
        train(model, config, corpus, tmp_path / "other")
    assert (tmp_path / "other" / ".notes.0123456789abcdef").exists()


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


def test_result_has_the_time_that_checkpoints_took(
    tmp_path: Path, corpus: Corpus, model: TransformerXLConfig, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that stands still otherwise: after steps 5, 10 and 12; what goes on from step 10 knows of step 5."""
    write, now = loop.save_checkpoint, [0.0]

    def slow(*args: Any, **more: Any) -> Path:
        now[0] += 1.0
        return write(*args, **more)

    monkeypatch.setattr(loop, "save_checkpoint", slow)
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    result = train(model, config, corpus, tmp_path / "run")
    assert (result.saving_seconds, result.seconds) == (3.0, 0.0)
    (tmp_path / "run" / "result.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000012")
    assert train(model, config, corpus, tmp_path / "run").saving_seconds == 2.0


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


def test_a_folder_of_another_version_is_refused_by_its_name(
    tmp_path: Path, corpus: Corpus, model: TransformerXLConfig, config: TrainConfig
) -> None:
    """Its settings may be the same words with other defaults; of this version, only settings can differ."""
    train(model, config, corpus, tmp_path / "run")
    other = dataclasses.replace(config, eval_tokens=config.eval_tokens + 1)
    with pytest.raises(UserError, match=r"train.eval_tokens is .*; fix: choose another --out or the same settings"):
        train(model, other, corpus, tmp_path / "run")
    path = RunFolder(tmp_path / "run").environment_path
    write_json(path, {**json.loads(path.read_text()), "sparseffn": "0.1.0"})
    with pytest.raises(UserError, match=r"fix: the folder is of version 0\.1\.0.*: finish it with that version, or choose"):
        train(model, other, corpus, tmp_path / "run")


def test_damaged_settings_are_refused_with_their_path_and_one_remedy(
    tmp_path: Path, corpus: Corpus, model: TransformerXLConfig, config: TrainConfig
) -> None:
    """The field by its whole path; a whole number that no float holds is out of range too."""
    folder = RunFolder(tmp_path)
    write_json(tmp_path / "config.json", run_config(model, config, corpus) | {"train": {**config.to_json(), "lr": 10**400}})
    with pytest.raises(
        UserError, match=r"`train\.lr` must be a number that is computed with; got one of 1329 bits; fix: restore"
    ):
        RunSettings.read(folder)
    write_json(tmp_path / "config.json", run_config(model, config, corpus) | {"train": {**config.to_json(), "seed": -1}})
    with pytest.raises(UserError, match=r"damaged file: `train\.seed` must be at least 0; got -1; fix: restore") as caught:
        RunSettings.read(folder)
    assert str(caught.value).count("fix:") == 1


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


def test_processor_is_told_from_its_namesakes(tmp_path: Path) -> None:
    """By family and model, where Linux says them."""
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: Some CPU\nflags\t: a b\n\nprocessor\t: 1\n")
    assert cpu_name(info) == "Some CPU (family 25, model 17)"
    info.write_text("processor\t: 0\nBogoMIPS\t: 50.00\n")
    assert cpu_name(info) == cpu_name(tmp_path / "none") != ""
