"""SIGTERM and Ctrl-C: the step is finished and saved, and the run goes on bit by bit."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from song_text import TEXT
from test_train import losses, weights

from sparseffn.cli import main
from sparseffn.cli.output import Progress
from sparseffn.data import Corpus
from sparseffn.models import TransformerXLConfig
from sparseffn.training import Interrupted, TrainConfig, train
from sparseffn.training.checkpoint import list_checkpoints
from sparseffn.training.interruption import SIGNALS, Interruption


@pytest.fixture(autouse=True)
def _signals_are_heard() -> Iterator[None]:
    """A shell starts what runs in its background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_ends_a_run_after_its_step_and_it_goes_on(
    number: signal.Signals, tmp_path: Path, corpus: Corpus, model: TransformerXLConfig, config: TrainConfig
) -> None:
    """Between two checkpoints; the step's own is written, and the handlers are as they were."""
    before = [signal.getsignal(number) for number in SIGNALS]

    def on_step(report: Any) -> None:
        if report.step == 7:
            os.kill(os.getpid(), number)

    with pytest.raises(Interrupted, match=r"after step [78] of 12, which is saved in .*step-0000000[78]; the same") as caught:
        train(model, config, corpus, tmp_path / "run", on_step=on_step)
    assert caught.value.exit_code == 128 + number
    assert [signal.getsignal(number) for number in SIGNALS] == before
    result, whole = (train(model, config, corpus, tmp_path / name) for name in ("run", "whole"))
    assert (result.valid, result.test) == (whole.valid, whole.test)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert all(map(lambda a, b: bool((a == b).all()), weights(tmp_path / "run").values(), weights(tmp_path / "whole").values()))


def test_a_second_signal_ends_it_at_once_and_other_handlers_stay() -> None:
    """One that the program set, or that it ignores, is not ours; nor is another thread's."""
    with Interruption(lambda: "it goes on from the last checkpoint") as interruption:
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.number == signal.SIGTERM
        with pytest.raises(Interrupted, match="goes on from the last checkpoint"):
            os.kill(os.getpid(), signal.SIGINT)
    own = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interruption(str):
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, own)
    seen = []
    thread = threading.Thread(target=lambda: seen.append(Interruption(str).__enter__().number))
    thread.start()
    thread.join()
    assert seen == [None] and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize(
    ("steps", "saved"),
    [
        (1, "it had not reached its first checkpoint, so nothing of it was saved; the same command begins anew"),
        (7, r"its last checkpoint is \S+step-00000005; the same command goes on from there"),
    ],
    ids=["before-the-first-checkpoint", "after-it"],
)
def test_a_run_that_ends_within_a_step_names_what_was_saved(
    steps: int, saved: str, tmp_path: Path, corpus: Corpus, model: TransformerXLConfig, config: TrainConfig
) -> None:
    """By a second signal, which does not wait for the step."""

    def on_step(report: Any) -> None:
        if report.step == steps:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match=f"interrupted; {saved}"):
        train(model, config, corpus, tmp_path / "run", on_step=on_step)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_before_the_first_step_saves_nothing_and_says_so(
    number: signal.Signals,
    tmp_path: Path,
    corpus: Corpus,
    model: TransformerXLConfig,
    config: TrainConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While the fresh model is validated; the same command then trains it as if nothing had been."""
    with monkeypatch.context() as patch:
        patch.setattr("sparseffn.training.loop._Run._validate", lambda run: os.kill(os.getpid(), number))
        with pytest.raises(Interrupted, match="nothing of it was saved; the same command begins anew") as caught:
            train(model, config, corpus, tmp_path / "run")
    assert caught.value.exit_code == 128 + number
    result, whole = (train(model, config, corpus, tmp_path / name) for name in ("run", "whole"))
    assert (result.valid, result.test) == (whole.valid, whole.test)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_the_command_says_where_it_stands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And ends with the exit code of the signal."""
    (tmp_path / "song.txt").write_text(TEXT)
    words = ["train", "--method", "dense", "--steps", "900", "--checkpoint-every", "800", "--out", str(tmp_path / "run")]
    words += ["--corpus", "text", "--data-dir", str(tmp_path / "song.txt"), "--batch", "2", "--context", "16"]

    def on_step(report: Any) -> None:
        if report.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Progress, "run", lambda *_: on_step)
    assert main([*words, "--device", "cpu"]) == 143
    saved = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert f"{saved}; the same command goes on from there" in capsys.readouterr().err
