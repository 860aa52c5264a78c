"""What the runs of a study's variant say, beside what was predicted and against the study's first variant."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Literal

from sparseffn.comparison.matched import MethodChoice
from sparseffn.ffn.mixture import TopKMixtureConfig
from sparseffn.models.presets import Preset
from sparseffn.paper.predictions import gate_square, interference_bounds
from sparseffn.paper.study_runs import block_config
from sparseffn.paper.study_start import rounded
from sparseffn.results.study_result import SELECTOR_QUANTITIES, Prediction, SelectorProbe, StudyRun, Variant
from sparseffn.stats import Difference, difference, mean_std

_OF_A_PROBE = tuple(name for name in SelectorProbe.__struct_fields__ if name != "step")


def variant_result(
    name: str, choice: MethodChoice, preset: Preset, runs: Sequence[StudyRun], *, first: Variant | None
) -> Variant:
    """A variant's finished runs, their means, and what sets them off from the study's first variant, None where this is it."""
    against = {} if first is None else differences(runs, first.runs)
    return Variant(
        name=name,
        method=choice.label,
        predicted=_predicted(choice, preset),
        runs=list(runs),
        valid=mean_std([run.valid for run in runs]),
        test=mean_std([run.test for run in runs]),
        start=_means([run.probes[0] for run in runs]),
        end=_means([run.probes[-1] for run in runs]),
        against_first=against,
        verdicts={split: better_or_worse(against[split]) for split in ("valid", "test") if split in against},
    )


def _predicted(choice: MethodChoice, preset: Preset) -> Prediction:
    """What the framework says of a variant's gates before the first step; see `predictions`."""
    config = block_config(choice, preset)
    assert isinstance(config, TopKMixtureConfig) and config.gate is not None, "studies train mixtures"
    low, high = interference_bounds(config, config.gate)
    return Prediction(gate_square=rounded(gate_square(config, config.gate)), interference=(rounded(low), rounded(high)))


def differences(runs: Sequence[StudyRun], base: Sequence[StudyRun]) -> dict[str, Difference]:
    """Losses and selectors at the end, paired by seed; empty without a common seed."""
    if not {run.seed for run in runs} & {run.seed for run in base}:
        return {}
    quantities: dict[str, Callable[[StudyRun], float]] = {
        "valid": lambda run: run.valid,
        "test": lambda run: run.test,
        **{name: lambda run, name=name: getattr(run.probes[-1], name) for name in SELECTOR_QUANTITIES},
    }
    return {
        name: difference({run.seed: of(run) for run in runs}, {run.seed: of(run) for run in base})
        for name, of in quantities.items()
    }


def better_or_worse(found: Difference) -> Literal["better", "worse", "undecided"]:
    """Of a loss."""
    if not found.decided:
        return "undecided"
    return "better" if found.difference < 0 else "worse"


def _means(probes: Sequence[SelectorProbe]) -> dict[str, float]:
    if not probes:
        return {}
    return {name: statistics.fmean(getattr(probe, name) for probe in probes) for name in _OF_A_PROBE}
