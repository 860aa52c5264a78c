"""Whether the experts of a run collapsed, from what it wrote of its routing while it trained.

In a layer the load has fallen if its entropy is below half of log N_E, or if more than half of the experts have less than 1% of
the mean load; it has collapsed if that stands at the last step and has grown since the middle of training, so that a layer that
starts uneven and recovers has not. A run collapses with one of its layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sparseffn.analysis.over_training import counts_of
from sparseffn.analysis.usage import dead_share, load_of
from sparseffn.paper.rules import Rule
from sparseffn.results.experiment_result import DecidedCollapse, ExperimentRun, LayerLoads
from sparseffn.stats import Verdict
from sparseffn.training.snapshots import list_snapshots, load_snapshot

LEAST_ENTROPY, MOST_DEAD = 0.5, 0.5


def layer_loads(folder: Path, n_experts: int) -> list[LayerLoads]:
    """Every layer's load at every snapshot of a run; nothing where it has none.

    Raises:
        UserError: a snapshot is damaged.
    """
    by_step = {step: load_snapshot(path) for step, path in list_snapshots(folder).items()}
    counts = [[counts_of(rows, n_experts) for rows in layers] for layers in by_step.values()]
    return [
        LayerLoads(
            steps=list(by_step),
            entropy=[round(load_of(layers[layer]).entropy, 4) for layers in counts],
            dead=[round(dead_share(layers[layer]), 4) for layers in counts],
        )
        for layer in range(len(counts[0]) if counts else 0)
    ]


def middle_of(loads: LayerLoads) -> int:
    """Which of the steps is nearest to half of the training."""
    return min(range(len(loads.steps)), key=lambda i: abs(loads.steps[i] - loads.steps[-1] / 2))


def has_collapsed(loads: LayerLoads) -> bool:
    """At the last step, and further than in the middle of training."""
    middle = middle_of(loads)
    entropies, dead = (loads.entropy[middle], loads.entropy[-1]), (loads.dead[middle], loads.dead[-1])
    uneven = entropies[1] < LEAST_ENTROPY and entropies[1] < entropies[0]
    return uneven or (dead[1] > MOST_DEAD and dead[1] > dead[0])


def collapses(rule: Rule, runs: Sequence[ExperimentRun]) -> list[DecidedCollapse]:
    """Of every candidate of a rule about collapse, those that are not claimed to collapse included."""
    decided = []
    for candidate in rule.candidates if rule.collapse else ():
        fallen = [any(map(has_collapsed, run.loads)) for run in runs if run.candidate == candidate.name and run.loads]
        claimed = candidate.name in rule.collapse
        complete = len(fallen) == rule.looks[-1]
        decided.append(
            DecidedCollapse(
                candidate=candidate.name,
                claimed=claimed,
                n_finished=len(fallen),
                n_collapsed=sum(fallen),
                verdict=_verdict(fallen) if claimed and complete else None,
            )
        )
    return decided


def _verdict(fallen: Sequence[bool]) -> Verdict:
    if all(fallen):
        return "confirmed"
    return "undecided" if any(fallen) else "contradicted"
