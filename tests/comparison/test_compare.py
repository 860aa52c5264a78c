"""Comparisons: fair, resumable, complete."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import killed_comparison
import numpy as np
import pytest
import torch

from sparseffn.cli import main
from sparseffn.cli.output import parse_duration
from sparseffn.comparison import CompareSettings, NoProgress, compare, match_methods, parse_methods, schedule
from sparseffn.comparison.experiment import Comparison
from sparseffn.comparison.outcome import _spread, _too_large
from sparseffn.comparison.schedule import Plan, make_plan
from sparseffn.distribution import World
from sparseffn.errors import UnmatchedError, UserError
from sparseffn.evaluation import evaluate
from sparseffn.ffn import list_methods
from sparseffn.models import TransformerXL
from sparseffn.models.presets import PRESETS, get_preset
from sparseffn.report import markdown_table
from sparseffn.report.comparison_report import comparison_table
from sparseffn.results.comparison_result import read_comparison
from sparseffn.storage import sole_writer, write_json
from sparseffn.training import RunFolder, RunSettings, TrainResult, load_run_corpus, load_run_model
from sparseffn.training.checkpoint import list_checkpoints

# The one with an assignment over the batch, a mixture, and no routing at all.
DIVERGING = ["base", "sigma-moe", "dense"]


@pytest.fixture(scope="module")
def song(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small text."""
    path = tmp_path_factory.mktemp("song") / "song.txt"
    path.write_text("".join(f"{i} bottles of beer on the wall\n" for i in range(600)))
    return str(path)


def settings(song: str, *words: str, **changes: Any) -> CompareSettings:
    """A comparison of a few seconds."""
    defaults = {"corpus": "text", "data_dir": song, "steps": 4, "overrides": {"batch": 2, "context": 16}}
    return CompareSettings(methods=tuple(parse_methods(words)), **{**defaults, **changes})


@pytest.mark.parametrize("vocab_size", [205, 8000])
@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize("method", list_methods())
def test_every_method_is_equal_at_every_preset(method: str, preset: str, vocab_size: int) -> None:
    """Within 0.5% of the whole model, and K x G within 10% of the preset's."""
    found = match_methods(parse_methods([method]), get_preset(preset), vocab_size)[0]
    assert found.match.equal and found.marks == ()
    assert found.model.num_params() == found.match.model_params


def test_models_start_alike_outside_their_blocks() -> None:
    """For one seed, bit by bit, for every method."""
    candidates = match_methods(parse_methods(list_methods()), get_preset("tiny"), 256)
    first: dict[str, torch.Tensor] = {}
    for candidate in candidates:
        model = TransformerXL(candidate.model)
        model.init_parameters(3)
        outside = {n: p.detach() for n, p in model.named_parameters() if ".ffn." not in n}
        first = first or outside
        assert outside.keys() == first.keys() and all(torch.equal(outside[n], first[n]) for n in first)


def test_comparison_is_complete(song: str, tmp_path: Path) -> None:
    """Every number of the table is there, over two seeds."""
    result = compare(settings(song, "dense", "sigma-moe", "topk", "k=64", seeds=(0, 1)), tmp_path / "out")
    assert result == read_comparison(tmp_path / "out" / "comparison.json")
    assert result.finished and [m.label for m in result.methods] == ["dense", "sigma-moe", "topk k=64"]
    for row in result.methods:
        assert row.test is not None and row.test.n == 2 and row.test.std is not None
        assert row.valid_at_equal_time and row.layer_time_training_vs_dense and row.residual_percent is not None
        assert abs(row.residual_percent) <= 0.5 and len(row.curves) == 2
    dense, sigma, topk = result.methods
    assert dense.active and not dense.usage and sigma.usage and sigma.cooccurrence
    assert sigma.ffn_flops_vs_dense and sigma.ffn_flops_vs_dense < 0.2 and dense.ffn_flops_vs_dense == 1.0
    assert dense.layer_time_forward_vs_dense == dense.layer_time_training_vs_dense == 1.0, "its own time"
    # 2 of 16 experts, 64 of 2048 channels.
    assert [row.ffn_flops_convention for row in result.methods] == [1.0, 2 / 16, 64 / 2048]
    table = markdown_table(comparison_table(result))
    assert "K/N_E" in table and "| 12.5% |" in table and "| 3.1% |" in table
    assert f"digest {result.corpus['digest'][:12]}" in table and "lr=0.004" in table
    assert "64 channels" in topk.marks[0] and result.environment["device"] == "cpu"


