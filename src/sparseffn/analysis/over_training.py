"""Routing over training, from the snapshots of a run: load and entropy at each step, and stability from one to the next.

Stability compares the sets of experts that a token selects at two steps: Jaccard index |A & B| / |A | B|, mean over tokens.
Two sets drawn evenly at random agree by chance alone; that level stands beside.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from sparseffn.analysis.usage import load_of
from sparseffn.results.analysis_result import LoadAtStep, Overlap, OverlapOfSteps, RoutingOverTraining


def over_training(
    snapshots: Mapping[int, Sequence[Tensor]], n_experts: int, source: Literal["snapshots", "checkpoints"]
) -> RoutingOverTraining:
    """Load and entropy by step and layer, and the stability of each step against the one before.

    The snapshots hold for each step int16 `[n_tokens, K]` a layer, -1 where nothing was selected; all of the same tokens.
    """
    steps = sorted(snapshots)
    n_tokens, k = snapshots[steps[0]][0].shape
    return RoutingOverTraining(
        source=source,
        n_tokens=n_tokens,
        points=[
            LoadAtStep(step=step, layers=[load_of(counts_of(rows, n_experts)) for rows in snapshots[step]]) for step in steps
        ],
        stability=[
            OverlapOfSteps(
                from_step=before,
                to=after,
                layers=[overlap_of(a, b, n_experts) for a, b in zip(snapshots[before], snapshots[after], strict=True)],
            )
            for before, after in itertools.pairwise(steps)
        ],
        chance=Overlap(jaccard=chance_jaccard(n_experts, k)),
    )


def overlap_of(before_TK: Tensor, after_TK: Tensor, n_experts: int) -> Overlap:
    """Agreement of the experts of each token, mean over tokens that select anything."""
    a_TE, b_TE = _sets(before_TK, n_experts), _sets(after_TK, n_experts)
    both, either = (a_TE & b_TE).sum(1).double(), (a_TE | b_TE).sum(1).double()
    some = either > 0
    return Overlap(jaccard=float((both[some] / either[some]).mean()) if bool(some.any()) else 1.0)


def chance_jaccard(n_experts: int, k: int) -> float:
    """Expected Jaccard index of two sets of k of n experts, drawn evenly and independently (hypergeometric)."""
    k = min(k, n_experts)
    total = math.comb(n_experts, k)
    common = range(max(0, 2 * k - n_experts), k + 1)
    return sum(math.comb(k, i) * math.comb(n_experts - k, k - i) / total * i / (2 * k - i) for i in common)


def _sets(rows_TK: Tensor, n_experts: int) -> Tensor:
    """Bool `[T, E]`; the column of what is not selected is cut off."""
    chosen_TE = torch.zeros(len(rows_TK), n_experts + 1, dtype=torch.bool, device=rows_TK.device)
    slots_TK = rows_TK.long() % (n_experts + 1)
    return chosen_TE.scatter_(1, slots_TK, True)[:, :n_experts]


def counts_of(rows_TK: Tensor, n_experts: int) -> Tensor:
    """Selections of each expert, `[E]`, from a layer of a snapshot: int16 `[n_tokens, K]`, -1 where nothing was selected."""
    return torch.bincount(rows_TK.long().flatten() % (n_experts + 1), minlength=n_experts + 1)[:n_experts]
