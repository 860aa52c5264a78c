"""`sparseffn compare`: parameter-equal models, one method each, on the same data; one table and one page.

Calling it again with the same settings goes on where it stopped; `experiment` says what lies in its folder.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from sparseffn.bench.benchmark import time_layers
from sparseffn.bench.candidates import DTYPES
from sparseffn.comparison.experiment import CompareSettings, Comparison
from sparseffn.comparison.outcome import DENSE, LayerTimes, count_usage, summarize
from sparseffn.comparison.schedule import Plan, find_plan
from sparseffn.ffn.dense import DenseConfig
from sparseffn.results.comparison_result import ComparisonResult
from sparseffn.storage import read, remove_unfinished, sole_writer, write_json
from sparseffn.training import NonFiniteLossError, load_run_model, train
from sparseffn.training.journal import OnStep


class Progress(Protocol):
    """Is kept informed of how a comparison goes on."""

    def log(self, text: str) -> None: ...

    def run(self, label: str, seed: int, position: int, n_runs: int) -> OnStep:
        """A run begins; what this returns is called after each of its steps."""
        ...


class NoProgress:
    """Informs nobody."""

    def log(self, text: str) -> None:
        pass

    def run(self, label: str, seed: int, position: int, n_runs: int) -> OnStep:
        return lambda report: None


def compare(settings: CompareSettings, out: Path | str, *, progress: Progress | None = None) -> ComparisonResult:
    """Train and compare; returns what `comparison.json` holds.

    Args:
        settings: methods, corpus, preset, length, device.
        out: the folder of the comparison; goes on when it holds an unfinished one of the same settings.
        progress: is kept informed.

    Raises:
        UnmatchedError: a method cannot be brought to the dense model's number of parameters.
        UserError: the folder is of another comparison or in use, the budget is too small, or anything that `load_corpus` and
            `train` raise.
    """
    started, progress = time.perf_counter(), progress or NoProgress()
    comparison = Comparison.open(settings, Path(out))
    for candidate in comparison.candidates:
        found = candidate.match
        progress.log(f"{candidate.label}: {found.model_params:,} parameters ({found.residual_percent:+.3f}% against dense)")
    with sole_writer(comparison.out):
        remove_unfinished(comparison.out)
        plan = find_plan(comparison, started)
        comparison = comparison.evaluated_on(plan.evaluated)
        tokens = comparison.preset.batch * comparison.preset.context
        progress.log(f"{plan.steps} steps of {tokens:,} tokens for every method")
        if plan.evaluated is not None:
            progress.log(f"of validation and test, the budget allows at most the first {plan.evaluated:,} tokens each")
        failures = _train(comparison, plan, progress)
        layers = _time_layers(comparison, progress)
        result = summarize(comparison, plan, layers, failures)
        write_json(comparison.out / "comparison.json", result)
    return result


def _train(comparison: Comparison, plan: Plan, progress: Progress) -> Mapping[tuple[str, int], str]:
    """Train and evaluate every method with every seed; what is finished is left as it is.

    Returns:
        Why a run, by label and seed, has no result.
    """
    failures, seeds = {}, comparison.settings.seeds
    runs = [(candidate, seed) for seed in seeds for candidate in comparison.candidates]
    for position, (candidate, seed) in enumerate(runs):
        on_step = progress.run(candidate.label, seed, position, len(runs))
        path, config = comparison.run_folder(candidate.label, seed).path, comparison.train_config(plan.steps, seed)
        try:
            strategy, device = comparison.settings.strategy, comparison.device
            train(candidate.model, config, comparison.corpus, path, device=device, strategy=strategy, on_step=on_step)
            if seed == seeds[0] and not (path / "usage.json").exists():
                model, _ = load_run_model(path, device=comparison.device)
                count_usage(model, config, comparison.corpus, path)
        except NonFiniteLossError as error:
            # One method that diverges must not cost the others' results; its row says so.
            failures[candidate.label, seed] = str(error)
            progress.log(f"{candidate.label}, seed {seed}: {error}")
    return failures


def _time_layers(comparison: Comparison, progress: Progress) -> LayerTimes:
    """Stored or new timings of one layer of each method, and of the dense block."""
    path = comparison.out / "layers.json"
    if not path.exists():
        progress.log("timing one layer of each method, in turn")
        dense = comparison.preset.block(DenseConfig)
        # The dense block itself may be a candidate: timed twice, it would not take its own time.
        of_label = {c.label: DENSE if c.config == dense else c.label for c in comparison.candidates}
        blocks = {DENSE: dense} | {c.label: c.config for c in comparison.candidates if of_label[c.label] != DENSE}
        n_tokens = comparison.preset.batch * comparison.preset.context
        # As the run computes its products: those of mixed precision are in the narrow type.
        dtype = DTYPES[comparison.settings.precision]
        timed = time_layers(blocks, n_tokens=n_tokens, dtype=dtype, device=comparison.device)
        write_json(path, timed | {label: timed[block] for label, block in of_label.items()}, seal=True)
    fix = "remove the file and run the same command again, which times the layers anew"
    times = read(path, LayerTimes, fix=fix)
    comparison.check_labels(path, times, fix=fix)
    return times