class _Interrupts(NoProgress):
    """Stops in the middle of the second run."""

    def run(self, label: str, seed: int, position: int, n_runs: int) -> Any:
        def on_step(report: Any) -> None:
            if position == 1 and report.step == 3:
                raise KeyboardInterrupt

        return on_step


def test_interrupted_comparison_goes_on_to_the_same_losses(song: str, tmp_path: Path) -> None:
    """The plan is reused, finished runs are not repeated."""
    wanted = settings(song, "dense", "switch")
    with pytest.raises(KeyboardInterrupt):
        compare(wanted, tmp_path / "a", progress=_Interrupts())
    plan = (tmp_path / "a" / "plan.json").read_text()
    result, whole = compare(wanted, tmp_path / "a"), compare(wanted, tmp_path / "b")
    assert (tmp_path / "a" / "plan.json").read_text() == plan
    for got, expected in zip(result.methods, whole.methods, strict=True):
        assert (got.valid, got.test) == (expected.valid, expected.test)


def metrics(out: Path) -> dict[str, list[dict[str, Any]]]:
    """Every line of every run."""
    return {str(path.relative_to(out)): lines(path) for path in sorted(out.glob("runs/*/seed-*"))}


def lines(run: Path) -> list[dict[str, Any]]:
    """Without what depends on the clock."""
    return [{k: v for k, v in line.items() if k != "time_s"} for line in RunFolder(run).read_metrics()]


