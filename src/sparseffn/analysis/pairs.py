"""How richly experts are combined: effective pairs, against those of a choice that is independent but for the same loads.

The exponential of the entropy of the pairs that tokens select is the number of equally frequent pairs that would be as varied.
Uneven loads alone lower it, so that it is held against the most varied choice with these loads: pairs that are as frequent as
a product of one weight for each expert.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sparseffn.results.experiment_result import PairNumbers

Array = NDArray[np.float64]
_ROUNDS = 2000
_TOLERANCE = 1e-12


def pair_numbers(matrix: Sequence[Sequence[float]]) -> PairNumbers:
    """From a matrix of co-occurrence whose rows sum to 1, as `usage.json` and `sparseffn analyze` have it.

    The counts behind it are symmetric, so that the experts' loads are its stationary distribution.
    """
    rows_EE = np.asarray(matrix, dtype=np.float64)
    loads_E = _stationary(rows_EE)
    together_EE = loads_E[:, None] * rows_EE
    return PairNumbers(
        effective=_effective((together_EE + together_EE.T) / 2),
        independent=_effective(_independent(loads_E)),
        possible=len(loads_E) * (len(loads_E) - 1) // 2,
    )


def _stationary(rows_EE: Array) -> Array:
    loads_E = np.full(len(rows_EE), 1 / len(rows_EE))
    for _ in range(_ROUNDS):
        # Halfway, so that nothing alternates.
        following_E = (loads_E + loads_E @ rows_EE) / 2
        if np.abs(following_E - loads_E).max() < _TOLERANCE:
            break
        loads_E = following_E / following_E.sum()
    return loads_E


def _independent(loads_E: Array) -> Array:
    """Pairs `w_i w_j` of different experts whose sums are the loads, by symmetric scaling."""
    weights_E = np.sqrt(loads_E)
    for _ in range(_ROUNDS):
        sums_E = weights_E * (weights_E.sum() - weights_E)
        factors_E = np.sqrt(np.divide(loads_E, sums_E, out=np.zeros_like(loads_E), where=sums_E > 0))
        weights_E = weights_E * factors_E
        if np.abs(factors_E[loads_E > 0] - 1).max() < _TOLERANCE:
            break
    pairs_EE = np.outer(weights_E, weights_E)
    np.fill_diagonal(pairs_EE, 0.0)
    return pairs_EE


def _effective(together_EE: Array) -> float:
    """Exponential of the entropy of unordered pairs."""
    pairs = together_EE[np.triu_indices(len(together_EE), 1)]
    shares = pairs[pairs > 0] / pairs.sum()
    return math.exp(float(-(shares * np.log(shares)).sum()))