@pytest.fixture(scope="module")
def uninterrupted(song: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The comparison that is killed below, in one go."""
    out = tmp_path_factory.mktemp("whole") / "out"
    compare(killed_comparison.settings(song), out)
    return out


@pytest.mark.parametrize(("when", "saved"), [("step", 6), pytest.param("saving", 4, marks=pytest.mark.slow)])
def test_killed_comparison_goes_on_bit_by_bit(when: str, saved: int, song: str, tmp_path: Path, uninterrupted: Path) -> None:
    """SIGKILL between two checkpoints of the second run, and while one is written: every line is the same in the end."""
    out = tmp_path / "out"
    command = [sys.executable, str(killed_comparison.__file__), str(out), song, when]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    killed = RunFolder(next(out.glob("runs/sigma-moe*/seed-0")))
    assert list_checkpoints(killed.checkpoints)[-1].name == f"step-{saved:08d}" and not killed.result_path.exists()
    finished = (out / "runs" / "dense" / "seed-0" / "result.json").stat().st_ino
    compare(killed_comparison.settings(song), out)
    assert metrics(out) == metrics(uninterrupted) and len(metrics(out)) == 2
    assert (out / "runs" / "dense" / "seed-0" / "result.json").stat().st_ino == finished


def test_other_settings_are_refused(song: str, tmp_path: Path) -> None:
    """A folder belongs to one comparison."""
    compare(settings(song, "dense"), tmp_path / "out")
    with pytest.raises(UserError, match="steps is 4, not 5"):
        compare(settings(song, "dense", steps=5), tmp_path / "out")


def test_diverging_method_is_shown_as_missing(song: str, tmp_path: Path) -> None:
    """Its row gives the reason; the others are finished."""

    class Poison(NoProgress):
        def run(self, label: str, seed: int, position: int, n_runs: int) -> Any:
            return (lambda report: _poison()) if label == "sigma-moe" else (lambda report: None)

    def _poison() -> None:
        from sparseffn.training import NonFiniteLossError

        raise NonFiniteLossError("loss and gradient must be finite; got nan")

    result = compare(settings(song, "sigma-moe", "dense"), tmp_path / "out", progress=Poison())
    assert not result.finished and "must be finite" in str(result.missing[0].reason)
    broken, dense = result.methods
    assert broken.test is None and dense.test is not None and dense.test.n == 1


def test_method_that_really_diverges_does_not_end_the_comparison(song: str, tmp_path: Path) -> None:
    """An absurd learning rate: every method has its row and its reason, none ends the comparison."""
    overrides = {"batch": 2, "context": 16, "lr": 1e25, "warmup": 0}
    result = compare(settings(song, *DIVERGING, steps=30, overrides=overrides), tmp_path / "out")
    reasons = {run.label: str(run.reason) for run in result.missing}
    assert list(reasons) == DIVERGING
    assert all("must be finite; got" in reason and "Last good checkpoint" in reason for reason in reasons.values())


def test_budget_sets_equal_steps_or_is_refused_with_numbers(song: str, tmp_path: Path) -> None:
    """A minute suffices here, a tenth of a second does not."""
    wanted = settings(song, "sigma-moe", steps=None, budget_s=60.0)
    plan = make_plan(Comparison.open(wanted, tmp_path / "out"), time.perf_counter())
    assert 20 < plan.steps < 60 / plan.step_s["sigma-moe"]
    comparison = Comparison.open(dataclasses.replace(wanted, budget_s=0.1), tmp_path / "out")
    with pytest.raises(UserError, match=r"must allow at least 20 steps .* fix: --budget [1-9]\d*s or more"):
        make_plan(comparison, time.perf_counter())


def test_budget_bounds_what_is_evaluated(song: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a slow machine a third of what is left goes to evaluation; where whole splits take less, they are whole."""
    tokens = np.zeros(600_001, dtype=np.uint16)
    opened = Comparison.open(settings(song, "dense", "topk", steps=None, budget_s=480.0), tmp_path / "out")
    comparison = dataclasses.replace(opened, corpus=dataclasses.replace(opened.corpus, valid=tokens, test=tokens))
    monkeypatch.setattr(schedule, "_time_steps", lambda *_: {"dense": 0.4, "topk": 0.6})

    def plan(token_s: float) -> Plan:
        monkeypatch.setattr(schedule, "_time_evaluation", lambda *_: {"dense": token_s / 2, "topk": token_s / 2})
        return make_plan(comparison, time.perf_counter())

    # 480 s less 12% in reserve and 10 s for layers: 412.4 s, of which the curves take 13 x 8,192 tokens, and usage 131,072.
    slow, fast = plan(2e-4), plan(5e-5)
    rest = 412.4 - 106_496 * 2e-4
    assert slow.evaluated == int(rest / 3 / 2e-4 / 2) // 1000 * 1000 == 325_000
    assert slow.steps == int(rest - (2 * 325_000 + 131_072) * 2e-4) == 234
    assert fast.evaluated is None and fast.steps == int(412.4 - (106_496 + 131_072 + 1_200_000) * 5e-5)
    # Of two seeds both are evaluated, and the first one's usage is counted: on what is evaluated, where that is less.
    two = dataclasses.replace(comparison, settings=dataclasses.replace(comparison.settings, seeds=(0, 1)))
    comparison, one = two, comparison
    both, rest = plan(8e-4), 412.4 - 2 * 106_496 * 8e-4
    assert both.evaluated == int(rest / 3 / 16e-4 / 2) // 1000 * 1000 == 25_000
    assert both.steps == int((rest - (4 * 25_000 + 25_000) * 8e-4) / 2)
    # A short split leaves its share to the other.
    test = dataclasses.replace(one.corpus, test=tokens[:10_001])
    comparison, rest = dataclasses.replace(one, corpus=test), 412.4 - 106_496 * 3e-4
    assert plan(3e-4).evaluated == int(rest / 3 / 3e-4 - 10_000) // 1000 * 1000 == 412_000
    # Never less than a point of the curves.
    with pytest.raises(UserError, match="which allows 0; fix: --budget"):
        plan(2e-2)


def test_budget_that_is_refused_is_accepted_as_it_says(song: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The budget of the message allows the least number of steps, evaluation's share of it and the reserve left out."""
    monkeypatch.setattr(schedule, "_time_steps", lambda *_: {"dense": 3.0})
    monkeypatch.setattr(schedule, "_time_evaluation", lambda *_: {"dense": 1e-4})
    comparison = Comparison.open(settings(song, "dense", steps=None, budget_s=30.0), tmp_path / "out")
    with pytest.raises(UserError, match="fix: --budget") as caught:
        make_plan(comparison, time.perf_counter())
    named = parse_duration(str(caught.value).partition("--budget ")[2].partition(" ")[0])
    raised = dataclasses.replace(comparison, settings=dataclasses.replace(comparison.settings, budget_s=named))
    assert make_plan(raised, time.perf_counter()).steps >= 20


def test_comparison_of_the_first_tokens_says_so_and_goes_on(song: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its result, in its page's notes, in its runs' settings; the same call finds it finished."""
    monkeypatch.setattr(schedule, "_within_budget", lambda *_: (4, 60))
    wanted, out = settings(song, "sigma-moe", steps=None, budget_s=60.0), tmp_path / "out"
    result = compare(wanted, out)
    monkeypatch.setattr(schedule, "_within_budget", None)
    assert compare(wanted, out).methods == result.methods
    assert result.evaluated_tokens == 60 and read_comparison(out / "comparison.json") == result
    assert any("are of at most the first 60 tokens of each split" in note for note in comparison_table(result).notes)
    path = out / "runs" / "sigma-moe" / "seed-0"
    model, folder = load_run_model(path)
    assert RunSettings.read(folder).evaluated == 60
    test = load_run_corpus(path).test
    config = RunSettings.read(folder).train
    nats = evaluate(model, test, max_tokens=61, **config.evaluation).nats_per_token
    assert nats == pytest.approx(TrainResult.read(folder.result_path).test, rel=1e-6)


def test_evaluation_is_timed_with_its_memory_filled(song: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows that still fill it, which are cheaper, are left out; of a text without others the last one is timed."""
    comparison = Comparison.open(settings(song, "dense"), tmp_path / "out")
    config = comparison.train_config(4, 0)
    config = dataclasses.replace(config, eval_batch=2, context=16, eval_memory=40)
    # A window takes 1 second and one for each 16 positions of its memory, three at most.
    clock, seen = [0.0], []

    def evaluation(model: object, tokens: np.ndarray, *, on_progress: Callable[[int, int], None], **_: object) -> None:
        n = (len(tokens) - 1) // 32
        seen.append(n)
        for i in range(n):
            clock[0] += 1 + min(i, 3)
            on_progress(32 * (i + 1), 32 * n)

    monkeypatch.setattr(schedule, "evaluate", evaluation)
    monkeypatch.setattr(schedule, "clock_of", lambda device: lambda: clock[0])
    assert schedule._time_evaluation(comparison, config) == {"dense": pytest.approx(4 / 32)}
    # Two windows and a few tokens more, which a third one would be.
    short = dataclasses.replace(comparison, corpus=dataclasses.replace(comparison.corpus, valid=comparison.corpus.valid[:70]))
    assert schedule._time_evaluation(short, config) == {"dense": pytest.approx(2 / 32)}
    without = dataclasses.replace(config, eval_memory=0)
    assert schedule._time_evaluation(short, without) == {"dense": pytest.approx(1.5 / 32)}
    assert seen == [6, 6, 6, 2, 2, 2, 2, 2, 2]


def test_evaluation_of_less_than_a_window_is_timed(song: str, tmp_path: Path) -> None:
    """By the real evaluation: of a text shorter than its streams' windows there is one time, that of all of it."""
    comparison = Comparison.open(settings(song, "dense"), tmp_path / "out")
    short = dataclasses.replace(comparison, corpus=dataclasses.replace(comparison.corpus, valid=comparison.corpus.valid[:30]))
    config = dataclasses.replace(comparison.train_config(4, 0), eval_batch=4, context=16)
    assert 0 < schedule._time_evaluation(short, config)["dense"] < 1


def test_broken_off_comparison_of_first_tokens_goes_on_with_as_many(
    song: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its plan says of how many; nothing is planned anew."""

    class Stop(NoProgress):
        def run(self, label: str, seed: int, position: int, n_runs: int) -> Any:
            if position == 1:
                raise KeyboardInterrupt
            return super().run(label, seed, position, n_runs)

    monkeypatch.setattr(schedule, "_within_budget", lambda *_: (4, 60))
    wanted, out = settings(song, "sigma-moe", "dense", steps=None, budget_s=60.0), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        compare(wanted, out, progress=Stop())
    monkeypatch.setattr(schedule, "_within_budget", None)
    result = compare(wanted, out)
    assert result.finished and result.evaluated_tokens == 60
    assert {RunSettings.read(RunFolder(out / "runs" / label / "seed-0")).evaluated for label in ("sigma-moe", "dense")} == {60}


def test_budget_that_is_refused_leaves_nothing(song: str, tmp_path: Path) -> None:
    """The same folder may be used with a larger one."""
    with pytest.raises(UserError, match="must allow at least 20 steps"):
        compare(settings(song, "dense", steps=None, budget_s=0.1), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_method_that_processes_cannot_share_is_refused_first(
    song: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last of the methods too, before the first is trained or a folder is made."""
    monkeypatch.setattr(World, "here", lambda: World(0, 2))
    with pytest.raises(UserError, match="experts can be spread over 1 device for dense, which has none; got 2"):
        compare(settings(song, "sigma-moe", "dense", strategy="ep"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_second_comparison_in_a_folder_is_refused(song: str, tmp_path: Path) -> None:
    """While another process works there, before anything is written."""
    with sole_writer(tmp_path / "out"), pytest.raises(UserError, match="no other process writes into"):
        compare(settings(song, "dense"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_train_and_compare_give_the_same_bits(song: str, tmp_path: Path) -> None:
    """The two commands of one setting: equal configs, and equal bits of every loss."""
    shared = ["--corpus", "text", "--data-dir", song, "--batch", "2", "--context", "16", "--steps", "12", "--seed", "3"]
    method = ["sigma-moe", "expert_dropout=0.1"]
    assert main(["compare", "--methods", *method, *shared, "--out", str(tmp_path / "out")]) == 0
    assert main(["train", "--method", *method, *shared, "--out", str(tmp_path / "alone")]) == 0
    pair = [next((tmp_path / "out").glob("runs/*/seed-3")), tmp_path / "alone"]
    configs = [json.loads((path / "config.json").read_text()) for path in pair]
    assert configs[0] == configs[1] and configs[0]["train"]["warmup"] == 1
    assert lines(pair[0]) == lines(pair[1]) and len(lines(pair[0])) > 24


def test_infinite_perplexity_is_null_and_marked() -> None:
    """One loss above 709 nats must not cost the whole comparison its file; one below is a number."""
    assert _spread({0: 800.0, 1: 2.0}, "word") is None and _too_large({"test": {0: 800.0, 1: 2.0}}, "word") == [
        "a perplexity is too large for a number: test of seed 0, 800 nats"
    ]
    large = _spread({0: 690.0, 1: 690.0}, "word")
    assert large is not None and large.n == 2 and _too_large({"test": {0: 690.0}}, "word") == []
    assert _spread({0: 800.0}, "byte") is not None


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        pytest.param("plan.json", {"steps": 0}, "must hold `steps`, an int >= 1; got 0", id="plan"),
        pytest.param("plan.json", {"step_s": {}}, "must hold `step_s.dense`; got nothing", id="plan without a method"),
        pytest.param("layers.json", {"dense": {}}, r"must hold `.*forward_s`; got nothing; fix: remove the file", id="layers"),
        pytest.param("runs/dense/seed-0/usage.json", {"usage": 3}, "must hold `usage`, an array", id="usage"),
    ],
)
def test_damaged_file_is_refused_with_its_field(
    file: str, change: dict[str, Any], message: str, song: str, tmp_path: Path, uninterrupted: Path
) -> None:
    """Instead of a wrong table."""
    out = tmp_path / "out"
    shutil.copytree(uninterrupted, out)
    unsealed = {key: value for key, value in json.loads((out / file).read_text()).items() if key != "sealed"}
    write_json(out / file, {**unsealed, **change})
    with pytest.raises(UserError, match=message):
        compare(killed_comparison.settings(song), out)


def test_folder_of_version_0_1_is_taken_up(song: str, tmp_path: Path, uninterrupted: Path) -> None:
    """Its plan knows no device, its runs lie as they do now; nothing is trained or planned again."""
    out = tmp_path / "out"
    shutil.copytree(uninterrupted, out)
    plan = {key: value for key, value in json.loads((out / "plan.json").read_text()).items() if key not in ("device", "sealed")}
    write_json(out / "plan.json", plan)
    before = read_comparison(out / "comparison.json")
    (out / "comparison.json").unlink()
    assert compare(killed_comparison.settings(song), out).methods == before.methods
    assert json.loads((out / "plan.json").read_text()) == plan


def test_layers_are_timed_in_the_runs_own_type(song: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixed precision computes its products in bfloat16; times of float32 would say nothing of it."""
    asked = []

    def timed(configs: dict, *, dtype: torch.dtype, **options: Any) -> dict[str, dict[str, float]]:
        asked.append(dtype)
        return {label: {"forward_s": 1.0, "training_s": 2.0} for label in configs}

    monkeypatch.setattr("sparseffn.comparison.job.time_layers", timed)
    for precision in ("float32", "bfloat16"):
        compare(settings(song, "dense", precision=precision, device="cpu"), tmp_path / precision)
    assert asked == [torch.float32, torch.bfloat16]


def test_precision_is_part_of_what_is_compared_and_the_device_is_not(song: str, tmp_path: Path) -> None:
    """A folder of bfloat16 is refused to float32; the name of the device may change."""
    result = compare(settings(song, "dense", precision="bfloat16", device="auto"), tmp_path / "out")
    assert result.settings["precision"] == "bfloat16" and result.environment["device"] == "cpu"
    assert compare(settings(song, "dense", precision="bfloat16", device="cpu"), tmp_path / "out").methods == result.methods
    with pytest.raises(UserError, match=r"overrides\.precision is 'bfloat16', not None"):
        compare(settings(song, "dense"), tmp_path / "out")


def test_methods_that_cannot_be_matched_are_all_named() -> None:
    """With an error of its own kind, which the command answers with 1."""
    words = ["sigma-moe", "k=16", "expert_size=4000", "dense", "sigma-moe", "k=8", "expert_size=4000"]
    message = r"within 0.5% of .* 1,284,354 parameters; got sigma-moe k=16 expert_size=4000 has 16,.*%\); sigma-moe k=8 .* has"
    with pytest.raises(UnmatchedError, match=message):
        match_methods(parse_methods(words), get_preset("tiny"), 256)
    with pytest.raises(UnmatchedError, match="`target_params` must be at least"):
        match_methods(parse_methods(["base", "expert_size=5000"]), get_preset("tiny"), 256)


def test_all_methods_read_the_same_tokens(song: str, tmp_path: Path) -> None:
    """Runs of one comparison have one corpus digest and one position for each step."""
    compare(settings(song, "dense", "switch"), tmp_path / "out")
    runs = [RunFolder(p) for p in sorted((tmp_path / "out" / "runs").glob("*/seed-0"))]
    configs = [json.loads((r.path / "config.json").read_text()) for r in runs]
    assert len(runs) == 2 and configs[0]["corpus"] == configs[1]["corpus"] and configs[0]["train"] == configs[1]["train"]
